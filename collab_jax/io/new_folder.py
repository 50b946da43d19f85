"""A folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, to be filled, which then takes its place.

    Args:
      folder: must not exist, or be empty; what lies above it is made.

    Raises:
      ValueError: for a folder that holds something.

    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> with new_folder(folder) as partial:
    ...     _, there = (partial / "a").write_text("b"), folder.exists()
    >>> there, (folder / "a").read_text()
    (False, 'b')
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: a model is saved to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
