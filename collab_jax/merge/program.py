"""A transform compiled leaf by leaf: the programs that every driver runs.

Shapes: N experts, S the shape of a leaf.
"""

import functools
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.merge import noise
from collab_jax.merge.pieces import Wanted, piecewise
from collab_jax.merge.stack import (
    Facts,
    Schedule,
    Shape,
    Summary,
    Transform,
    combine,
    stack_leaf,
)


class Leaf(NamedTuple):
    """What a driver knows of a leaf when it is merged."""

    name: str  # canonical: the checkpoint's
    base: Any  # [*S], or None to merge without a base
    experts: tuple[Any, ...]  # N of [*S]
    weights: tuple[Any, ...]  # N of [] or [*S]
    key: jax.Array  # [] typed key of the whole merge


class Answer(NamedTuple):
    """What a piece of a leaf gave: the result, or a part of a sum that is wanted."""

    result: Any = None  # the merged piece, or the summary of the survey
    summary: Any = None  # what the piece adds to the sum, and what settling it needs
    operands: tuple = ()
    settle: Callable | None = None
    # from the leaf's shape to the entries that the host settles at once: `on_host`
    unit: Callable[[Shape], int] | None = None


class Programs(NamedTuple):
    """A transform compiled leaf by leaf; what every driver runs."""

    # (Leaf, facts, type of the result or None: the base's) -> the merged leaf
    merge: Callable[..., jax.Array]
    # (i, Leaf, facts) -> the summary of entry i of the survey
    ask: Callable[..., Summary]
    # (i, Leaf of a piece, shape of the leaf, place, facts, known, type) -> `Answer` of
    # entry i of the survey, or of the merge for i = None
    piece: Callable[..., Answer]
    # (leaves of one case and shape, facts, type) -> the merged leaves, `[K, *S]`
    batch: Callable[..., jax.Array]
    # (name, shape) -> equal for leaves that a batch may hold together; None: never
    kind: Callable[[str, Shape], Hashable]


@functools.lru_cache(maxsize=128)
def programs(transform: Transform) -> Programs:
    """The compiled programs of a transform; leaves of one case and shape share one.

    Args:
      transform: what edits the stacks.

    >>> from collab_jax.merge.stack import chain
    >>> one, key = jnp.ones(2), jax.random.key(0)
    >>> leaf = Leaf("a", None, (one, one), (0.5, 1.0), key)
    >>> programs(chain()).merge(leaf, ()).tolist()
    [1.5, 1.5]
    """
    named: dict[Hashable, str] = {}

    def kind(name: str, shape: Shape) -> Hashable:
        return None if transform.case is None else (shape, transform.case(name, shape))

    def representative(name: str, shape: Shape, whole: bool) -> str:
        if transform.case is None:
            return name
        # pieces of all leaves have the same few shapes
        key = shape if whole else None, transform.case(name, shape)
        return named.setdefault(key, name)

    def arguments(leaf: Leaf, facts: Facts, shape: Shape | None = None):
        whole = shape is None
        shape = jnp.shape(leaf.experts[0]) if shape is None else shape
        own = tuple(
            fact.at(leaf.name, shape) if isinstance(fact, Schedule) else fact
            for fact in facts
        )
        place = np.uint32(zlib.crc32(leaf.name.encode()))
        return (*leaf[1:], place, own), representative(leaf.name, shape, whole)

    def stack(base, experts, weights, key, place):
        return stack_leaf(base, experts, weights, noise.fold_in(key, place))

    @functools.partial(jax.jit, static_argnames=("name", "dtype"))
    def merge(base, experts, weights, key, place, facts, name, dtype):
        made = stack(base, experts, weights, key, place)
        merged = combine(transform.apply(made, name, facts))
        return merged.astype(dtype or (experts[0] if base is None else base).dtype)

    @functools.partial(jax.jit, static_argnames=("name", "i"))
    def ask(base, experts, weights, key, place, facts, name, i):
        made = stack(base, experts, weights, key, place)
        return transform.survey[i].ask(made, name, facts)

    settles: dict[Hashable, Wanted] = {}

    @functools.partial(jax.jit, static_argnames=("name", "dtype", "i"))
    def piece(base, experts, weights, key, hashed, facts, place, known, name, dtype, i):
        made = stack(base, experts, weights, key, hashed)
        try:
            with piecewise(known, place):
                if i is not None:
                    return transform.survey[i].ask(made, name, facts), None, ()
                merged = combine(transform.apply(made, name, facts))
        except Wanted as wanted:
            summary, operands = wanted.summary, wanted.operands
            wanted.summary, wanted.operands = None, ()  # they are tracers
            settles[name, i, jax.tree.structure(known)] = wanted
            return None, summary, operands
        like = experts[0] if base is None else base
        return merged.astype(dtype or like.dtype), None, ()

    @functools.partial(jax.jit, static_argnames=("name", "dtype", "axes"))
    def batch(base, experts, weights, key, places, facts, name, dtype, axes):
        def one(base, experts, weights, place, facts):
            return merge(base, experts, weights, key, place, facts, name, dtype)

        return jax.vmap(one, (0, 0, 0, 0, axes))(base, experts, weights, places, facts)

    def run_batch(leaves: Sequence[Leaf], facts: Facts, dtype: Any = None):
        rows = [arguments(leaf, facts) for leaf in leaves]
        bases, experts, weights, _, places, own = zip(
            *(args for args, _ in rows), strict=True
        )
        base = None if bases[0] is None else np.stack(bases)
        columns = tuple(np.stack(column) for column in zip(*experts, strict=True))
        shares = tuple(np.array(column) for column in zip(*weights, strict=True))
        axes = tuple(0 if isinstance(fact, Schedule) else None for fact in facts)
        told = tuple(
            jax.tree.map(lambda *row: np.stack(row), *column)
            if axis == 0
            else column[0]
            for axis, column in zip(axes, zip(*own, strict=True), strict=True)
        )
        args = base, columns, shares, leaves[0].key, np.array(places), told
        return batch(*args, name=rows[0][1], dtype=dtype, axes=axes)

    def run_merge(leaf: Leaf, facts: Facts, dtype: Any = None):
        args, name = arguments(leaf, facts)
        return merge(*args, name=name, dtype=dtype)

    def run_ask(i: int, leaf: Leaf, facts: Facts):
        args, name = arguments(leaf, facts)
        return ask(*args, name=name, i=i)

    def run_piece(i, leaf, shape, place, facts, known, dtype=None):
        args, name = arguments(leaf, facts, shape)
        given = piece(*args, place, known, name=name, dtype=dtype, i=i)
        result, summary, operands = given
        asked = name, i, jax.tree.structure(known)  # None in it chooses a program
        wanted = settles.get(asked) if result is None else None
        if wanted is None:
            return Answer(result)
        return Answer(None, summary, operands, wanted.settle, wanted.unit)

    return Programs(run_merge, run_ask, run_piece, run_batch, kind)
