"""Trees of arrays on disk by orbax, for training and for meshes.

Every device writes and reads its own part, so a tree larger than one device or one host
passes through. Orbax writes into a temporary folder and renames it when it is complete.
"""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as orbax

from collab_jax.tree import path_string, refuse_packed


def save_checkpoint(path: str | Path, tree: Any) -> None:
    """Writes a tree of arrays; the folder appears whole or not at all.

    Args:
      path: a folder that does not exist yet.
      tree: any pytree of arrays, sharded or not.

    Raises:
      ValueError: where there is something at `path` already, and for packed matrices.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> path = Path(tempfile.mkdtemp()) / "step-1"
    >>> save_checkpoint(path, {"w": jnp.arange(3)})
    >>> load_checkpoint(path)["w"].tolist()
    [0, 1, 2]
    """
    refuse_packed(tree, "saved")
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; a checkpoint is written to a new folder")
    orbax.save(path, tree)


def load_checkpoint(path: str | Path, like: Any = None) -> Any:
    """Reads a tree, straight into the shardings asked for.

    Args:
      path: written by `save_checkpoint`.
      like: a tree of arrays or `jax.ShapeDtypeStruct`, whose shapes must be the saved
        ones and whose shardings and types the result has; None for the first device and
        a tree of dicts and lists.

    Raises:
      FileNotFoundError: where there is no checkpoint.
      ValueError: where `like` has another structure or other shapes.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "step-1"
    >>> save_checkpoint(path, {"w": jax.numpy.arange(3)})
    >>> like = {"w": jax.ShapeDtypeStruct((3,), jax.numpy.float32)}
    >>> load_checkpoint(path, like)["w"].tolist()
    [0.0, 1.0, 2.0]
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        saved = orbax.metadata(path).metadata
    except (ValueError, orbax.errors.InvalidLayoutError, FileNotFoundError) as error:
        raise ValueError(f"{path} is no orbax checkpoint: {error}") from None
    here = SingleDeviceSharding(jax.devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if like is None:
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            saved,
        )
        return orbax.load(path, wanted)
    shapes, expected = _shapes(saved), _shapes(like)
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"{path} holds {name} as {shapes.get(name, 'nothing')}, expected was "
                f"{expected.get(name, 'nothing')}"
            )
    return orbax.load(path, jax.tree.map(placed, like))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): tuple(leaf.shape) for path, leaf in leaves}
