"""A merge configuration, run from folder to folder.

First everything is checked: the configuration, the models' headers, the vocabularies,
the memory, the room on the disk. Then tensors stream. The result is made in a hidden
folder beside its place and moved there when it is whole, so that whatever happens in
between, nothing can be taken for a result.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import jax
from filelock import FileLock, Timeout

from collab_jax import __version__
from collab_jax.io import writer
from collab_jax.io.card import card
from collab_jax.io.folder import Shape, describe
from collab_jax.merge import jobs
from collab_jax.merge.plan import stage
from collab_jax.merge.plan.config import read
from collab_jax.merge.plan.edits import edited
from collab_jax.merge.plan.reference import Reference, show
from collab_jax.merge.plan.resolve import plan
from collab_jax.merge.plan.stage import Stage
from collab_jax.merge.plan.tokens import references
from collab_jax.merge.sources import Source, open_folder, open_source, open_tokenizer
from collab_jax.merge.stream import limit, passes, stream

SHARD = 5_000_000_000  # bytes
RUNTIME = 1 << 30  # bytes of the interpreter, the compiler and its programs, at most

# (what is counted, how many) -> a context with the function that moves it by one
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


def _quiet(label: str, count: int) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


class Recipe(NamedTuple):
    """A configuration, resolved against the models that it names."""

    text: str
    stages: tuple[Stage, ...]
    sources: dict[str, Source]  # by the key of a model


def prepare(config: str | Path) -> Recipe:
    """Reads a configuration and the headers of its models; no tensor is read.

    Args:
      config: a file, or the text of one (with a line end).

    Raises:
      FileNotFoundError: where a model is not found.
      ValueError: where anything does not fit; it names the place in the configuration.

    >>> prepare("merge_method: lin\\nmodels: [{model: a}]\\n")
    Traceback (most recent call last):
    ValueError: merge_method: unknown method 'lin'; did you mean linear?...
    """
    path = Path(config) if "\n" not in str(config) else None
    if path and not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a YAML file was expected")
    text = path.read_text("utf-8") if path else str(config)
    sources: dict[str, Source] = {}

    def facts(reference: Reference):
        key = show(reference)
        if key not in sources:
            sources[key] = open_source(reference)
        return sources[key].facts

    stages = plan(read(f"{text}\n"), facts)
    for each in stages:
        for reference in references(each.tokenizer):
            key = show(reference)
            if key not in sources and key not in each.earlier:
                try:
                    sources[key] = open_tokenizer(reference)
                except (OSError, ValueError) as error:
                    raise type(error)(f"tokenizer: {error}") from None
    return Recipe(text, stages, sources)


def summary(recipe: Recipe) -> list[str]:
    """What a run will do and need, in lines for people.

    Args:
      recipe: prepared.

    >>> summary(Recipe("", (), {}))
    []
    """
    lines = []
    for each in recipe.stages:
        lines += stage.describe(each).splitlines()
        wide = [t.name for t in each.targets if t.layout.dtype.itemsize == 8]
        if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            lines.append(
                f"  note: {len(wide)} tensors, such as {wide[0]}, are float64 and are "
                "merged in float32: set JAX_ENABLE_X64=1 to merge them as they are"
            )
        made = jobs.jobs(each, {}, None)
        need = limit(made)
        lines.append(
            f"  memory: at most {need / 2**20:.0f} MiB for tensors and "
            f"{RUNTIME / 2**20:.0f} MiB for the program"
        )
    return lines


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    seed: int = 0,
    command: str = "collab-jax merge CONFIG.yml OUT",
    max_shard_size: int = SHARD,
    workers: int = 3,
    progress: Progress = _quiet,
) -> list[str]:
    """Merges, and writes the folder of the result.

    Args:
      recipe: prepared.
      out: the folder; it must not exist, or be empty.
      seed: of random methods.
      command: what the model card says was run.
      max_shard_size: bytes of a file of weights; a tensor may be larger.
      workers: threads that each read, merge and write.
      progress: shows how far it is.

    Returns:
      Notes: one line for each thing that a user should look at.

    Raises:
      FileNotFoundError: where a file is missing.
      OSError: where the disk is full.
      ValueError: where anything does not fit, or a number is not finite.

    >>> import tempfile
    >>> import numpy as np
    >>> from collab_jax.io.safetensors import Layout, open_folder, write_folder
    >>> root = Path(tempfile.mkdtemp())
    >>> for name, value in (("a", 1.0), ("b", 3.0)):
    ...     (root / name).mkdir()
    ...     size = (root / name / "config.json").write_text("{}")
    ...     layouts = {"x.weight": Layout(np.dtype("float32"), (2,))}
    ...     write_folder(root / name, layouts, [np.full(2, value, np.float32)], 10**9)
    >>> recipe = prepare(f'''
    ... merge_method: linear
    ... models:
    ... - {{model: {root / "a"}, parameters: {{weight: 1}}}}
    ... - {{model: {root / "b"}, parameters: {{weight: 1}}}}
    ... ''')
    >>> notes = run(recipe, root / "mean")
    >>> open_folder(root / "mean").read("x.weight").tolist()
    [2.0, 2.0]
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: a merge is written to a new folder")
    with _parents(out):
        _remove_stale(out)
        partial = Path(
            tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
        )
        held = FileLock(partial / "lock")
        try:
            held.acquire(timeout=0)
            results: dict[str, Source] = {}
            notes: list[str] = []
            for number, each in enumerate(recipe.stages):
                last = number == len(recipe.stages) - 1
                folder = partial / ("result" if last else f"stage-{number}")
                folder.mkdir()
                known = dict(recipe.sources)
                for key, name in each.earlier.items():
                    known[key] = results[name]
                notes += _stage(
                    recipe, each, known, folder, out.name, seed, command,
                    max_shard_size, workers, progress,
                )  # fmt: skip
                if each.name is not None and not last:
                    results[each.name] = open_folder(folder)
            (partial / "result").chmod(0o755)
            if out.exists():
                out.rmdir()
            os.replace(partial / "result", out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            held.release()
    return list(dict.fromkeys(notes))


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Makes the folders above the result; those that stay empty go again."""
    missing = [path for path in out.parents if not path.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it holds something
                path.rmdir()


def _stage(
    recipe: Recipe,
    each: Stage,
    sources: dict[str, Source],
    folder: Path,
    name: str,
    seed: int,
    command: str,
    max_shard_size: int,
    workers: int,
    progress: Progress,
) -> list[str]:
    vocabulary = jobs.vocabulary_of(each, sources)
    rows = None if vocabulary is None else vocabulary.rows
    made = jobs.jobs(each, sources, rows)
    jobs.check(each, sources, rows)
    folders = {key: sources[key].folder for key in jobs.keys(each)}

    def text(notes: Sequence[str]) -> str:
        methods = [s.method for s in recipe.stages]
        random = any(method.startswith(("dare", "della")) for method in methods)
        models = [
            key for s in recipe.stages for key in s.models if key not in s.earlier
        ]
        return card(
            name, methods, models, each.base, recipe.text, command, __version__,
            seed if random else None, notes,
        )  # fmt: skip

    notes = describe(
        folder, folders, each.donor, Shape(dtype=each.out_dtype or each.dtype),
        recipe.text, text, vocabulary, each.chat_template, list(each.models),
    )  # fmt: skip
    path = folder / "config.json"
    config = edited(json.loads(path.read_text("utf-8")), each.config)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    layouts = {job.name: jobs.layout(job) for job in made}
    output = writer.create(folder, layouts, max_shard_size)
    try:
        with progress(each.name or name, passes(made)) as advance:
            stream(
                made, output.write, jax.random.key(seed),
                workers=workers, advance=advance,
            )  # fmt: skip
        output.close()
    finally:
        output.abort()
    return [*each.notes, *notes]


def _remove_stale(out: Path) -> None:
    """What a run that was killed has left: nobody holds its lock.

    The lock goes with its process, on whatever machine that is; a number of a process
    may be another's by now.
    """
    pattern = re.compile(rf"\.{re.escape(out.name)}\.\w+\.partial")
    for path in out.parent.iterdir():
        if not pattern.fullmatch(path.name):
            continue
        with suppress(Timeout, OSError), FileLock(path / "lock", timeout=0):
            shutil.rmtree(path, ignore_errors=True)
