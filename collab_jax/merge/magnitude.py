"""The k-th largest magnitude, exactly and without sorting.

Magnitudes are compared as unsigned integers of the same order, their bit patterns.
Where a driver has the whole leaf on the host, NumPy selects, eight times faster than
XLA counts. Inside a program on CPUs a histogram of the upper digit finds the bin of the
k-th largest, one of the next digit inside that bin goes on; elsewhere, where scattered
additions are slow, the threshold is built bit by bit from counts. All are exact, so all
drivers and devices agree.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.merge import pieces, wide
from collab_jax.merge.wide import Wide

_BLOCK = 1 << 20  # entries that are compared at a time
FEW = 1 << 12  # entries, of which histograms would cost more than 31 passes
FEW_BITS = 2  # of a digit whose values are counted one by one


class Digit(NamedTuple):
    """Some bits of a pattern."""

    shift: int
    width: int


def digits(dtype) -> tuple[Digit, ...]:
    """How the pattern of a type is cut, the highest first; the sign is left out.

    >>> digits(jnp.float32)
    (Digit(shift=16, width=15), Digit(shift=0, width=16))
    """
    if jnp.dtype(dtype).itemsize == 8:
        return Digit(48, 15), Digit(32, 16), Digit(16, 16), Digit(0, 16)
    return Digit(16, 15), Digit(0, 16)


def pattern(x: jax.Array) -> jax.Array:
    """Magnitudes as unsigned integers of the same order, `[*S]`; NaN is above infinity.

    float64 becomes uint64, what is narrower uint32 by way of float32.

    >>> p = pattern(jnp.array([0.0, -2.0, 1.0]))
    >>> bool((p[0] < p[2]) & (p[2] < p[1]))
    True
    """
    if x.dtype != jnp.float64:
        x = x.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(
        jnp.abs(x), jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    )


def histogram(values: jax.Array, digit: Digit, prefix=None) -> jax.Array:
    """How often each value of a digit occurs, `[2 ** width]` int32.

    Args:
      values: of `pattern`, any shape.
      digit: which bits.
      prefix: count only values whose bits above the digit are these; None counts all.

    >>> counts = histogram(pattern(jnp.array([1.0, 1.0, 2.0])), digits(jnp.float32)[0])
    >>> int(counts.max())
    2
    """
    bins = 1 << digit.width
    index = ((values >> digit.shift) & (bins - 1)).astype(jnp.int32)
    if prefix is not None:
        inside = (values >> (digit.shift + digit.width)) == prefix
        index = jnp.where(inside, index, bins)  # out of bounds: dropped
    if digit.width <= FEW_BITS:
        return jnp.stack([(index == i).sum(dtype=jnp.int32) for i in range(bins)])
    return jnp.zeros(bins, jnp.int32).at[index].add(1, mode="drop")


def entries(counts):
    """How many entries a histogram has counted, of the kind of its counts.

    Args:
      counts: as of `at_rank`.

    >>> int(entries(jnp.array([5, 2, 1])))
    8
    """
    return wide.total(counts) if isinstance(counts, Wide) else counts.sum()


def at_rank(counts, rank):
    """The bin of the rank-th largest of a histogram, and its rank inside that bin.

    Args:
      counts: `[bins]` integers, of NumPy or JAX, or `Wide`; at most 2 ** 16 bins.
      rank: 1 is the largest; of the kind of the counts, or a Python integer.

    >>> [int(x) for x in at_rank(jnp.array([5, 2, 1]), 2)]
    [1, 1]
    """
    if isinstance(counts, np.ndarray):  # of a survey
        above = np.cumsum(counts[::-1])[::-1]  # that lie in it or higher
        found = ((above >= rank).sum() - 1).clip(0)
        return found, rank - (above[found] - counts[found])
    # bit by bit: XLA compiles, and on CPUs runs, a scan more slowly
    narrow = not isinstance(counts, Wide)
    size = counts.shape[0] if narrow else counts.low.shape[0]
    bins = jnp.arange(size, dtype=jnp.int32)
    width = (size - 1).bit_length()
    rank = rank if narrow else wide.wide(rank)

    def above_or_at(least):
        chosen = jax.tree.map(lambda part: jnp.where(bins >= least, part, 0), counts)
        return chosen.sum(dtype=counts.dtype) if narrow else wide.total(chosen)

    def set_bit(i, found):
        candidate = found | (1 << (width - 1 - i))
        above = above_or_at(candidate)
        enough = above >= rank if narrow else wide.at_least(above, rank)
        return jnp.where(enough, candidate, found)

    found = jax.lax.fori_loop(0, width, set_bit, jnp.int32(0))
    above = above_or_at(found + 1)
    return found, rank - above if narrow else wide.less(rank, above)


class Cut(NamedTuple):
    """Where the k largest of a leaf end."""

    least: Any  # [] unsigned, the pattern of the k-th largest
    tied: Any  # [] how many entries with this pattern are among the k; in pieces None
    last: Any = None  # [] uint32, in pieces: the position of the last of them


def cuts(xs: Sequence[jax.Array], ks: Sequence[Any]) -> list[Cut]:
    """Where the k largest magnitudes of each of several arrays end.

    Flat: the arrays may be pieces of leaves, see `collab_jax.merge.pieces`.

    Args:
      xs: arrays of one shape; a whole leaf has fewer than 2 ** 31 entries.
      ks: for each, a number or a tracer; at least 1, at most the number of entries.

    >>> cut, = cuts([jnp.array([1.0, -3.0, 2.0, 1.0])], [3])
    >>> bool(cut.least == pattern(jnp.array(1.0))), int(cut.tied)
    (True, 1)
    """
    ranks = [jnp.asarray(k, jnp.int32) for k in ks]
    if pieces.in_pieces():
        return _on_host(xs, ranks)
    values = [pattern(x) for x in xs]
    if values[0].size <= FEW:
        return [_by_bits(*each) for each in zip(values, ranks, strict=True)]

    def by_digits(value, rank):
        return tuple(_by_digits(value, rank))

    def by_bits(value, rank):
        return tuple(_by_bits(value, rank))

    return [
        Cut(*jax.lax.platform_dependent(value, rank, cpu=by_digits, default=by_bits))
        for value, rank in zip(values, ranks, strict=True)
    ]


def _on_host(xs: Sequence[jax.Array], ranks: Sequence[jax.Array]) -> list[Cut]:
    arrays = list({id(x): x for x in xs}.values())  # several ranks of one are one ask
    places = [next(i for i, a in enumerate(arrays) if a is x) for x in xs]

    def compute(leaf, n, shape, ranks):
        own = [rank for rank, place in zip(ranks, places, strict=True) if place == n]
        return _select(leaf, own)

    found = pieces.on_host([pattern(array) for array in arrays], compute, ranks)
    rows = [iter(each) for each in found]
    return [Cut(*next(rows[place])) for place in places]


def _select(leaf: np.ndarray, ranks: Sequence[Any]) -> list[tuple]:
    """For each rank `(least, None, last)` of `Cut`: a selection, and counts of ties."""
    values = leaf.copy()
    count, begin = len(values), 0
    # one by one: for several at once NumPy takes a way that is ten times slower
    for place in sorted({count - int(rank) for rank in ranks}):
        values[begin:].partition(place - begin)
        begin = place + 1  # what has found its place keeps it
    found = []
    for rank in ranks:
        kept = values[count - int(rank) :]
        least = kept[0].copy()
        among = int(np.count_nonzero(kept == least))
        found.append((least, None, _last(leaf, least, among)))
    return found


def _last(leaf: np.ndarray, least: Any, count: int) -> np.uint32:
    """The position of the `count`-th entry that is `least`."""
    for start in range(0, len(leaf), _BLOCK):
        tied = leaf[start : start + _BLOCK] == least
        here = np.count_nonzero(tied)
        if here >= count:
            return np.uint32(start + np.flatnonzero(tied)[count - 1])
        count -= here
    raise AssertionError("fewer entries are tied than were counted")


def _by_digits(values: jax.Array, rank: jax.Array) -> Cut:
    prefix: Any = None
    for digit in digits(values.dtype):
        counts = histogram(values, digit, prefix)
        place, rank = at_rank(counts, rank)
        place = place.astype(values.dtype)
        prefix = place if prefix is None else (prefix << digit.width) | place
    return Cut(prefix, rank)


def _by_bits(values: jax.Array, k: jax.Array) -> Cut:
    width = values.dtype.itemsize * 8 - 1

    def count(least):
        return (values >= least).sum(dtype=jnp.int32)

    def set_bit(i, found):
        bit = jnp.ones((), values.dtype) << (width - 1 - i).astype(values.dtype)
        return jnp.where(count(found | bit) >= k, found | bit, found)

    least = jax.lax.fori_loop(0, width, set_bit, jnp.zeros((), values.dtype))
    return Cut(least, k - count(least + 1))


def threshold(x: jax.Array, k) -> jax.Array:
    """The pattern of the k-th largest magnitude of a leaf, `[]` unsigned; see `cuts`.

    >>> bool(threshold(jnp.array([1.0, -3.0, 2.0]), 2) == pattern(jnp.array(2.0)))
    True
    """
    return cuts([x], [k])[0].least


def among_largest(x: jax.Array, k, ties: str = "all") -> jax.Array:
    """Which entries of a leaf are among the k of largest magnitude; see `largest`.

    >>> among_largest(jnp.array([3.0, 1.0, -2.0, 2.0]), 2).tolist()
    [True, False, True, True]
    """
    return largest([x], [k], ties)[0]


def largest(
    xs: Sequence[jax.Array], ks: Sequence[Any], ties: str = "all"
) -> list[jax.Array]:
    """Which entries are among the k of largest magnitude, for each of several arrays.

    Flat: the arrays may be pieces of leaves, see `collab_jax.merge.pieces`.

    Args:
      xs: arrays of one shape; a whole leaf has fewer than 2 ** 31 entries.
      ks: for each, at most the number of entries; none is kept for 0. May be tracers.
      ties: "all" keeps whatever is tied with the k-th; "first" keeps exactly k, of the
        tied those that come first.

    Returns:
      Masks, bool, of the arrays' shape.

    >>> x = jnp.array([3.0, 1.0, -2.0, 2.0])
    >>> largest([x], [2])[0].tolist()
    [True, False, True, True]
    >>> largest([x], [2], "first")[0].tolist()
    [True, False, True, False]
    """
    if ties not in ("all", "first"):
        raise ValueError(f"ties = {ties!r}: 'all' or 'first' is expected")
    ranks = [jnp.asarray(k, jnp.int32) for k in ks]
    found = cuts(xs, [jnp.maximum(rank, 1) for rank in ranks])
    masks = []
    for x, rank, cut in zip(xs, ranks, found, strict=True):
        values = pattern(x)
        least = jnp.asarray(cut.least, values.dtype)
        if ties == "all":
            mask = values >= least
        else:
            tied = values == least
            if cut.last is None:
                tied = first(tied, cut.tied)
            else:
                tied &= pieces.positions(x.shape) <= cut.last
            mask = (values > least) | tied
        masks.append(mask & (rank > 0))
    return masks


def first(mask: jax.Array, count, block: int = 4096) -> jax.Array:
    """The first `count` true entries of a mask in row-major order, `[*S]` bool.

    Args:
      mask: `[*S]` bool.
      count: how many; may be a tracer.
      block: entries of a vector that are counted together.

    >>> first(jnp.array([True, False, True, True]), 2).tolist()
    [True, False, True, False]
    """
    return mask & (_positions(mask.shape) <= _reached(mask, count, block)) & (count > 0)


def _reached(mask: jax.Array, count, block: int) -> jax.Array:
    """The position of the entry at which the count is reached.

    Axis by axis, so that a mask that lies on many devices stays where it is.
    """
    if mask.ndim == 0:
        return jnp.int32(0)
    if mask.ndim == 1:
        if mask.size <= block:
            return (jnp.cumsum(mask, dtype=jnp.int32) < count).sum(dtype=jnp.int32)
        mask = jnp.pad(mask, (0, -mask.size % block)).reshape(-1, block)
    ends = jnp.cumsum(mask.sum(range(1, mask.ndim), dtype=jnp.int32))
    row = jnp.minimum((ends < count).sum(dtype=jnp.int32), len(mask) - 1)
    before = jnp.where(row > 0, ends[jnp.maximum(row - 1, 0)], 0)
    stride = math.prod(mask.shape[1:])
    # not mask[row]: a row of a mask on many devices would be cut from all of it
    here = jnp.arange(len(mask)).reshape(-1, *(1,) * (mask.ndim - 1)) == row
    return row * stride + _reached((mask & here).any(0), count - before, block)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    found = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        stride = int(np.prod(shape[axis + 1 :], dtype=np.int64))
        found += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * stride
    return found


def kept(density, size: int):
    """`max(1, int(density * size))`, exact unless the density is a tracer.

    >>> kept(0.3, 10)
    3
    """
    if isinstance(density, jax.core.Tracer):
        count = jnp.floor(density * size).astype(jnp.int32)
        return jnp.clip(count, 1, max(1, size))
    return max(1, int(density * size))
