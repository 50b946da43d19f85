"""Arrays that take long to make, kept on disk under what they were made of."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from collab_jax.io import hub


def kept(
    name: str,
    made_of: Iterable[bytes],
    make: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Arrays from the cache; the first call makes them and keeps them there.

    Args:
      name: of the kind of arrays, and of what makes them, with a version in it.
      made_of: everything that the arrays depend on; its order counts.
      make: called where nothing is kept.

    Returns:
      What `make` returned, now or before.

    >>> from unittest import mock
    >>> with (tempfile.TemporaryDirectory() as folder,
    ...       mock.patch.dict(os.environ, COLLAB_JAX_CACHE=folder)):
    ...     one = kept("squares", [b"3"], lambda: {"x": np.arange(3) ** 2})
    ...     two = kept("squares", [b"3"], lambda: {})
    >>> two["x"].tolist()
    [0, 1, 4]
    """
    digest = hashlib.sha256()
    for part in made_of:  # with its length, so that parts do not run together
        digest.update(len(part).to_bytes(8, "little") + part)
    path = hub.cache() / "bridges" / f"{name}-{digest.hexdigest()[:16]}.npz"
    if not path.exists():
        arrays = {key: np.asarray(value) for key, value in make().items()}
        _write(path, arrays)
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    """All at once: another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
