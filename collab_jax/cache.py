"""Where the library keeps what it downloads and builds."""

import os
from pathlib import Path


def cache() -> Path:
    """The folder: `$COLLAB_JAX_CACHE`, or `~/.cache/collab_jax`.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, COLLAB_JAX_CACHE="~/models"):
    ...     cache() == Path.home() / "models"
    True
    """
    given = os.environ.get("COLLAB_JAX_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "collab_jax"
