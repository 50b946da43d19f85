"""Running the programs of a flat transform piece by piece, on arrays of the host.

Pieces have one of at most three sizes, the last is filled with zeros: so all leaves run
the same few programs, which are compiled once and stay in the cache.

Shapes: N experts, M entries of a leaf.
"""

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax.merge.pieces import LANES, Place, Spread, add
from collab_jax.merge.program import Answer, Leaf, Programs
from collab_jax.merge.stack import Facts

SIZES = 1 << 20, 1 << 17, 1 << 12  # entries
CALL = 1 << 15  # entries that take as long as calling a program
PROGRAM = 1 << 23  # entries that take as long as tracing and loading one
AHEAD = 2  # pieces of a large leaf that are computed at the same time
MANY = 8  # pieces of a large leaf
OWN = 4  # sizes of leaves that are tried as sizes of pieces


class Piece(NamedTuple):
    """A stretch of a flattened leaf."""

    start: int
    end: int
    size: int  # entries with the zeros behind them


def sizes(counts: Iterable[int]) -> tuple[int, ...]:
    """The sizes of pieces with which leaves of these many entries are done first.

    Every size is a program to load, for every phase of a method. Sizes of leaves are
    taken in place of the usual ones where that saves a tenth: nothing is then filled,
    for programs that only models of this shape have.

    >>> sizes([5 * 10**7] * 30 + [10**5] * 60 + [576] * 61), sizes([64, 64])
    ((1048576, 131072), (4096,))
    >>> sizes([49152 * 576] + [1536 * 576] * 90 + [576 * 576] * 60 + [192 * 576] * 60)
    (884736, 110592)
    """
    kinds = Counter(counts)

    def cost(chosen: tuple[int, ...]) -> int:
        work = (
            number * sum(piece.size + CALL for piece in cut(count, chosen))
            for count, number in kinds.items()
        )
        return sum(work) + len(chosen) * PROGRAM

    def best(sizes: Sequence[int]) -> tuple[int, ...]:
        counts = range(len(SIZES), 0, -1)
        return min(
            (chosen for n in counts for chosen in itertools.combinations(sizes, n)),
            key=cost,
        )

    fitting = [
        count
        for count in kinds
        if count % LANES == 0 and SIZES[-1] <= count <= SIZES[0]
    ]
    fitting.sort(key=lambda count: count * kinds[count], reverse=True)
    usual = best(SIZES)
    own = best(sorted({*SIZES, *fitting[:OWN]}, reverse=True))
    return own if cost(own) < 0.9 * cost(usual) else usual


def cut(count: int, sizes: Sequence[int] = SIZES) -> list[Piece]:
    """The pieces of a leaf of M entries, the large ones first.

    >>> [tuple(piece) for piece in cut((1 << 20) + 5)]
    [(0, 1048576, 1048576), (1048576, 1048581, 4096)]
    """
    pieces: list[Piece] = []
    start = 0
    while start < count:
        left = count - start
        size = min(sizes, key=lambda size: math.ceil(left / size) * (size + CALL))
        size = next(s for s in sizes if s <= max(size, left))  # the large ones first
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
    sizes: Sequence[int] | None = None,
) -> Any:
    """The merged leaf, or its summary for an entry of the survey, piece by piece.

    Args:
      programs: of a flat transform, or any for whole leaves.
      i: the entry of the survey; None for the merge.
      leaf: its arrays are those of NumPy, its weights numbers.
      facts: of the surveys before.
      dtype: of the result; None for the base's.
      whole: whether the leaf is one piece, in its own shape.
      sizes: of the pieces; None for all that there are.

    >>> from collab_jax.merge.program import programs
    >>> from collab_jax.merge.stack import chain
    >>> one = np.ones((2, 3), np.float32)
    >>> leaf = Leaf("a", None, (one, one), (0.5, 1.0), jax.random.key(0))
    >>> run(programs(chain()), None, leaf, ()).tolist()
    [[1.5, 1.5, 1.5], [1.5, 1.5, 1.5]]
    """
    shape = leaf.experts[0].shape
    count = math.prod(shape)
    pieces = [Piece(0, count, count)] if whole else cut(count, sizes or SIZES)
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
        total: Any = None
        answer: Answer | None = None
        for piece, answer in _each(call, pieces):
            if answer.unit is not None:
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
        if answer.unit is not None:
            known = (*known, _on_host(call, pieces, answer, leaf))
        else:
            operands = jax.tree.map(np.asarray, answer.operands)
            known = (*known, answer.settle(total, *operands))


def _each(
    call: Callable[[Piece], Answer], pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, Answer]]:
    """Pieces with their answers, in order; of a large leaf the next are begun."""
    if len(pieces) < MANY:
        for piece in pieces:
            yield piece, call(piece)
        return
    # the first alone: what it asks for may be another program
    yield pieces[0], call(pieces[0])
    wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]

    def begin(piece: Piece) -> Answer:
        with jax.enable_x64(wide):  # it is a thread's own
            return jax.block_until_ready(call(piece))

    with ThreadPoolExecutor(AHEAD, "pieces") as pool:
        begun: deque[tuple[Piece, Future[Answer]]] = deque()
        try:
            for piece in pieces[1:]:
                begun.append((piece, pool.submit(begin, piece)))
                if len(begun) > AHEAD:
                    done, answer = begun.popleft()
                    yield done, answer.result()
            while begun:
                done, answer = begun.popleft()
                yield done, answer.result()
        finally:
            for _, answer in begun:
                answer.cancel()


def _spread(x: Any) -> bool:
    return isinstance(x, Spread)


def _on_host(
    call: Callable[[Piece], Answer], pieces: list[Piece], known: Answer, leaf: Leaf
) -> list[Any]:
    """What the host makes of arrays of the leaf, of as many as there is room for.

    All that is held, with a copy of one array, is to be at most N + 3 arrays in the
    working precision. What does not fit is computed once more. Where the host can do
    with less than the leaf nothing is held but what it returns.
    """
    arrays, settle = known.summary, known.settle
    assert settle is not None
    assert known.unit is not None
    operands = jax.tree.map(np.asarray, known.operands)
    shape, total = leaf.experts[0].shape, pieces[-1].end
    unit = known.unit(shape)

    def stretches(rest: Sequence[Piece], first: Answer | None):
        begun = [(pieces[0], first)] if first else []
        for piece, answer in itertools.chain(begun, _each(call, rest)):
            count = piece.end - piece.start
            yield [np.asarray(x).reshape(-1)[:count] for x in answer.summary]

    if unit < total:

        def settled(n: int) -> Callable[[np.ndarray], Any]:
            return lambda units: settle(units, n, shape, *operands)

        rows = [_Rows(unit, total, settled(n)) for n in range(len(arrays))]
        for parts in stretches(pieces[1:], known):
            for row, part in zip(rows, parts, strict=True):
                row.add(part)
        return [row.found for row in rows]
    width = arrays[0].dtype.itemsize
    inputs = [x for x in (leaf.base, *leaf.experts) if x is not None]
    stored = sum(np.asarray(x).dtype.itemsize for x in inputs)
    room = ((len(leaf.experts) + 3) * width - stored) // width - 1
    first: Answer | None = known
    found: list[Any] = []
    for start in range(0, len(arrays), max(1, room)):
        numbers = range(start, min(len(arrays), start + max(1, room)))
        leaves = [np.empty(total, arrays[n].dtype) for n in numbers]
        at = 0
        for parts in stretches(pieces[1:] if first else pieces, first):
            for n, values in zip(numbers, leaves, strict=True):
                values[at : at + len(parts[n])] = parts[n]
            at += len(parts[0])
        first = None
        del values, parts
        leaves.reverse()
        for n in numbers:
            # of a large leaf it is a lot of memory: nothing here holds it any longer
            found.append(settle(leaves.pop(), n, shape, *operands))
    return found


class _Rows:
    """What a leaf's units give, as its entries come in."""

    def __init__(self, unit: int, total: int, settle: Callable[[np.ndarray], Any]):
        self.unit, self.total, self.settle, self.at = unit, total, settle, 0
        self.left: np.ndarray | None = None  # the beginning of a unit
        self.found: Any = None

    def add(self, part: np.ndarray) -> None:
        """Settles the units that these entries complete."""
        if self.left is not None and len(self.left):
            part = np.concatenate([self.left, part])
        count = len(part) // self.unit * self.unit
        self.left = part[count:].copy()
        if count:
            self._put(self.settle(part[:count]), count)

    def _whole(self, x: Any) -> Any:
        return Spread(np.empty(self.total, x.values.dtype)) if _spread(x) else x

    def _put(self, made: Any, count: int) -> None:
        if self.found is None:
            self.found = jax.tree.map(self._whole, made, is_leaf=_spread)

        def put(whole, x):
            if _spread(x):
                whole.values[self.at : self.at + count] = x.values

        jax.tree.map(put, self.found, made, is_leaf=_spread)
        self.at += count


def _take(array: np.ndarray, piece: Piece) -> np.ndarray:
    if array.size == piece.size:
        return array
    values = array[piece.start : piece.end]
    if len(values) == piece.size:
        return values
    filled = np.zeros(piece.size, array.dtype)
    filled[: len(values)] = values
    return filled
