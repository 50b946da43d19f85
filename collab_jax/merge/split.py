"""Running the programs of a flat transform piece by piece, on arrays of the host.

Pieces have one of a few sizes, the last is filled with zeros: so every leaf of every
model runs the same few programs, which are compiled once and stay in the cache.

Shapes: N experts, M entries of a leaf.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax.merge.pieces import MOST, Place, add
from collab_jax.merge.program import Leaf, Programs
from collab_jax.merge.stack import Facts

SIZES = 1 << 20, 1 << 17, 1 << 14, 1 << 10  # entries


class Piece(NamedTuple):
    """A stretch of a flattened leaf."""

    start: int
    end: int
    size: int  # entries with the zeros behind them


def cut(count: int) -> list[Piece]:
    """The pieces of a leaf of M entries, the large ones first.

    >>> [tuple(piece) for piece in cut((1 << 20) + 5)]
    [(0, 1048576, 1048576), (1048576, 1048581, 1024)]
    """
    pieces: list[Piece] = []
    start, sizes = 0, list(SIZES)
    while math.ceil(count / sizes[0]) > MOST - 64:
        sizes.insert(0, 2 * sizes[0])
    while start < count:
        left = count - start
        # a size that leaves less than a quarter of it empty, or the smallest
        size = next((s for s in sizes if left >= s - s // 4), sizes[-1])
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
    while True:
        total, answer = None, None
        for number, piece in enumerate(pieces):
            part = leaf._replace(
                base=None if base is None else _take(base, piece),
                experts=tuple(_take(expert, piece) for expert in experts),
            )
            place = Place(np.uint32(piece.start), np.int32(number))
            answer = programs.piece(i, part, shape, place, facts, known, dtype)
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
        operands = jax.tree.map(np.asarray, answer.operands)
        known = (*known, answer.settle(total, *operands))


def _take(array: np.ndarray, piece: Piece) -> np.ndarray:
    if array.size == piece.size:
        return array
    values = array[piece.start : piece.end]
    if len(values) == piece.size:
        return values
    filled = np.zeros(piece.size, array.dtype)
    filled[: len(values)] = values
    return filled
