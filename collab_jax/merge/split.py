"""Running the programs of a flat transform piece by piece, on arrays of the host.

Pieces have one of three sizes, the last is filled with zeros: so every leaf of every
model runs the same few programs, which are compiled once and stay in the cache.

Shapes: N experts, M entries of a leaf.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax.merge.pieces import Place, Spread, add
from collab_jax.merge.program import Answer, Leaf, Programs
from collab_jax.merge.stack import Facts

SIZES = 1 << 20, 1 << 17, 1 << 12  # entries; each is a program to load for every phase
CALL = 1 << 15  # entries that take as long as calling a program


class Piece(NamedTuple):
    """A stretch of a flattened leaf."""

    start: int
    end: int
    size: int  # entries with the zeros behind them


def cut(count: int) -> list[Piece]:
    """The pieces of a leaf of M entries, the large ones first.

    >>> [tuple(piece) for piece in cut((1 << 20) + 5)]
    [(0, 1048576, 1048576), (1048576, 1048581, 4096)]
    """
    pieces: list[Piece] = []
    start = 0
    while start < count:
        left = count - start
        size = min(SIZES, key=lambda size: math.ceil(left / size) * (size + CALL))
        size = next(s for s in SIZES if s <= max(size, left))  # the large ones first
        pieces.append(Piece(start, min(count, start + size), size))
        start = pieces[-1].end
    return pieces


def run(
    programs: Programs,
    i: int | None,
    leaf: Leaf,
    facts: Facts,
    dtype: Any = None,
    whole: bool = False,
) -> Any:
    """The merged leaf, or its summary for an entry of the survey, piece by piece.

    Args:
      programs: of a flat transform, or any for whole leaves.
      i: the entry of the survey; None for the merge.
      leaf: its arrays are those of NumPy, its weights numbers.
      facts: of the surveys before.
      dtype: of the result; None for the base's.
      whole: whether the leaf is one piece, in its own shape.

    >>> from collab_jax.merge.program import programs
    >>> from collab_jax.merge.stack import chain
    >>> one = np.ones((2, 3), np.float32)
    >>> leaf = Leaf("a", None, (one, one), (0.5, 1.0), jax.random.key(0))
    >>> run(programs(chain()), None, leaf, ()).tolist()
    [[1.5, 1.5, 1.5], [1.5, 1.5, 1.5]]
    """
    shape = leaf.experts[0].shape
    count = math.prod(shape)
    pieces = [Piece(0, count, count)] if whole else cut(count)
    form = shape if whole else (count,)
    base = None if leaf.base is None else np.asarray(leaf.base).reshape(form)
    experts = [np.asarray(expert).reshape(form) for expert in leaf.experts]
    known: tuple = ()
    result: Any = None

    def call(piece: Piece) -> Answer:
        part = leaf._replace(
            base=None if base is None else _take(base, piece),
            experts=tuple(_take(expert, piece) for expert in experts),
        )
        own = jax.tree.map(
            lambda x: _take(x.values.reshape(form), piece) if _spread(x) else x,
            known,
            is_leaf=_spread,
        )
        return programs.piece(
            i, part, shape, Place(np.uint32(piece.start)), facts, own, dtype
        )

    while True:
        total, answer = None, None
        for piece in pieces:
            answer = call(piece)
            if answer.whole:
                break
            if answer.settle is not None:
                total = add(total, answer.summary)
            elif i is not None:
                total = add(total, answer.result)
            else:
                values = np.asarray(answer.result)
                result = np.empty(shape, values.dtype) if result is None else result
                own = result.reshape(-1)[piece.start : piece.end]
                own[:] = values.reshape(-1)[: len(own)]
        if answer is None:
            raise ValueError(f"tensor {leaf.name} has no entries: nothing to merge")
        if answer.settle is None:
            return result if i is None else total
        if answer.whole:
            known = (*known, _on_host(call, pieces, answer, leaf))
        else:
            operands = jax.tree.map(np.asarray, answer.operands)
            known = (*known, answer.settle(total, *operands))


def _spread(x: Any) -> bool:
    return isinstance(x, Spread)


def _on_host(
    call: Callable[[Piece], Answer], pieces: list[Piece], known: Answer, leaf: Leaf
) -> list[Any]:
    """What the host makes of arrays of the whole leaf, of as many as there is room for.

    All that is held, with a copy of one array, is to be at most N + 3 arrays in the
    working precision. What does not fit is computed once more.
    """
    arrays, settle = known.summary, known.settle
    assert settle is not None
    first: Answer | None = known
    width = arrays[0].dtype.itemsize
    inputs = [x for x in (leaf.base, *leaf.experts) if x is not None]
    stored = sum(np.asarray(x).dtype.itemsize for x in inputs)
    room = ((len(leaf.experts) + 3) * width - stored) // width - 1
    found: list[Any] = []
    for start in range(0, len(arrays), max(1, room)):
        numbers = range(start, min(len(arrays), start + max(1, room)))
        columns: list[list[np.ndarray]] = [[] for _ in numbers]
        for piece in pieces:
            answer = first if first and piece is pieces[0] else call(piece)
            for n, column in zip(numbers, columns, strict=True):
                values = np.asarray(answer.summary[n]).reshape(-1)
                column.append(values[: piece.end - piece.start])
        first = None
        for n, column in zip(numbers, columns, strict=True):
            operands = jax.tree.map(np.asarray, answer.operands)
            found.append(settle(column, n, leaf.experts[0].shape, *operands))
            column.clear()
    return found


def _take(array: np.ndarray, piece: Piece) -> np.ndarray:
    if array.size == piece.size:
        return array
    values = array[piece.start : piece.end]
    if len(values) == piece.size:
        return values
    filled = np.zeros(piece.size, array.dtype)
    filled[: len(values)] = values
    return filled
