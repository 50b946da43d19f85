"""A leaf in pieces: sums over the whole of it, from parts that see a piece at a time.

A part whose entries depend on each other only through sums over the leaf (a histogram,
a norm) is called flat: it works on any stretch of the flattened leaf, and asks for such
a sum by `over_leaf`. A driver that holds the whole leaf computes it on the spot. A
driver that streams pieces of a fixed size runs the part once for every sum that it asks
for, and adds the answers: so memory is bounded by the piece, and a few programs, the
same for every model, serve all shapes. What NumPy does better than XLA on a CPU, and
for a whole leaf at once (selecting, sorting), such a driver does between two runs.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.merge import wide
from collab_jax.merge.wide import Wide

_asked = threading.local()
LANES = 1024  # of a sum; sizes of pieces are multiples


class Wanted(Exception):
    """Raised through a part that asks for a sum which is not known yet."""

    def __init__(
        self,
        summary: Any,
        settle: Callable,
        operands: tuple,
        unit: Callable[[tuple[int, ...]], int] | None = None,
    ):
        """What the piece adds to the sum, and what becomes of the sum.

        Where there is a `unit` the summary is a list of arrays with as many entries as
        the piece, and `settle` wants so many of a leaf's entries at once: `on_host`.
        """
        self.summary, self.settle, self.operands = summary, settle, operands
        self.unit = unit


class Spread(NamedTuple):
    """What the host found for every entry of a leaf: a piece is given its stretch."""

    values: np.ndarray  # [M]


def in_pieces() -> bool:
    """Whether the part at work sees a piece at a time.

    >>> in_pieces()
    False
    """
    return getattr(_asked, "known", None) is not None


def over_leaf(
    summary: Any, settle: Callable[..., Any] = lambda total: total, *operands: Any
) -> Any:
    """A sum over the whole leaf, and what follows from it: `settle(sum, *operands)`.

    Args:
      summary: a tree of arrays, of the piece at hand; zeros at the end of a leaf add
        nothing to it.
      settle: from the sum over all pieces to what is wanted; with arrays of NumPy, 64
        bits wide, where the leaf is streamed, and with those of JAX elsewhere.
      *operands: what `settle` needs beside the sum, equal for all pieces.

    Returns:
      What `settle` returns.

    >>> over_leaf(3, lambda total, factor: factor * total, 2)
    6
    """
    if not in_pieces():
        return settle(summary, *operands)
    return _known(Wanted(summary, settle, operands))


def _known(wanted: Wanted) -> Any:
    if _asked.next == len(_asked.known):
        raise wanted
    _asked.next += 1
    return _asked.known[_asked.next - 1]


class Place(NamedTuple):
    """Where a piece lies in its leaf."""

    start: Any = 0  # row-major position of its first entry


def place() -> Place:
    """Where the piece at hand lies; a whole leaf is one piece.

    >>> place().start
    0
    """
    return getattr(_asked, "place", Place())


@contextmanager
def piecewise(known: tuple, place: Place = Place()) -> Iterator[None]:
    """Inside, `over_leaf` returns these results in turn, and then raises `Wanted`.

    >>> with piecewise((5,)):
    ...     over_leaf(3)
    5
    """
    before = dict(vars(_asked))
    vars(_asked).update(known=known, next=0, place=place)
    try:
        yield
    finally:
        vars(_asked).clear()
        vars(_asked).update(before)


def flat(part: Callable) -> Callable:
    """Marks a function of the stack alone as flat, for `collab_jax.merge.stack.lift`.

    >>> flat(lambda stack: stack).flat
    True
    """
    part.flat = True  # type: ignore[attr-defined]
    return part


def positions(shape: tuple[int, ...]) -> jax.Array:
    """Row-major positions in the leaf, modulo 2 ** 32, `[*shape]` uint32.

    Args:
      shape: of the piece at hand.

    >>> positions((2, 2)).tolist()
    [[0, 1], [2, 3]]
    """
    found = jnp.full(shape, place().start, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        found += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return found


def summed(x: jax.Array) -> jax.Array:
    """The sum of entries that are dear to compute, such as those of a random mask.

    XLA:CPU computes what is summed inside the loop of the sum, and then one entry at a
    time: a mask costs four times as much as alone. A product with ones wants its
    operand in memory. Elsewhere it is the plain sum, which the compiler shards.

    Args:
      x: `[*S]`.

    >>> float(summed(jnp.ones((2, 3))))
    6.0
    """
    if not in_pieces() or x.ndim != 1 or x.size % LANES:
        return x.sum()
    ones = jnp.ones(LANES, x.dtype)
    return jnp.matmul(x.reshape(-1, LANES), ones, precision="highest").sum()


def on_host(
    arrays: Sequence[jax.Array],
    compute: Callable[..., Any],
    *operands: Any,
    unit: Callable[[tuple[int, ...]], int] = math.prod,
) -> list[Any]:
    """What NumPy computes from arrays of the whole leaf, faster than XLA on a CPU.

    Only for a part that is `in_pieces`; under `jit`, sharded, and on accelerators it
    computes with XLA. (A callback from a running program would wait for threads that
    wait for callbacks.)

    Args:
      arrays: K arrays of the piece's shape.
      compute: (leaf, n, shape, *operands): a flat array of NumPy, array n of the leaf
        of that shape. It returns a tree of arrays; in it, `Spread` becomes the stretch
        of the piece at hand.
      *operands: equal for all pieces.
      unit: from the leaf's shape to the entries that `compute` has to see together. It
        then takes any number of such units in place of the leaf, and what it returns
        beside `Spread` is the same for all.

    Returns:
      K results.

    >>> in_pieces()  # or else: RuntimeError
    False
    """
    if not in_pieces():
        raise RuntimeError("on_host works in pieces only")
    return _known(Wanted(list(arrays), compute, operands, unit))


def hosted(part: Callable) -> Callable:
    """Marks a function of the stack alone that computes a step `on_host`.

    A driver then runs it so wherever it can, and has the memory ready.

    >>> hosted(lambda stack: stack).hosted
    True
    """
    part.hosted = True  # type: ignore[attr-defined]
    return part


def add(total: Any, summary: Any) -> Any:
    """Adds the summary of one more leaf; counts are never narrower than 64 bits.

    Outside of jit they are integers of NumPy, inside `Wide`.

    Args:
      total: of the leaves before; None for the first.
      summary: of the next leaf.

    >>> add(add(None, (np.int32(1),)), (np.int32(2),))[0]
    np.int64(3)
    """

    def widened(leaf):
        if isinstance(leaf, jax.core.Tracer):
            counts = jnp.issubdtype(leaf.dtype, jnp.integer)
            return wide.wide(leaf) if counts else leaf
        leaf = np.asarray(leaf)
        return leaf.astype(np.int64 if leaf.dtype.kind in "iu" else np.float64)

    def both(one, two):
        if isinstance(one, Wide) or isinstance(two, Wide):  # one may be of NumPy
            return wide.add(wide.wide(one), wide.wide(two))
        return one + two

    summary = jax.tree.map(widened, summary)
    if total is None:
        return summary
    return jax.tree.map(both, total, summary, is_leaf=lambda x: isinstance(x, Wide))
