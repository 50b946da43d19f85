"""Meshes, and tables that say which axis of which leaf lies on which mesh axis.

Sharding is data, outside of the mathematics: a table of (regular expression for the
path of a leaf, `PartitionSpec`), first match wins. The caller names the mesh axes;
nothing else in the library knows them. Under `jax.jit`, the compiler shards caches and
activations after the parameters and prompts that it is given.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

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


def tensor_parallel(axis: str, keys: bool = True) -> Rules:
    """The table of a transformer split over one mesh axis, as Megatron does.

    Queries, keys, values and the first MLP matrices are split by columns, the matrices
    behind them by rows, experts inside like any MLP, embeddings and head by vocabulary;
    norms are whole everywhere. So a layer needs two sums over the devices, one behind
    attention and one behind the MLP. It is meant for decoders, encoders, translators,
    and adapters over them.

    Args:
      axis: name of the mesh axis.
      keys: whether keys and values are split too; they must not be where a model has
        fewer heads of them than there are devices, see `for_model`.

    Source: arXiv 1909.08053.

    >>> tuple(spec("layers_0/mlp/up/kernel", tensor_parallel("model")))
    (None, 'model')
    """
    columns, rows = PartitionSpec(None, axis), PartitionSpec(axis, None)
    read = r".*/(attention|cross)/" + ("[qkv]" if keys else "q")
    return (
        (f"{read}/kernel(/b)?", columns),
        (f"{read}/bias", PartitionSpec(axis)),
        (r".*/(attention|cross)/o/kernel(/a)?", rows),
        (r".*/mlp/experts/(gate|up)", PartitionSpec(None, None, axis)),
        (r".*/mlp/experts/down", PartitionSpec(None, axis, None)),
        (r".*/mlp/(gate|up)/kernel(/b)?", columns),
        (r".*/mlp/(gate|up)/bias", PartitionSpec(axis)),
        (r".*/mlp/down/kernel(/a)?", rows),
        (r"(text_)?embed/embedding", rows),
        (r"head/kernel", columns),
        (r"logit_bias", PartitionSpec(axis)),
    )


def for_model(config: Any, mesh: Mesh, axis: str) -> Rules:
    """`tensor_parallel` for a model: heads are never cut.

    Where a model has fewer heads of keys and values than the axis has devices, every
    device holds all of them. A head that lay on two devices would be put together again
    from the whole cache for every token.

    Args:
      config: what the model is made of; its `heads` and, if it has them, `kv_heads` are
        read.
      mesh: the devices.
      axis: name of the mesh axis.

    Raises:
      ValueError: where the heads of queries cannot be split evenly.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 64,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 16})
    >>> rules = for_model(config, make_mesh(model=-1), "model")
    >>> tuple(spec("layers_0/attention/k/kernel", rules))
    (None, 'model')
    """
    size, heads = mesh.shape[axis], config.heads
    if heads % size:
        raise ValueError(
            f"{heads} heads cannot be split over {size} devices of the axis {axis!r}: "
            "give the axis a number of devices that divides them"
        )
    return tensor_parallel(axis, getattr(config, "kv_heads", heads) % size == 0)


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
    return place(params, shardings(params, mesh, rules))


def place(arrays: Any, where: Any) -> Any:
    """Arrays that every process holds, laid out over the devices of all of them.

    Each process puts its own parts on its own devices, and sends nothing.

    Args:
      arrays: a tree of arrays, of NumPy or JAX, of the same values in every process.
      where: a sharding, or a tree of them, for all leaves or those below it.

    >>> import jax.numpy as jnp
    >>> devices = make_mesh(data=-1)
    >>> place([jnp.arange(8), jnp.ones((8, 2))], rows(devices, "data"))[1].shape
    (8, 2)
    """

    def put(sharding: Sharding, leaf: Any) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(sharding, jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: np.asarray(leaf[index])
        )

    def below(sharding: Sharding, tree: Any) -> Any:
        return jax.tree.map(functools.partial(put, sharding), tree)

    return jax.tree.map(below, where, arrays)


def rows(mesh: Mesh, axis: str) -> NamedSharding:
    """The sharding of prompts, lengths and row keys over a data axis.

    Args:
      mesh: the devices.
      axis: mesh axis that the rows lie on.

    >>> tuple(rows(make_mesh(data=-1), "data").spec)
    ('data',)
    """
    return NamedSharding(mesh, PartitionSpec(axis))


def by_rows(run: Callable[..., Any], mesh: Mesh, axis: str) -> Callable[..., Any]:
    """A program whose rows are worked on apart: each part of a mesh axis has its own.

    Rows never meet in any strategy here, but the compiler does not see that in all of
    them: where beams are gathered, it would gather the caches of all rows. Under this,
    nothing crosses the axis, and a part whose rows are done waits for nobody. Other
    axes of the mesh are split as the parameters are.

    Args:
      run: of (params, *arrays with a leading axis of rows), e.g. prompts, lengths and
        row keys, to a tree of such arrays. What is decided over a whole batch, such as
        a budget of drafts, is decided in each part.
      mesh: the devices.
      axis: mesh axis that the rows lie on.

    Returns:
      The program, to be jitted.

    Raises:
      ValueError: when called, where the rows cannot be split evenly, or a result has no
        axis of rows.

    >>> import jax.numpy as jnp
    >>> double = by_rows(lambda w, x: w * x, make_mesh(data=-1), "data")
    >>> jax.jit(double)(2.0, jnp.arange(8.0)).tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    """
    size = mesh.shape[axis]

    def split(params: Any, *arrays: Any) -> Any:
        for leaf in jax.tree.leaves(arrays):
            if leaf.ndim == 0 or leaf.shape[0] % size:
                raise ValueError(
                    f"an array of shape {leaf.shape} cannot be split by rows over "
                    f"{size} devices: a multiple of them is expected"
                )
        rows = PartitionSpec(axis)
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(PartitionSpec(), *[rows] * len(arrays)),
            out_specs=rows,
            axis_names={axis},
            check_vma=False,  # what loops carry has no rows in it at first
        )(params, *arrays)

    return split
