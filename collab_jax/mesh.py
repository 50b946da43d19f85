"""Meshes, and tables that say which axis of which leaf lies on which mesh axis.

Sharding is data, outside of the mathematics: a table of (regular expression for the
path of a leaf, `PartitionSpec`), first match wins. The caller names the mesh axes;
nothing else in the library knows them. Under `jax.jit`, the compiler shards caches and
activations after the parameters and prompts that it is given.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from collab_jax import tree

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(**axes: int) -> Mesh:
    """A mesh over all devices, with named axes of these sizes (type Auto).

    Args:
      **axes: size of each axis, e.g. `data=2, model=4`; at most one may be -1, and
      takes
        what is left.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.

    >>> make_mesh(data=-1).axis_names
    ('data',)
    """
    devices = jax.device_count()
    sizes = dict(axes)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"a mesh of {axes} was asked for, and there are {devices} devices: the "
            "sizes must multiply to that number (one of them may be -1)"
        )
    shape, names = tuple(sizes.values()), tuple(sizes)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def tensor_parallel(axis: str) -> Rules:
    """The table of a decoder transformer split over one mesh axis, as Megatron does.

    Queries, keys, values and the first MLP matrices are split by columns, the matrices
    behind them by rows, experts by expert, embedding and head by vocabulary; norms are
    whole everywhere.

    Args:
      axis: name of the mesh axis.

    Source: arXiv 1909.08053.

    >>> tuple(spec("layers_0/mlp/up/kernel", tensor_parallel("model")))
    (None, 'model')
    """
    columns, rows = PartitionSpec(None, axis), PartitionSpec(axis, None)
    return (
        (r".*/attention/[qkv]/kernel", columns),
        (r".*/attention/[qkv]/bias", PartitionSpec(axis)),
        (r".*/attention/o/kernel", rows),
        (r".*/mlp/experts/.*", PartitionSpec(axis)),
        (r".*/mlp/(gate|up)/kernel", columns),
        (r".*/mlp/(gate|up)/bias", PartitionSpec(axis)),
        (r".*/mlp/down/kernel", rows),
        (r"embed/embedding", rows),
        (r"head/kernel", columns),
    )


def stacked(rules: Rules, axis: str | None = None) -> Rules:
    """The table for parameters with a leading member axis.

    Args:
      rules: the table of one member.
      axis: mesh axis that the members lie on; None keeps all members everywhere.

    >>> tuple(spec("norm/scale", stacked(tensor_parallel("model"), "member")))
    ('member',)
    """
    led = tuple((pattern, PartitionSpec(axis, *entry)) for pattern, entry in rules)
    return (*led, (".*", PartitionSpec(axis)))


def spec(path: str, rules: Rules) -> PartitionSpec:
    """The first entry of a table whose expression matches the whole path, or whole.

    Args:
      path: of a leaf, as in "layers_0/attention/q/kernel".
      rules: the table.

    >>> tuple(spec("norm/scale", tensor_parallel("model")))
    ()
    """
    for pattern, entry in rules:
        if re.fullmatch(pattern, path):
            return entry
    return PartitionSpec()


def placer(
    mesh: Mesh, rules: Rules
) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]:
    """What `load(sharding=...)` asks for each leaf, before it is read.

    Args:
      mesh: the devices.
      rules: the table.

    Returns:
      A function of (path as a tuple, shape) that returns the sharding of that leaf.

    Raises:
      ValueError: by that function, where a dimension cannot be split so.

    >>> place = placer(make_mesh(model=-1), tensor_parallel("model"))
    >>> tuple(place(("norm", "scale"), (8,)).spec)
    ()
    """

    def place(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        name = "/".join(path)
        entry = spec(name, rules)
        if len(entry) > len(shape):
            raise ValueError(f"{name} of shape {shape} cannot be split as {entry}")
        for size, axis in zip(shape, entry, strict=False):
            names = () if axis is None else (axis,) if isinstance(axis, str) else axis
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise ValueError(
                    f"{name} of shape {shape} cannot be split as {entry}: {size} is "
                    f"not a multiple of {parts}; give it a rule of its own in front"
                )
        return NamedSharding(mesh, entry)

    return place


def shardings(params: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every leaf, as a tree of the same structure.

    Args:
      params: a tree of arrays or abstract shapes.
      mesh: the devices.
      rules: the table.

    Raises:
      ValueError: where a dimension cannot be split as its rule says.

    >>> import jax.numpy as jnp
    >>> tuple(shardings({"norm": jnp.zeros(3)}, make_mesh(model=-1), ())["norm"].spec)
    ()
    """
    place = placer(mesh, rules)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(tuple(tree.path_string(path).split("/")), leaf.shape),
        params,
    )


def shard(params: Any, mesh: Mesh, rules: Rules) -> Any:
    """Parameters laid out over a mesh.

    Args:
      params: a tree of arrays.
      mesh: the devices.
      rules: the table.

    Raises:
      ValueError: where a dimension cannot be split as its rule says.

    >>> import jax.numpy as jnp
    >>> shard({"norm": jnp.zeros(3)}, make_mesh(model=-1), ())["norm"].shape
    (3,)
    """
    return jax.device_put(params, shardings(params, mesh, rules))


def rows(mesh: Mesh, axis: str) -> NamedSharding:
    """The sharding of prompts, lengths and row keys over a data axis.

    Args:
      mesh: the devices.
      axis: mesh axis that the rows lie on.

    >>> tuple(rows(make_mesh(data=-1), "data").spec)
    ('data',)
    """
    return NamedSharding(mesh, PartitionSpec(axis))
