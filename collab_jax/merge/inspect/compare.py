"""Comparing models tensor by tensor, from their files, in bounded memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from collab_jax.io.layout import Checkpoint
from collab_jax.merge.inspect import diagnose
from collab_jax.merge.inspect.correspond import Matched
from collab_jax.merge.inspect.diagnose import Rank, Sums
from collab_jax.merge.stream import Budget

WIDEST = 4096  # columns and rows, whichever are fewer, of a matrix whose rank is told
_PER_ENTRY = 500  # operations that ranks may cost, for every entry that is read
_SPECTRUM = 12  # m ** 3 of an eigenvalue problem, in operations of a matrix product


class Bad(NamedTuple):
    """Numbers that are not finite."""

    model: int
    name: str  # of the tensor in that model
    entries: int
    at: tuple[int, ...]  # of the first
    value: float


class Compared(NamedTuple):
    """What was found in one tensor."""

    name: str
    shape: tuple[int, ...]
    sums: Sums | None  # None for a buffer
    ranks: tuple[Rank, ...] | None  # of the deltas; None where they were not computed
    bad: tuple[Bad, ...]
    equal: tuple[bool, ...]  # N: whether the expert has the base's very entries


def compare(
    checkpoints: Sequence[Checkpoint],
    matched: Sequence[Matched],
    ranks: Sequence[str] = (),
    *,
    workers: int = 2,
    advance: Callable[[], None] = lambda: None,
) -> list[Compared]:
    """Reads every tensor of every model once.

    Entries that are not finite in some model count as zero in all of them.

    Args:
      checkpoints: the base, then N experts.
      matched: tensors, of `collab_jax.merge.inspect.correspond`.
      ranks: names of matrices whose effective rank is wanted, see `choose`.
      workers: threads; each holds one tensor of all models.
      advance: called after every tensor.

    >>> from collab_jax.io.layout import Layout
    >>> x = {"a": np.float32([1, 2])}
    >>> layouts = {"a": Layout(np.dtype("float32"), (2,))}
    >>> one = Checkpoint(layouts, x.__getitem__)
    >>> two = Checkpoint(layouts, {"a": np.float32([1, 4])}.__getitem__)
    >>> found, = compare([one, two], [Matched("a", ("a", "a"), (2,), False)])
    >>> found.sums.gram.tolist(), found.equal
    ([[5.0, 4.0], [4.0, 4.0]], (False,))
    """
    wanted = set(ranks)

    def cost(tensor: Matched) -> int:
        stored = sum(
            c.layouts[own].dtype.itemsize
            for c, own in zip(checkpoints, tensor.own, strict=True)
        )
        return math.prod(tensor.shape) * stored

    budget = Budget(2 * max(map(cost, matched), default=0))

    def one(tensor: Matched) -> Compared:
        with budget.take(cost(tensor)):
            arrays = [
                c.read(own) for c, own in zip(checkpoints, tensor.own, strict=True)
            ]
            found = _one(tensor, arrays, tensor.name in wanted)
        advance()
        return found

    pool = ThreadPoolExecutor(workers, "compare")
    try:
        return list(pool.map(one, matched))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one(tensor: Matched, arrays: list[np.ndarray], ranked: bool) -> Compared:
    base, *experts = arrays
    if tensor.buffer:
        same = tuple(bool(np.array_equal(base, x)) for x in experts)
        return Compared(tensor.name, tensor.shape, None, None, (), same)
    cuts = [diagnose.cut(base, x) for x in experts]
    found = diagnose.sums(base, experts, cuts)
    bad: tuple[Bad, ...] = ()
    if not np.isfinite(found.gram).all():
        # NaN and infinities do not leave a product, so that only here they are looked
        # for; the other reason is the overflow of finite numbers
        bad = tuple(b for n, x in enumerate(arrays) for b in _bad(n, tensor.own[n], x))
        fine = np.ones(tensor.shape, bool)
        for x in arrays:
            fine &= np.isfinite(x)
        base, *experts = (np.where(fine, x.astype(np.float64), 0) for x in arrays)
        cuts = [diagnose.cut(base, x) for x in experts]
        found = diagnose.sums(base, experts, cuts)
    ranks = None
    if ranked:
        grams = (diagnose.smaller_gram(base, x) for x in experts)
        ranks = tuple(diagnose.effective_rank(gram) for gram in grams)
    damaged = {b.model for b in bad}
    equal = tuple(
        not moved and n not in damaged and 0 not in damaged
        for n, moved in enumerate(found.changed, 1)
    )
    return Compared(tensor.name, tensor.shape, found, ranks, bad, equal)


def _bad(model: int, name: str, array: np.ndarray) -> list[Bad]:
    places = np.argwhere(~np.isfinite(array))
    if not len(places):
        return []
    at = tuple(int(i) for i in places[0])
    return [Bad(model, name, len(places), at, float(array[at]))]


def rank_work(shape: Sequence[int]) -> int:
    """Operations that the effective rank of one matrix costs.

    >>> rank_work((2, 3))
    120
    """
    small, large = sorted(shape)
    return 2 * small * small * large + _SPECTRUM * small**3


def choose(
    parts: Mapping[str, Sequence[Matched]], budget: float | None = None
) -> list[str]:
    """Matrices whose effective ranks are told: those of layers that are spread evenly.

    Ranks cost more than all else. So the middle layer is taken first, then those that
    halve the gaps, until their work is as much as the entries allow. Of a layer that is
    too large as a whole, the small matrices are taken.

    Args:
      parts: matrices by part of the model, layers in their order; parts of a single
        matrix (embeddings, heads) are the last to be taken.
      budget: operations for each expert; None: 500 for each entry of all matrices.

    Returns:
      Names. None has more than `WIDEST` columns and more than `WIDEST` rows.

    >>> up = {str(i): [Matched(str(i), (), (10, 10), False)] for i in range(4)}
    >>> choose(up, 3 * rank_work((10, 10)))
    ['2', '1', '3']
    """
    entries = sum(math.prod(m.shape) for group in parts.values() for m in group)
    left = _PER_ENTRY * entries if budget is None else budget
    layers = [group for group in parts.values() if len(group) > 1]
    single = [group for group in parts.values() if len(group) == 1]
    chosen: list[str] = []
    for groups in (layers, single):
        for i in _spread(len(groups)):
            able = [m for m in groups[i] if min(m.shape) <= WIDEST]
            fit, rest = [], left
            for tensor in sorted(able, key=lambda m: rank_work(m.shape)):
                if rank_work(tensor.shape) <= rest:
                    rest -= rank_work(tensor.shape)
                    fit.append(tensor.name)
            if len(fit) < len(able) and chosen:
                break  # half a layer would not compare with the whole ones
            chosen, left = chosen + fit, rest
    return chosen


def _spread(count: int) -> list[int]:
    """All of range(count), each prefix spread evenly: places of van der Corput."""
    order: dict[int, Any] = {}
    width = max(1, count.bit_length())
    for i in range(1, 1 << width):
        place = int(f"{i:0{width}b}"[::-1], 2) / (1 << width)
        order.setdefault(int(place * count), None)
    order.update(dict.fromkeys(range(count)))
    return list(order) if count else []
