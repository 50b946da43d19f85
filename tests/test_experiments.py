"""Every experiment runs in its small form, and says what its docstring must say."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_docstring(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    for word in ("Claim:", "Command:", "Hardware:", "Expected:"):
        assert word in text, f"{path.name} does not say {word}"


def test_the_index_names_every_script():
    index = (FOLDER / "README.md").read_text()
    assert [p.name for p in SCRIPTS if f"| `{p.name}` |" not in index] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_smoke(path, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # as `python experiments/NAME.py` does
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        output = tmp_path / "result.json"
        status = module.main(["--smoke", "--output", str(output)])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        pytest.skip("compares with torch, which is not installed")
    finally:
        del sys.modules[spec.name]
    assert not status
    assert output.stat().st_size > 0
    assert capsys.readouterr().out.strip()
