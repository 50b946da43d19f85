"""What tells before a merge whether it can work: how experts moved, and how they agree.

All numbers follow from sums over entries, so that they add up over blocks, tensors and
layers: one pass over the files, in the memory of a block. NumPy on the host, because
the disk is the limit and nothing has to be compiled for it.

Shapes: N experts, M entries, S the shape of a tensor; delta_n is expert minus base.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

TOP = 0.2  # share of the entries whose overlap is counted
LARGE = 0.005  # |delta| up to which DARE is known to work, arXiv 2311.03099
BLOCK = 8192  # entries; a few such arrays stay in the cache of a core
_SAMPLE = 1 << 17  # entries that decide where the largest begin


class Sums(NamedTuple):
    """Sums over entries; those of two tensors add up field by field."""

    size: Any  # [] entries
    gram: Any  # [N+1, N+1] products of the base and the deltas, in this order
    changed: Any  # [N] entries with a delta
    large: Any  # [N] entries with |delta| > LARGE
    both: Any  # [N, N] entries where two have a delta
    against: Any  # [N, N] of these, where the signs differ
    both_mass: Any  # [N, N] |delta_i| + |delta_j| over `both`
    against_mass: Any  # [N, N] the same over `against`
    active: Any  # [4] entries with two deltas or more, of these with both signs; and
    # the sums over both of sum_n |delta_n|
    mass: Any  # [2] sums of sum_n |delta_n| and of |sum_n delta_n|
    top: Any  # [N, N] entries among the largest of two experts; of one: the diagonal


class Statistics(NamedTuple):
    """What `statistics` makes of the sums; NaN where nothing can be said."""

    norm: np.ndarray  # [N] |delta_n|
    relative: np.ndarray  # [N] |delta_n| / |base|
    cosine: np.ndarray  # [N, N] of the deltas
    weight_cosine: np.ndarray  # [N+1, N+1] of the weights, the base first
    changed: np.ndarray  # [N] share of the entries with a delta
    large: np.ndarray  # [N] share of the changed with |delta| > LARGE
    conflict: float  # share of entries with both signs among those with two deltas
    weighted: float  # the same, entries weighted by sum_n |delta_n|
    cancelled: float  # 1 - |sum delta|_1 / sum |delta|_1
    pair_conflict: np.ndarray  # [N, N] `conflict` of two
    pair_weighted: np.ndarray  # [N, N] `weighted` of two
    overlap: np.ndarray  # [N, N] share of the smaller top that lies in the other
    chance: np.ndarray  # [N, N] what `overlap` would be of independent experts


class Rank(NamedTuple):
    """How many directions a matrix has."""

    effective: float  # exp of the entropy of the singular values
    stable: float  # |A|_F^2 / |A|_2^2


class Conflict(NamedTuple):
    """How much the signs of deltas disagree."""

    counted: float
    weighted: float
    cancelled: float


def working(dtype: Any) -> np.dtype:
    """The precision that entries of a type are compared in: float32 or float64.

    >>> working(np.float16).name
    'float32'
    """
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def sums(base: Any, experts: Sequence[Any], cuts: Sequence[float]) -> Sums:
    """The sums of one tensor, block by block.

    Args:
      base: `[*S]`, of any floating type.
      experts: N of `[*S]`.
      cuts: N, the least magnitude of a delta among the largest, see `cut`.

    >>> found = sums(np.zeros(3), [np.float64([1, 0, -2])], [1.5])
    >>> found.gram[1, 1].item(), found.changed.tolist(), found.top.tolist()
    (5.0, [2], [[1]])
    """
    flat = [np.asarray(x).reshape(-1) for x in (base, *experts)]
    dtype = max((working(x.dtype) for x in flat), key=lambda d: d.itemsize)
    total = zeros(len(experts))
    # zero is never among the largest; what is not finite stays in the sums to be seen
    least = [max(float(c), np.finfo(dtype).smallest_subnormal) for c in cuts]
    with np.errstate(all="ignore"):
        for start in range(0, flat[0].size, BLOCK):
            first, *rest = (x[start : start + BLOCK].astype(dtype) for x in flat)
            for x in rest:
                x -= first
            _add_block(total, first, rest, least)
    return total._replace(size=np.int64(flat[0].size))


def zeros(count: int) -> Sums:
    """The sums of no entries.

    >>> zeros(2).gram.shape
    (3, 3)
    """
    n, counts = count, np.int64
    return Sums(
        counts(0), np.zeros((n + 1, n + 1)), np.zeros(n, counts), np.zeros(n, counts),
        np.zeros((n, n), counts), np.zeros((n, n), counts), np.zeros((n, n)),
        np.zeros((n, n)), np.zeros(4), np.zeros(2), np.zeros((n, n), counts),
    )  # fmt: skip


def add(one: Sums, two: Sums) -> Sums:
    """The sums of two tensors together.

    >>> add(zeros(1)._replace(size=2), zeros(1)._replace(size=3)).size
    5
    """
    return Sums(*(a + b for a, b in zip(one, two, strict=True)))


def _add_block(
    total: Sums, base: np.ndarray, deltas: list[np.ndarray], least: list[float]
) -> None:
    rows, count = [base, *deltas], len(deltas)
    for i, a in enumerate(rows):
        for j in range(i + 1):
            total.gram[i, j] += np.dot(a, rows[j])
            total.gram[j, i] = total.gram[i, j]
    sizes = [np.abs(x) for x in deltas]
    moved = [x != 0 for x in deltas]
    tops = [x >= c for x, c in zip(sizes, least, strict=True)]
    for i in range(count):
        total.changed[i] += np.count_nonzero(moved[i])
        total.large[i] += np.count_nonzero(sizes[i] > LARGE)
        total.top[i, i] += np.count_nonzero(tops[i])
    if count < 2:
        total.mass[:] += sizes[0].sum(dtype=np.float64)
        return
    up = [x > 0 for x in deltas]
    for i in range(count):
        for j in range(i):
            both = moved[i] & moved[j]
            against = both & (up[i] ^ up[j])
            mass = sizes[i] + sizes[j]
            for field, value in (
                (total.both, np.count_nonzero(both)),
                (total.against, np.count_nonzero(against)),
                (total.both_mass, np.dot(mass, both.astype(mass.dtype))),
                (total.against_mass, np.dot(mass, against.astype(mass.dtype))),
                (total.top, np.count_nonzero(tops[i] & tops[j])),
            ):
                field[i, j] += value
                field[j, i] += value
    if count == 2:
        parts = both, against
    else:
        mass = sum(sizes)
        several = sum(x.view(np.int8) for x in moved) > 1
        rise, fall = up[0], moved[0] & ~up[0]
        for mask, sign in zip(moved[1:], up[1:], strict=True):
            rise, fall = rise | sign, fall | (mask & ~sign)
        parts = several, rise & fall
    for k, part in enumerate(parts):
        total.active[k] += np.count_nonzero(part)
        total.active[2 + k] += np.dot(mass, part.astype(mass.dtype))
    total.mass[0] += mass.sum(dtype=np.float64)
    total.mass[1] += np.abs(sum(deltas)).sum(dtype=np.float64)


def cut(base: Any, expert: Any, share: float = TOP) -> float:
    """The least magnitude among a share of a delta's entries, the largest ones.

    Decided by at most 2 ** 17 entries, evenly spread: the share is then met to a few
    thousandths; smaller tensors are met exactly, up to ties.

    Args:
      base: `[*S]`.
      expert: `[*S]`.
      share: in (0, 1].

    >>> cut(np.zeros(5), np.float64([1, 5, 2, 4, 3]), 0.4)
    4.0
    """
    base, expert = np.asarray(base), np.asarray(expert)
    step = math.ceil(max(1, base.size) / _SAMPLE)
    while step > 1 and base.ndim and math.gcd(step, base.shape[-1]) > 1:
        step += 1  # so that all columns are met
    dtype = working(np.promote_types(base.dtype, expert.dtype))
    with np.errstate(all="ignore"):
        sizes = expert.reshape(-1)[::step].astype(dtype)
        sizes -= base.reshape(-1)[::step].astype(dtype)
        np.abs(sizes, out=sizes)
    if not sizes.size:
        return 0.0
    place = sizes.size - max(1, int(share * sizes.size))
    return float(np.partition(sizes, place)[place])


def statistics(total: Sums) -> Statistics:
    """Norms, cosines, conflicts and overlaps from the sums of one or many tensors.

        relative_n  = |delta_n| / |base|
        cosine_ij   = delta_i . delta_j / (|delta_i| |delta_j|)
        conflict    = #{both signs} / #{two deltas or more}
        cancelled   = 1 - sum |sum_n delta_n| / sum sum_n |delta_n|
        overlap_ij  = #(top_i and top_j) / min(#top_i, #top_j)

    Args:
      total: of `sums`, added up.

    >>> base, one, two = np.ones(2), np.float64([2, 1]), np.float64([1, 3])
    >>> found = statistics(sums(base, [one, two], [1, 1]))
    >>> found.cosine.tolist(), float(found.relative[0].round(4))
    ([[1.0, 0.0], [0.0, 1.0]], 0.7071)
    """
    with np.errstate(all="ignore"):
        squares = np.diag(total.gram)
        lengths = np.sqrt(squares)
        weights = total.gram.copy()  # products of the weights: base, base + delta_n
        weights[1:, 1:] += total.gram[0, 0] + total.gram[:1, 1:] + total.gram[1:, :1]
        weights[0, 1:] += total.gram[0, 0]
        weights[1:, 0] += total.gram[0, 0]
        tops = np.diag(total.top)
        fewer = np.minimum(tops[:, None], tops)
        return Statistics(
            lengths[1:],
            lengths[1:] / lengths[0],
            _cosines(total.gram)[1:, 1:],
            _cosines(weights),
            total.changed / np.float64(total.size),
            total.large / np.asarray(total.changed, np.float64),
            _over(total.active[1], total.active[0]),
            _over(total.active[3], total.active[2]),
            1 - _over(total.mass[1], total.mass[0]),
            total.against / np.asarray(total.both, np.float64),
            total.against_mass / total.both_mass,
            total.top / np.asarray(fewer, np.float64),
            np.maximum(tops[:, None], tops) / np.float64(total.size),
        )


def _cosines(gram: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.diag(gram))
    return np.clip(gram / (lengths[:, None] * lengths), -1, 1)


def _over(a: Any, b: Any) -> float:
    return float(a / b) if b else math.nan


def sign_conflict(deltas: Sequence[Any]) -> Conflict:
    """How much the signs of deltas disagree: entries, magnitude, what a sum loses.

    An entry counts where two deltas or more are not zero. Independent deltas of two
    experts give one half.

    Args:
      deltas: N of `[*S]`.

    Source: the conflict that arXiv 2306.01708 elects signs against.

    >>> sign_conflict([np.float64([1, 1, 0]), np.float64([-3, 1, 1])])
    Conflict(counted=0.5, weighted=0.66..., cancelled=0.28...)
    """
    found = statistics(sums(np.zeros_like(deltas[0]), deltas, [0.0] * len(deltas)))
    return Conflict(found.conflict, found.weighted, found.cancelled)


def overlap(deltas: Sequence[Any], share: float = TOP) -> np.ndarray:
    """Which share of an expert's largest entries is also among another's, `[N, N]`.

    Entries without a delta are never among the largest; what ties with the last is.
    The smaller of two sets is the whole; independent experts overlap by `share`.

    Args:
      deltas: N of `[*S]`.
      share: of the entries.

    >>> overlap([np.float64([5, 4, 1, 1]), np.float64([5, 1, 4, 1])], 0.5).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    zero = np.zeros_like(deltas[0])
    found = sums(zero, deltas, [cut(zero, delta, share) for delta in deltas])
    return statistics(found).overlap


def smaller_gram(base: Any, expert: Any, entries: int = 1 << 20) -> np.ndarray:
    """Products of a delta's columns or rows, whichever are fewer, `[min(S), min(S)]`.

    Args:
      base: `[R, C]`.
      expert: `[R, C]`.
      entries: that are worked on at a time.

    >>> smaller_gram(np.zeros((1, 3)), np.ones((1, 3))).tolist()
    [[3.0]]
    """
    base, expert = np.asarray(base), np.asarray(expert)
    if base.shape[0] < base.shape[1]:
        base, expert = base.T, expert.T
    dtype = working(np.promote_types(base.dtype, expert.dtype))
    found: np.ndarray = np.zeros((base.shape[1], base.shape[1]), dtype)
    step = max(1, entries // max(1, base.shape[1]))
    for start in range(0, base.shape[0], step):
        block = expert[start : start + step].astype(dtype)
        block -= base[start : start + step].astype(dtype)
        found += block.T @ block
    return found


def effective_rank(gram: Any) -> Rank:
    """The effective and the stable rank of a matrix A, from A^T A.

        p_i = s_i / sum s,  effective = exp(-sum p_i log p_i),  stable = sum s^2 / s_1^2

    Singular values that are below the rounding of the Gram matrix count as zero:
    s_i^2 <= m eps s_1^2 for an `[m, m]` matrix.

    Args:
      gram: `[m, m]`, of `smaller_gram`.

    Returns:
      Both are 0 for a matrix of zeros.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    >>> effective_rank(np.diag([4.0, 4.0, 0.0]))
    Rank(effective=2.0, stable=2.0)
    """
    squares = np.linalg.eigvalsh(gram)
    most = squares.max(initial=0)
    if not most > 0:
        return Rank(0.0, 0.0)
    floor = len(squares) * np.finfo(squares.dtype).eps * most
    squares = squares[squares > floor].astype(np.float64)
    shares = np.sqrt(squares) / np.sqrt(squares).sum()
    entropy = -(shares * np.log(shares)).sum()
    return Rank(float(np.exp(entropy)), float(squares.sum() / squares.max()))
