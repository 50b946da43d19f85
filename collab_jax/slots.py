"""Buffers with one slot per position: the memory under every cache and history.

A slot buffer holds S slots for each of B rows. Row b has consumed `length[b]` tokens,
which lie in slots `0 .. length[b] - 1`; what lies at or beyond `length[b]` is garbage
that nothing may read. Forgetting tokens is therefore only a smaller `length`. The N
nodes of a tree of continuations are written to slots `length .. length + N - 1` without
making the row longer; `compact` keeps one path of them.

Beams have buffers of their own, one for each of K in a row, which are moved about.

Shapes: B rows, T tokens of this call, N nodes of a tree, D nodes of a path, S slots, K
beams of a row.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Tokens of a call which a TPU writes one by one; sixteen at once take about as long as
# a window of any size (the schedules of its compiler, jaxlib 0.10.2)
FEW = 16


def positions(length: jax.Array, count: int) -> jax.Array:
    """Positions of the next `count` tokens of every row: `length[b] + t`, `[B, T]`.

    >>> positions(jnp.array([0, 5]), 3).tolist()
    [[0, 1, 2], [5, 6, 7]]
    """
    return length[:, None] + jnp.arange(count, dtype=length.dtype)


def ancestors(parents: jax.Array) -> jax.Array:
    """Which nodes lie on the root path of which node, the node itself included.

    The reflexive transitive closure of the parent relation. What a node reaches doubles
    in every pass: its own 2^i nearest, and those of the ancestor 2^i above.

    Args:
      parents: `[B, N]`, the parent of each node, smaller than the node's own index;
        -1 where the parent is the prefix.

    Returns:
      `[B, N, N]` bool, `[b, i, j]` is True when j is i or an ancestor of i.

    >>> ancestors(jnp.array([[-1, 0, 0]]))[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    batch, nodes = parents.shape
    rows = jnp.arange(batch)[:, None]
    reach = jnp.broadcast_to(jnp.eye(nodes, dtype=bool), (batch, nodes, nodes))
    above = parents  # the ancestor 2^i above
    for _ in range(math.ceil(math.log2(max(nodes, 2)))):
        exists, place = above >= 0, jnp.maximum(above, 0)
        reach |= exists[:, :, None] & reach[rows, place]
        above = jnp.where(exists, above[rows, place], -1)
    return reach


def depths(parents: jax.Array) -> jax.Array:
    """Number of proper ancestors of each node, `[B, N]`; 0 for a child of the prefix.

    >>> depths(jnp.array([[-1, 0, 0, 1]])).tolist()
    [[0, 1, 1, 2]]
    """
    return ancestors(parents).sum(-1, dtype=parents.dtype) - 1


def visible(
    length: jax.Array, count: int, slots: int, parents: jax.Array | None = None
) -> jax.Array:
    """Which slots each new token may read: the prefix, itself, and its ancestors.

    Args:
      length: `[B]`, tokens consumed before this call.
      count: T, the number of new tokens (or N, of nodes).
      slots: S, the size of the buffer.
      parents: `[B, N]` for a tree; None for a plain continuation, where every token
        reads all tokens before it.

    Returns:
      `[B, T, S]` bool.

    >>> visible(jnp.array([1]), 2, 4)[0].astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0]]
    >>> visible(jnp.array([1]), 2, 4, jnp.array([[-1, -1]]))[0].astype(int).tolist()
    [[1, 1, 0, 0], [1, 0, 1, 0]]
    """
    slot = jnp.arange(slots, dtype=length.dtype)
    if parents is None:
        return slot <= positions(length, count)[:, :, None]
    node = slot - length[:, None]  # [B, S], the node that lies in this slot
    inside = (node >= 0) & (node < count)
    reach = jnp.take_along_axis(
        ancestors(parents), jnp.clip(node, 0, count - 1)[:, None, :], axis=2
    )
    return (slot < length[:, None])[:, None, :] | (inside[:, None, :] & reach)


def held(dtype: Any) -> Any:
    """The type of a buffer for values of a type: the same, but float32 on a CPU.

    XLA:CPU has no updates of shorter floats: each would widen the whole buffer, and
    narrow it again (0.7 ms a token for keys and values of 8,192 slots of 192 numbers,
    against 0.02 ms; measured on jaxlib 0.10.2). Values stay what they were rounded to.

    >>> held(jnp.float32) == jnp.float32, held(jnp.int32) == jnp.int32
    (True, True)
    """
    short = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.float32 if short and jax.default_backend() == "cpu" else dtype


def write(
    buffer: jax.Array, values: jax.Array, length: jax.Array, axis: int = 1
) -> jax.Array:
    """Writes T values behind the first `length[b]` slots of each row, in place.

    Args:
      buffer: `[B, S, ...]`, or `[B, H, S, ...]` with `axis=2`.
      values: `[B, T, ...]`, in both cases.
      length: `[B]`, tokens consumed before this call.
      axis: where the slots are.

    Returns:
      The buffer with `values[b, t]` in slot `length[b] + t`; a slot beyond the buffer
      is dropped.

    >>> write(jnp.zeros((2, 3), int), jnp.array([[7], [8]]), jnp.array([0, 2])).tolist()
    [[7, 0, 0], [0, 0, 8]]
    """
    return _write(buffer, values.astype(buffer.dtype), length, axis)


@functools.partial(jax.jit, static_argnums=3)
def _write(buffer, values, length, axis):
    """Scatters; on a TPU a window for every row, where there are many tokens."""
    scatter = functools.partial(_scattered, axis=axis)
    tpu = functools.partial(_by_heads, axis=axis)
    if FEW < values.shape[1] <= buffer.shape[axis]:
        tpu = functools.partial(_in_windows, axis=axis)
    return jax.lax.platform_dependent(buffer, values, length, tpu=tpu, default=scatter)


def _scattered(buffer, values, length, axis):
    """An update for every token."""
    slot = positions(length, values.shape[1])
    if slot.size == 1:
        # XLA:CPU turns a scatter of one update into a dynamic-update-slice, fuses that
        # into every reader, and copies the buffer for each (4 copies a token, measured
        # on jaxlib 0.10.2). A second update, which is dropped, keeps the scatter.
        slot = jnp.pad(slot, ((0, 0), (0, 1)), constant_values=buffer.shape[axis])
        values = jnp.pad(values, ((0, 0), (0, 1)) + ((0, 0),) * (values.ndim - 2))

    def row(buffer, values, slot):
        where = buffer.at[slot] if axis == 1 else buffer.at[:, slot]
        values = values if axis == 1 else jnp.moveaxis(values, 0, 1)
        return where.set(
            values, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    # under vmap a scatter knows that its rows are independent: sharded rows stay apart
    return jax.vmap(row)(buffer, values, slot)


def _by_heads(buffer, values, length, axis):
    """An update for every token and head.

    A TPU starts sixteen such at once. Where an update holds all heads, its compiler
    lays the buffer out anew for it, and back for who reads it.
    """
    if axis == 1:
        return _scattered(buffer, values, length, axis)
    values = jnp.moveaxis(values, 1, 2)
    slot = positions(length, values.shape[2])[:, None]
    slot = jnp.broadcast_to(slot, values.shape[:3])

    def head(buffer, values, slot):
        return buffer.at[slot].set(
            values, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return jax.vmap(jax.vmap(head))(buffer, values, slot)


def _in_windows(buffer, values, length, axis):
    """An update for every row: the window of T slots behind its length.

    Where fewer are left, the window is the last T slots, the first of which stay. No
    row takes a slice at a place of its own, for which the compiler of a TPU would lay
    the buffer out anew.
    """
    count = values.shape[1]
    values = jnp.moveaxis(values, 1, axis)
    late = jnp.maximum(length + count - buffer.shape[axis], 0)

    def at_the_end(values):
        last = jax.lax.slice_in_dim(buffer, buffer.shape[axis] - count, None, axis=axis)
        by_row = (-1, *(1,) * (values.ndim - 1))
        slot = jax.lax.broadcasted_iota(late.dtype, values.shape, axis)
        for bit in range(count.bit_length()):
            wanted = (late >> bit & 1).reshape(by_row) == 1
            values = jnp.where(wanted, jnp.roll(values, 1 << bit, axis), values)
        return jnp.where(slot >= late.reshape(by_row), values, last)

    window = jax.lax.cond((late > 0).any(), at_the_end, lambda values: values, values)

    def row(buffer, window, start):
        return jax.lax.dynamic_update_slice_in_dim(buffer, window, start, axis - 1)

    return jax.vmap(row)(buffer, window, length - late)


def compact(
    buffer: jax.Array, length: jax.Array, path: jax.Array, axis: int = 1
) -> jax.Array:
    """Moves the nodes of a path to the slots right behind the prefix, in order.

    Args:
      buffer: `[B, S, ...]`, or `[B, H, S, ...]` with `axis=2`, after a branch.
      length: `[B]`, tokens consumed before the branch.
      path: `[B, D]`, node indices; entries behind the kept count may be anything.
      axis: where the slots are.

    Returns:
      The buffer with node `path[b, d]` in slot `length[b] + d`.

    >>> compact(jnp.array([[5, 6, 7, 8]]), jnp.array([1]), jnp.array([[0, 2]])).tolist()
    [[5, 6, 8, 8]]
    """
    slot = jnp.clip(length[:, None] + path, 0, buffer.shape[axis] - 1)
    return write(buffer, _read(buffer, slot, axis), length, axis)


@functools.partial(jax.jit, static_argnums=2)
def _read(buffer, slot, axis):
    """What lies in slots `[B, D]`: `[B, D, ...]`; on a TPU head by head, as written."""
    if axis == 1:
        return buffer[jnp.arange(buffer.shape[0])[:, None], slot]
    return jax.lax.platform_dependent(
        buffer, slot, tpu=_read_by_heads, default=_read_whole
    )


def _read_whole(buffer, slot):
    """A slice for every slot, of all heads."""
    return buffer[jnp.arange(buffer.shape[0])[:, None], :, slot]


def _read_by_heads(buffer, slot):
    """A slice for every slot and head; see `_by_heads`."""
    slot = jnp.broadcast_to(slot[:, None], (*buffer.shape[:2], slot.shape[1]))
    found = jax.vmap(jax.vmap(lambda head, slot: head[slot]))(buffer, slot)
    return jnp.moveaxis(found, 1, 2)


def select(beams: Any, place: jax.Array) -> Any:
    """Gathers beams, or lanes, of each row.

    Args:
      beams: a tree of `[B, K, ...]`.
      place: `[B, K2]`, where each comes from.

    Returns:
      The tree with `[B, K2, ...]`.

    >>> select(jnp.array([[5, 6, 7]]), jnp.array([[2, 2]])).tolist()
    [[7, 7]]
    """

    def pick(leaf):
        index = place.reshape(*place.shape, *(1,) * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, index, axis=1)

    return jax.tree.map(pick, beams)


def put(
    buffer: jax.Array, values: jax.Array, length: jax.Array, where: Any = True
) -> jax.Array:
    """Writes one value behind each beam.

    Args:
      buffer: `[B, K, N]`.
      values: `[B, K]`.
      length: `[B, K]`, entries of each.
      where: `[B, K]` bool, which are written.

    >>> buffer, values = jnp.zeros((1, 2, 2), int), jnp.array([[7, 8]])
    >>> put(buffer, values, jnp.array([[0, 1]])).tolist()
    [[[7, 0], [0, 8]]]
    """
    here = jnp.arange(buffer.shape[-1]) == length[:, :, None]
    here &= jnp.broadcast_to(where, length.shape)[:, :, None]
    return jnp.where(here, values[:, :, None].astype(buffer.dtype), buffer)


def last(tokens: jax.Array, length: jax.Array, before: Any) -> jax.Array:
    """The last token of each beam, `[B, K]`.

    Args:
      tokens: `[B, K, N]`.
      length: `[B, K]`, tokens of each.
      before: the token of a beam without any, `[B, 1]` or a number.

    >>> last(jnp.array([[[4, 5], [6, 0]]]), jnp.array([[2, 0]]), 9).tolist()
    [[5, 9]]
    """
    slot = jnp.maximum(length - 1, 0)[:, :, None]
    token = jnp.take_along_axis(tokens, slot, axis=2)[:, :, 0]
    return jnp.where(length == 0, before, token)
