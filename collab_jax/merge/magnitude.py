"""The k-th largest magnitude, exactly and without sorting.

Magnitudes are compared as unsigned integers of the same order, their bit patterns. On
CPUs a histogram of the upper digit finds the bin of the k-th largest, one of the next
digit inside that bin goes on; elsewhere, where scattered additions are slow, the
threshold is built bit by bit from counts. Both are exact, so all devices agree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
    values = values.reshape(-1)
    bins = 1 << digit.width
    index = ((values >> digit.shift) & (bins - 1)).astype(jnp.int32)
    if prefix is not None:
        inside = (values >> (digit.shift + digit.width)) == prefix
        index = jnp.where(inside, index, bins)  # out of bounds: dropped
    return jnp.zeros(bins, jnp.int32).at[index].add(1, mode="drop")


def at_rank(counts, rank):
    """The bin of the rank-th largest of a histogram, and its rank inside that bin.

    Args:
      counts: `[bins]` integers, of NumPy or JAX.
      rank: 1 is the largest.

    >>> [int(x) for x in at_rank(jnp.array([5, 2, 1]), 2)]
    [1, 1]
    """
    xp = np if isinstance(counts, np.ndarray) else jnp
    above = xp.cumsum(counts[::-1])[::-1]  # that lie in it or higher
    found = xp.maximum((above >= rank).sum() - 1, 0)
    return found, rank - (above[found] - counts[found])


def threshold(x: jax.Array, k) -> jax.Array:
    """The pattern of the k-th largest magnitude of a leaf, `[]` unsigned.

    Args:
      x: any shape, fewer than 2 ** 31 entries.
      k: at least 1, at most the number of entries; may be a tracer.

    >>> bool(threshold(jnp.array([1.0, -3.0, 2.0]), 2) == pattern(jnp.array(2.0)))
    True
    """
    values = pattern(x)
    k = jnp.asarray(k, jnp.int32)
    return jax.lax.platform_dependent(values, k, cpu=_by_digits, default=_by_bits)


def _by_digits(values: jax.Array, k: jax.Array) -> jax.Array:
    found, prefix = jnp.zeros((), values.dtype), None
    for digit in digits(values.dtype):
        place, k = at_rank(histogram(values, digit, prefix), k)
        prefix = place.astype(values.dtype)
        found |= prefix << digit.shift
        prefix = found >> digit.shift
    return found


def _by_bits(values: jax.Array, k: jax.Array) -> jax.Array:
    width = values.dtype.itemsize * 8 - 1

    def set_bit(i, found):
        bit = jnp.ones((), values.dtype) << (width - 1 - i).astype(values.dtype)
        count = (values >= (found | bit)).sum(dtype=jnp.int32)
        return jnp.where(count >= k, found | bit, found)

    return jax.lax.fori_loop(0, width, set_bit, jnp.zeros((), values.dtype))


def among_largest(x: jax.Array, k, ties: str = "all") -> jax.Array:
    """Which entries of a leaf are among the k of largest magnitude, `[*S]` bool.

    Args:
      x: any shape, fewer than 2 ** 31 entries.
      k: at most the number of entries; none is kept for 0. May be a tracer.
      ties: "all" keeps whatever is tied with the k-th; "first" keeps exactly k, of the
        tied those that come first.

    >>> x = jnp.array([3.0, 1.0, -2.0, 2.0])
    >>> among_largest(x, 2).tolist(), among_largest(x, 2, "first").tolist()
    ([True, False, True, True], [True, False, True, False])
    """
    if ties not in ("all", "first"):
        raise ValueError(f"ties = {ties!r}: 'all' or 'first' is expected")
    k = jnp.asarray(k, jnp.int32)
    values, least = pattern(x), threshold(x, jnp.maximum(k, 1))
    if ties == "all":
        return (values >= least) & (k > 0)
    more = values > least
    tied = values == least
    return more | first(tied, k - more.sum(dtype=jnp.int32))


def first(mask: jax.Array, count, block: int = 4096) -> jax.Array:
    """The first `count` true entries of a mask in row-major order, `[*S]` bool.

    Args:
      mask: `[*S]` bool.
      count: how many; may be a tracer.
      block: entries that are counted together, before one block is looked into.

    >>> first(jnp.array([True, False, True, True]), 2).tolist()
    [True, False, True, False]
    """
    size = mask.size
    flat = jnp.pad(mask.reshape(-1), (0, -size % block)).reshape(-1, block)
    ends = jnp.cumsum(flat.sum(-1, dtype=jnp.int32))
    row = jnp.minimum((ends < count).sum(), len(flat) - 1)  # the count is reached here
    inner = jnp.cumsum(flat[row].astype(jnp.int32)) + jnp.where(
        row > 0, ends[jnp.maximum(row - 1, 0)], 0
    )
    last = row * block + (inner < count).sum()  # position of the last that is kept
    position = _positions(mask.shape)
    return mask & (position <= last) & (count > 0)


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
