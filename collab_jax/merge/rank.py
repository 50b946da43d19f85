"""The order of magnitudes: ranks along an axis, and the entries of a band of ranks.

Ranks are exact and ties are broken by position, so that all devices agree. XLA sorts
slowly on CPUs: there NumPy sorts rows on the host, about thirty times faster, where a
driver has the whole leaf; under `jit`, sharded and on accelerators XLA sorts.

Shapes: S the shape of a leaf, M its entries.
"""

import concurrent.futures
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.merge import magnitude, pieces

_BLOCK = 1 << 18  # entries sorted at a time; less, and threads wait for each other


def ranks(x: jax.Array, axis: int = -1) -> jax.Array:
    """The rank of each entry's magnitude along an axis, `[*S]` int32; 0 is the least.

    `r_i = #{j : |x_j| < |x_i|} + #{j < i : |x_j| = |x_i|}`

    Args:
      x: `[*S]`; a scalar has rank 0.
      axis: along which to compare; the last where there are not as many.

    >>> ranks(jnp.array([[3.0, -1.0, 1.0], [0.0, -5.0, 2.0]])).tolist()
    [[2, 0, 1], [0, 2, 1]]
    """
    ((found, _),) = _ranks([x], axis)
    return found


def _ranks(xs: Sequence[jax.Array], axis: int) -> list[tuple[jax.Array, Any]]:
    """For each array the ranks, and how many entries there are along the axis."""
    values = [magnitude.pattern(x) for x in xs]
    if pieces.in_pieces():

        def compute(leaf, n, shape):
            return _of_leaf(leaf, shape, axis)

        def unit(shape):
            return math.prod(_behind(shape, axis))

        found = pieces.on_host(values, compute, unit=unit)
        return [(row.astype(jnp.int32), count) for row, count in found]
    if values[0].ndim == 0:
        return [(jnp.zeros((), jnp.int32), 1) for _ in xs]
    axis = _axis(xs[0].shape, axis)

    def sort(array):
        return jnp.moveaxis(_by_xla(jnp.moveaxis(array, axis, -1)), -1, axis)

    return [(sort(array), array.shape[axis]) for array in values]


def _axis(shape: tuple[int, ...], axis: int) -> int:
    return min(axis, len(shape) - 1) if axis >= 0 else axis


def _behind(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The axis and what lies behind it: entries that are ranked together."""
    shape = shape or (1,)
    return shape[_axis(shape, axis) % len(shape) :]


def _of_leaf(leaf, shape, axis):
    """The ranks of a leaf, or of any number of its rows along the axis."""
    rest = _behind(shape, axis)
    rows = np.moveaxis(leaf.reshape(-1, *rest), 1, -1)
    found = np.ascontiguousarray(np.moveaxis(_by_numpy(rows), -1, 1))
    return pieces.Spread(found.reshape(-1)), np.int32(rest[0])


def rising(
    xs: Sequence[jax.Array], lows: Sequence, highs: Sequence, axis: int = -1
) -> list[jax.Array]:
    """Probabilities that rise with the rank of the magnitude, N arrays `[*S]`.

    `p_i = low + (high - low) r_i / (n - 1)` with n entries along the axis; the middle
    of both where n is 1.

    Args:
      xs: N arrays `[*S]`.
      lows: N numbers or tracers, of the least magnitude.
      highs: N, of the largest.
      axis: along which to rank; the last where there are not as many.

    Source: MAGPRUNE, arXiv 2406.11617.

    >>> rising([jnp.array([3.0, 1.0, -2.0])], [0.25], [0.75])[0].tolist()
    [0.75, 0.25, 0.5]
    """
    chances = []
    rows = zip(xs, _ranks(xs, axis), lows, highs, strict=True)
    for x, (found, count), low, high in rows:
        share = found.astype(x.dtype) / jnp.maximum(jnp.asarray(count - 1, x.dtype), 1)
        chance = low + (high - low) * share
        chances.append(jnp.where(count < 2, (low + high) / 2, chance))
    return chances


def _by_xla(rows: jax.Array) -> jax.Array:
    axis = rows.ndim - 1
    place = jax.lax.broadcasted_iota(jnp.int32, rows.shape, axis)
    _, order = jax.lax.sort((rows, place), dimension=axis, num_keys=1, is_stable=True)
    # the ranks are the inverse of the order
    _, found = jax.lax.sort((order, place), dimension=axis, num_keys=1)
    return found


def _by_numpy(rows: np.ndarray) -> np.ndarray:
    """The ranks along the last axis, by threads over blocks of rows."""
    width = rows.shape[-1]
    flat = rows.reshape(-1, width)
    found = np.empty(flat.shape, np.uint16 if width <= 1 << 16 else np.int32)
    step = max(1, _BLOCK // width)
    many = os.cpu_count() or 1
    starts = range(0, len(flat), step)
    fill = _fill if rows.dtype == np.uint32 else _fill_wide

    def work(starts: Sequence[int]) -> None:
        fill(flat, found, starts, min(step, len(flat)))

    if len(starts) < many:
        work(starts)
    else:
        list(_pool().map(work, [starts[n::many] for n in range(many)]))
    return found.reshape(rows.shape)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    """The threads that sort, for all leaves: more than there are cores only wait."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "rank")


def _fill(flat, found, starts: Sequence[int], step: int) -> None:
    """Sorts numbers that hold the magnitude above the position: no two are equal.

    In most rows of a difference of two bfloat16 the last bits are 0, and 32 bits hold
    both: numbers that are sorted twice as fast as those of 64 bits.
    """
    width = flat.shape[-1]
    order = np.empty((step, width), np.int64)
    places = np.arange(width, dtype=np.uint32)
    ranks = np.broadcast_to(places.astype(found.dtype), (step, width)).copy()
    begins = np.arange(step, dtype=np.int64)[:, None] * width
    sort_narrow, sort_any = _narrow(step, places), _any(step, places)
    low = np.uint32((1 << max(0, (width - 1).bit_length() - 1)) - 1)
    for start in starts:
        block = flat[start : start + step]
        fine = np.flatnonzero(np.bitwise_or.reduce(block, axis=1) & low)
        if 2 * len(fine) > len(block):
            found_order = sort_any(block)
        else:
            found_order = sort_narrow(block)
            if len(fine):
                found_order[fine] = sort_any(block[fine])
        np.add(found_order, begins[: len(block)], out=order[: len(block)])
        target = found[start : start + step].reshape(-1)
        target[order[: len(block)].reshape(-1)] = ranks[: len(block)].reshape(-1)


def _narrow(step: int, places: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The positions of a block's magnitudes in order, where their last bits are 0.

    The bit of the sign is free, so of B bits for a position B - 1 have to be.
    """
    keys = np.empty((step, len(places)), np.uint32)
    mask = np.uint32((1 << (len(places) - 1).bit_length()) - 1)

    def sort(block):
        own = keys[: len(block)]
        np.left_shift(block, 1, out=own)
        np.bitwise_or(own, places, out=own)
        own.sort(axis=-1)
        return np.bitwise_and(own, mask, out=own)

    return sort


def _any(step: int, places: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The positions of a block's magnitudes in order.

    They are sorted as floats, which is a quarter faster: the offset makes the lowest
    normal, and the highest stays finite, so the order is that of the integers.
    """
    keys = np.empty((step, len(places)))
    halves = keys.view(np.uint32).reshape(step, len(places), 2)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)

    def sort(block):
        count = len(block)
        halves[:count, :, low] = places
        np.add(block, np.uint32(1 << 20), out=halves[:count, :, high])
        keys[:count].sort(axis=-1)
        return halves[:count, :, low]

    return sort


def _fill_wide(flat, found, starts: Sequence[int], step: int) -> None:
    for start in starts:
        order = np.argsort(flat[start : start + step], axis=-1, kind="stable")
        ranks = np.arange(flat.shape[-1], dtype=found.dtype)[None]
        np.put_along_axis(found[start : start + step], order, ranks, -1)


def among_smallest(x: jax.Array, k) -> jax.Array:
    """Which entries are the k of smallest magnitude, `[*S]` bool, without sorting.

    Of tied entries those that come first are taken.

    Args:
      x: `[*S]`, fewer than 2 ** 31 entries.
      k: 0 to M; may be a tracer.

    >>> among_smallest(jnp.array([3.0, 1.0, -2.0, 2.0]), 2).tolist()
    [False, True, True, False]
    """
    k = jnp.asarray(k, jnp.int32)
    values = magnitude.pattern(x)
    most = magnitude.threshold(x, jnp.clip(x.size - k + 1, 1, max(1, x.size)))
    less, tied = values < most, values == most
    return (less | magnitude.first(tied, k - less.sum(dtype=jnp.int32))) & (k > 0)


def band(x: jax.Array, low, high) -> jax.Array:
    """Which entries have ranks `low <= r < high` in the whole leaf, `[*S]` bool.

    Rank 0 is the smallest magnitude; ties are ranked by position.

    Args:
      x: `[*S]`, fewer than 2 ** 31 entries.
      low: 0 to M; may be a tracer.
      high: 0 to M; may be a tracer.

    Source: the two-sided masks of Model Breadcrumbs, arXiv 2312.06795.

    >>> band(jnp.array([3.0, 1.0, -2.0, 2.5]), 1, 3).tolist()
    [False, False, True, True]
    """
    return among_smallest(x, high) & ~among_smallest(x, low)
