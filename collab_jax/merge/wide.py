"""Counts of more than 2 ** 31 entries, for programs without integers of 64 bits.

A model of 8 billion parameters has more entries than an int32 counts; outside of `jit`
NumPy counts in int64.

Shapes: `*S`, those of the counts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HALF = 16  # bits; sums of 2 ** 16 halves fit in 32


class Wide(NamedTuple):
    """Counts `high * 2 ** 32 + low`."""

    high: jax.Array  # `[*S]` uint32
    low: jax.Array  # `[*S]` uint32


def wide(count: Any) -> Wide:
    """Counts, from arrays of integers that are not negative, or from a number.

    Args:
      count: `[*S]` of JAX, or of NumPy and up to 64 bits, a number, or counts already.

    >>> [int(part) for part in wide(5 << 32 | 7)]
    [5, 7]
    """
    if isinstance(count, Wide):
        return count
    if isinstance(count, int | np.integer | np.ndarray):
        whole = np.asarray(count).astype(np.uint64)
        parts = whole >> np.uint64(32), whole & np.uint64(0xFFFFFFFF)
        return Wide(*(jnp.asarray(part.astype(np.uint32)) for part in parts))
    low = jnp.asarray(count).astype(jnp.uint32)
    return Wide(jnp.zeros_like(low), low)


def add(one: Wide, two: Wide) -> Wide:
    """The sum.

    Args:
      one: counts `[*S]`.
      two: likewise.

    >>> [int(part) for part in add(wide(0xFFFFFFFF), wide(2))]
    [1, 1]
    """
    low = one.low + two.low
    return Wide(one.high + two.high + (low < one.low), low)


def less(one: Wide, two: Wide) -> Wide:
    """The difference, of counts of which the first are not the smaller ones.

    Args:
      one: counts `[*S]`.
      two: likewise.

    >>> [int(part) for part in less(wide(1 << 32), wide(1))]
    [0, 4294967295]
    """
    return Wide(one.high - two.high - (one.low < two.low), one.low - two.low)


def at_least(one: Wide, two: Wide) -> jax.Array:
    """Whether the first are the larger ones, or the same, `[*S]` bool.

    Args:
      one: counts `[*S]`.
      two: likewise.

    >>> bool(at_least(wide(1 << 32), wide(0xFFFFFFFF)))
    True
    """
    same = one.high == two.high
    return (one.high > two.high) | (same & (one.low >= two.low))


def total(counts: Wide) -> Wide:
    """The sum of up to 2 ** 16 counts, `[]`.

    >>> found = total(wide(jnp.full(3, 2**31 - 1)))
    >>> (int(found.high) << 32) + int(found.low) == 3 * (2**31 - 1)
    True
    """
    if counts.low.size > 1 << HALF:
        raise ValueError(f"{counts.low.size} counts: at most {1 << HALF} are added up")
    first = (counts.low & ((1 << HALF) - 1)).sum(dtype=jnp.uint32)
    second = (counts.low >> HALF).sum(dtype=jnp.uint32)
    high = counts.high.sum(dtype=jnp.uint32) + (second >> HALF)
    return add(Wide(high, second << HALF), Wide(jnp.zeros_like(first), first))
