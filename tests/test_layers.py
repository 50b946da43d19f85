"""The rules of the folders, read off the source: imports, length, documentation.

Each rule is a function from a folder to the lines it objects to. It has to be silent on
this repository, and to speak about a small package that breaks it.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest

import collab_jax

ROOT = Path(__file__).parents[1]
PACKAGE = "collab_jax"
TOP = {"collab_jax", "experiments", "tests", "pyproject.toml", "README.md", "LICENSE"}
TOP |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
LINES = 400

THIRDS = ("merge", "ensemble", "cooperate")
SHELL = ("cli", "commands", "demo")  # may use everything; the rest of the top is core
BY_NAME = ("importlib.import_module", "import_module", "__import__")
FORMATS = ("transformers", "safetensors", "gguf", "orbax")
# Written so that the pattern does not find itself.
LOCAL = re.compile(r"(?<![\w.>}])/(?:work|root|home|Users|opt)/")


def sources(root, *folders):
    """Python files below the folders, by name."""
    return sorted(p for f in folders for p in (root / f).rglob("*.py"))


def module_name(path, root):
    """`collab_jax.io.hub`; a package has the name of its folder."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, root):
    """Every (line, absolute dotted name) that a file imports, at any depth.

    `from a import b` is the module a.b where there is one, and else the module a.
    """
    package = path.relative_to(root).parent.parts

    def exists(name):
        inside = root / name.replace(".", "/")
        return inside.is_dir() or inside.with_suffix(".py").exists()

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                full = f"{stem}.{alias.name}"
                own = stem.split(".")[0] == PACKAGE
                yield node.lineno, stem if own and not exists(full) else full
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            yield from ((node.lineno, x.value) for x in node.args[:1] if is_text(x))


def is_text(node):
    """Whether an expression is a string literal."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def forbidden(module):
    """What a module may not import, as (dotted prefix, reason)."""
    folder = module.split(".")[1] if "." in module else ""
    if module.split(".")[0] == PACKAGE:
        yield "torch", "the library never imports torch"
    yield "experiments", "nothing imports experiments"
    if module.split(".")[0] != PACKAGE:
        return
    if folder != "models":
        yield "flax", "only models/ imports flax"
    if folder != "io":
        yield from ((name, f"only io/ imports {name}") for name in FORMATS)
    if folder == "merge":
        yield f"{PACKAGE}.lm", "merge/ works on any tree and knows no LM"
    if folder == "ensemble":
        yield f"{PACKAGE}.cooperate", "ensemble/ lies below cooperate/"
    if folder not in (*THIRDS, *SHELL):
        for third in THIRDS:
            yield f"{PACKAGE}.{third}", "the core lies below the three thirds"


def wrong_imports(root):
    """Imports against the table of the layers."""
    for path in sources(root, PACKAGE, "tests", "experiments"):
        for line, name in imports(path, root):
            for prefix, reason in forbidden(module_name(path, root)):
                if name == prefix or name.startswith(prefix + "."):
                    where = path.relative_to(root)
                    yield f"{where}:{line}: imports {name}; {reason}"


def circles(root):
    """Modules that import each other, directly or through others."""
    graph = {}
    for path in sources(root, PACKAGE):
        names = {name for _, name in imports(path, root)}
        graph[module_name(path, root)] = names
    reach = {name: set(below) & set(graph) for name, below in graph.items()}
    for via in graph:
        for name in graph:
            if via in reach[name]:
                reach[name] |= reach[via]
    for name in sorted(graph):
        if name in reach[name]:
            yield f"{name} imports itself through {sorted(reach[name])}"


def long_files(root):
    """Files that hold more than one idea can need."""
    for path in sources(root, PACKAGE, "tests", "experiments"):
        count = len(path.read_text().splitlines())
        if count > LINES:
            yield f"{path.relative_to(root)}: {count} lines; at most {LINES}"


def undocumented(root):
    """Public names without a docstring, and public functions without a running example.

    Public is what has no leading underscore: functions and classes of a module, and the
    methods of these classes. A class and a method need a docstring, a function also an
    example. The docstring of a command is its --help, so it needs no example; nor does
    the console script, `cli.main`, which leaves the interpreter.
    """
    for path in sources(root, PACKAGE):
        body = ast.parse(path.read_text())
        if not ast.get_docstring(body) and body.body:
            yield f"{path.relative_to(root)}: the module has no docstring"
        for node in body.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            where = f"{path.relative_to(root)}:{node.lineno}: {node.name}"
            text = ast.get_docstring(node) or ""
            if not text:
                yield f"{where} has no docstring"
            elif isinstance(node, ast.FunctionDef) and not is_command(node):
                examples = [
                    x for x in text.splitlines() if x.lstrip().startswith(">>>")
                ]
                if not [x for x in examples if "+SKIP" not in x]:
                    yield f"{where} has no example that runs"
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    named = isinstance(part, ast.FunctionDef)
                    if named and part.name[0] != "_" and not ast.get_docstring(part):
                        yield f"{where}.{part.name} has no docstring"


def is_command(node):
    """Whether a function is a command of the command line, or runs it."""
    if node.name == "main":
        return True
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(re.match(r"(click|\w+)\.(command|group)\b", name) for name in names)


def local_paths(root):
    """Lines that name a place on somebody's own machine."""
    folders = [root / name for name in ("collab_jax", "experiments", "tests", ".ci")]
    files = [p for folder in folders for p in folder.rglob("*")]
    files += [root / name for name in TOP - {"collab_jax", "experiments", "tests"}]
    for path in sorted(files):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:  # golden arrays
            continue
        for number, line in enumerate(lines, 1):
            if LOCAL.search(line):
                yield f"{path.relative_to(root)}:{number}: {line.strip()}"


def strangers(root):
    """Entries of the top folder that do not belong there."""
    made = {"build", "dist", "__pycache__"}
    for path in sorted(root.iterdir()):
        built = path.name in made or path.suffix == ".egg-info"
        if not (built or path.name.startswith(".") or path.name in TOP):
            yield f"{path.name} does not belong into the top folder"


RULES = (
    wrong_imports,
    circles,
    long_files,
    undocumented,
    local_paths,
    strangers,
)


@pytest.mark.parametrize("rule", RULES)
def test_repository_obeys(rule):
    """No rule objects to this repository."""
    assert list(rule(ROOT)) == []


GOOD = {
    "collab_jax/__init__.py": '"""All."""\nfrom collab_jax.lm import extend\n',
    "collab_jax/lm.py": '''
        """The core."""

        import jax


        def extend(x):
            """Itself.

            >>> extend(1)
            1
            """
            return jax.device_get(x)
        ''',
    "collab_jax/cli.py": '"""Commands."""\nimport collab_jax.merge.recipes\n',
    "collab_jax/models/block.py": '"""A block."""\nimport flax.linen as nn\n',
    "collab_jax/io/load.py": '"""Reads."""\nfrom transformers import AutoTokenizer\n',
    "collab_jax/merge/recipes.py": '"""Recipes."""\nfrom collab_jax import tree\n',
    "collab_jax/tree.py": '"""Trees."""\n',
    "tests/test_lm.py": "import torch\n",
}
BAD = (
    (wrong_imports, "collab_jax/decode.py", "import torch.nn\n"),
    (wrong_imports, "collab_jax/decode.py", "def f():\n    from flax import linen\n"),
    (wrong_imports, "collab_jax/io/load.py", "import flax\n"),
    (wrong_imports, "collab_jax/models/block.py", "import orbax.checkpoint as ocp\n"),
    (wrong_imports, "collab_jax/models/block.py", "from safetensors import numpy\n"),
    (
        wrong_imports,
        "collab_jax/cli.py",
        "import importlib\nimportlib.import_module('gguf')\n",
    ),
    (
        wrong_imports,
        "collab_jax/merge/recipes.py",
        "from collab_jax.lm import extend\n",
    ),
    (wrong_imports, "collab_jax/merge/recipes.py", "from ..lm import extend\n"),
    (wrong_imports, "collab_jax/merge/recipes.py", "from .. import lm\n"),
    (wrong_imports, "collab_jax/lm.py", "from .merge import recipes\n"),
    (wrong_imports, "collab_jax/lm.py", "from . import merge\n"),
    (wrong_imports, "collab_jax/__init__.py", "from .merge.recipes import ties\n"),
    (wrong_imports, "collab_jax/ensemble/gate.py", "from ..cooperate import verify\n"),
    (wrong_imports, "collab_jax/cli.py", "import experiments.quickstart\n"),
    (wrong_imports, "tests/test_lm.py", "from experiments import quickstart\n"),
    (circles, "collab_jax/tree.py", "from collab_jax.merge import recipes\n"),
    (long_files, "collab_jax/lm.py", "x = 1\n" * (LINES + 1)),
    (undocumented, "collab_jax/lm.py", "x = 1\n"),
    (undocumented, "collab_jax/lm.py", '"""M."""\ndef f():\n    return 1\n'),
    (undocumented, "collab_jax/lm.py", '"""M."""\ndef f():\n    """One."""\n'),
    (
        undocumented,
        "collab_jax/lm.py",
        '"""M."""\ndef f():\n    """>>> f()  # doctest: +SKIP"""\n',
    ),
    (undocumented, "collab_jax/lm.py", '"""M."""\nclass Out:\n    x = 1\n'),
    (
        undocumented,
        "collab_jax/lm.py",
        '"""M."""\nclass Out:\n    """O."""\n    def f(self):\n        return 1\n',
    ),
    (local_paths, "tests/test_lm.py", "DATA = '" + "/" + "root/data'\n"),
    (local_paths, "README.md", "see /" + "home/me/design.md\n"),
    (strangers, "notes.txt", "later\n"),
)


def build(folder, files):
    """Writes a small repository."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())


@pytest.mark.parametrize("rule", RULES)
def test_good_package_passes(tmp_path, rule):
    """A package that keeps the rules draws no objection."""
    build(tmp_path, GOOD)
    assert list(rule(tmp_path)) == []


@pytest.mark.parametrize(("rule", "name", "text"), BAD)
def test_bad_package_is_caught(tmp_path, rule, name, text):
    """Each way to break a rule draws exactly one objection, which names the file."""
    build(
        tmp_path, {**GOOD, "collab_jax/cooperate/verify.py": '"""V."""\n', name: text}
    )
    found = list(rule(tmp_path))
    if rule is circles:
        assert len(found) == 2
    else:
        assert len(found) == 1, found
        assert name in found[0]


def test_versions_agree():
    """The package, its history and its citation speak of the same version."""
    version = collab_jax.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
