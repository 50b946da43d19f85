"""A leaf in pieces: sums over the whole of it, from parts that see a piece at a time.

A part whose entries depend on each other only through sums over the leaf (a histogram,
a norm) is called flat: it works on any stretch of the flattened leaf, and asks for such
a sum by `over_leaf`. A driver that holds the whole leaf computes it on the spot. A
driver that streams pieces of a fixed size runs the part once for every sum that it asks
for, and adds the answers: so memory is bounded by the piece, and a few programs, the
same for every model, serve all shapes.
"""

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

MOST = 4096  # pieces of a leaf
_asked = threading.local()


class Wanted(Exception):
    """Raised through a part that asks for a sum which is not known yet."""

    def __init__(self, summary: Any, settle: Callable, operands: tuple):
        """What the piece adds to the sum, and what becomes of the sum."""
        self.summary, self.settle, self.operands = summary, settle, operands


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
    known = _asked.known
    if _asked.next == len(known):
        raise Wanted(summary, settle, operands)
    _asked.next += 1
    return known[_asked.next - 1]


class Place(NamedTuple):
    """Where a piece lies in its leaf."""

    start: Any = 0  # row-major position of its first entry
    number: Any = 0  # how many pieces lie before it, fewer than MOST


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


def on_host(
    compute: Callable[[Any], Any], otherwise: Callable[[Any], Any], array: Any
) -> Any:
    """What NumPy does faster than XLA on a CPU: a function of a whole leaf's array.

    A driver that streams whole leaves runs the part up to here, computes on the host,
    and runs it again with the result; under `jit`, sharded, and on accelerators XLA
    computes. (A callback from a running program would wait for threads that wait for
    callbacks.) A part that uses it is marked by `hosted` and is not flat.

    Args:
      compute: from an array of NumPy to one.
      otherwise: the same function of JAX.
      array: of the leaf.

    >>> on_host(sorted, jax.numpy.sort, jax.numpy.array([2, 1])).tolist()
    [1, 2]
    """
    if not in_pieces():
        return otherwise(array)
    return over_leaf((), lambda total, array: compute(array), array)


def hosted(part: Callable) -> Callable:
    """Marks a function of the stack alone that computes a step `on_host`.

    >>> hosted(lambda stack: stack).hosted
    True
    """
    part.hosted = True  # type: ignore[attr-defined]
    return part


def add(total: Any, summary: Any) -> Any:
    """Adds the summary of one more leaf; integers of NumPy, 64 bits wide, outside jit.

    Args:
      total: of the leaves before; None for the first.
      summary: of the next leaf.

    >>> add(add(None, (np.int32(1),)), (np.int32(2),))[0]
    np.int64(3)
    """

    def wide(leaf):
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        leaf = np.asarray(leaf)
        return leaf.astype(np.int64 if leaf.dtype.kind in "iu" else np.float64)

    summary = jax.tree.map(wide, summary)
    return summary if total is None else jax.tree.map(operator.add, total, summary)
