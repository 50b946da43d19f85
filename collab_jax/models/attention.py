"""Attention of new tokens over the slots of a cache.

The cache stays as it lies, `[B, H, S, K]`: no copy of it is made, and the queries of a
group share their keys and values without repeating them. Of a long buffer only the
blocks in use are read, so that a step costs what the text is long, and not what its
buffer could hold.

Shapes: B rows, T tokens of this call, S slots, H key-value heads, G queries a key-value
head, K size of a head, W width of the hidden states.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax import native, slots
from collab_jax.models.config import Config
from collab_jax.models.linear import Projection, is_native, together
from collab_jax.models.norm import Norm
from collab_jax.models.rotary import rotate

# Slots of a block. A small one reads less beyond the text, and a loop has a cost a
# turn: on a CPU 128 is the best of 128, 256 and 512 from 256 slots on (measured, batch
# 1 and 8)
CPU_BLOCK = 128


def block_of(tokens: int) -> int:
    """Slots of a block on an accelerator, for a call of T tokens.

    A turn is a dozen kernels there, on a GPU with a word to the host for its end: one
    token reads 8,192 slots in the time that they take. Of many tokens, the scores of a
    block must fit in the memory.

    >>> block_of(1), block_of(32), block_of(512)
    (8192, 4096, 1024)
    """
    return max(1024, min(8192, 1024 // tokens * 128))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention with grouped queries: `softmax(cap(scale q k^T)) v`.

    Args:
      q: `[B, T, H * G, K]`; query head h reads key-value head `h // G`.
      k: `[B, H, S, K]`.
      v: `[B, H, S, K]`.
      mask: `[B, T, S]` bool, which slots a token may read; at least one.
      scale: multiplies the scores.
      cap: scores become `cap * tanh(scores / cap)`.

    Returns:
      `[B, T, H * G * K]` in the type of q, and the weights `[B, H, G, T, S]` float32.

    >>> q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 3, 4))
    >>> out, weights = attend(q, k, k, jnp.array([[[True, True, False]]]), 0.5)
    >>> weights[0, 0, 0, 0].tolist()
    [0.5, 0.5, 0.0]
    """
    queries = _grouped(q, k.shape[1], scale)
    weights = jax.nn.softmax(_scores(queries, k, mask, cap), axis=-1)
    out = _mix(weights, v)
    out = out.transpose(0, 3, 1, 2, 4).reshape(*q.shape[:2], -1)
    return out.astype(q.dtype), weights


def _grouped(q: jax.Array, heads: int, scale: float) -> jax.Array:
    """Queries `[B, T, H * G, K]`, scaled, as `[B, H, G, T, K]`."""
    batch, tokens, _, size = q.shape
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, tokens, heads, -1, size)
    return q.transpose(0, 2, 3, 1, 4)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, cap) -> jax.Array:
    """`[B, H, G, T, S]` float32; -inf where the mask `[B, T, S]` is False."""
    batch, heads, group, tokens, size = q.shape
    flat = q.reshape(batch, heads, group * tokens, size)
    scores = jnp.einsum("bhqk,bhsk->bhqs", flat, k, preferred_element_type=jnp.float32)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = scores.reshape(batch, heads, group, tokens, -1)
    return jnp.where(mask[:, None, None], scores, -jnp.inf)


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """`[B, H, G, T, S]` times values `[B, H, S, K]`: `[B, H, G, T, K]` float32."""
    batch, heads, group, tokens, count = weights.shape
    flat = weights.astype(v.dtype).reshape(batch, heads, group * tokens, count)
    out = jnp.einsum("bhqs,bhsk->bhqk", flat, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, group, tokens, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
def attend_within(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    reach: tuple[jax.Array, jax.Array],
    scale: float,
    cap: float | None,
    block: int,
) -> jax.Array:
    """The output of `attend`, from the blocks of the buffer that `reach` touches.

    A loop over blocks keeps, for every query, the largest score m so far, the sum of
    `exp(s - m)` and the mean of the values with these weights. The number of its turns
    follows the text; derivatives are those of `attend`.

    Args:
      q: `[B, T, H * G, K]`.
      k: `[B, H, S, K]`.
      v: `[B, H, S, K]`.
      mask: `[B, T, S]` bool; False outside of `reach`.
      reach: first slot, and the slot behind the last, that any token may read: `[]`.
      scale: see `attend`.
      cap: see `attend`.
      block: slots of a block, at most S.

    Source: the online softmax, arXiv 1805.02867; arXiv 2205.14135.

    >>> q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 5, 4))
    >>> mask, reach = jnp.arange(5)[None, None] < 3, (jnp.int32(0), jnp.int32(3))
    >>> attend_within(q, k, 2 * k, mask, reach, 0.5, None, 2)[0, 0, :3].tolist()
    [2.0, 2.0, 2.0]
    """
    slots_, queries = k.shape[2], _grouped(q, k.shape[1], scale)

    def turn(i, carry):
        top, total, mean = carry
        # the last block lies at the end of the buffer, and may overlap the one before
        at = jnp.minimum(i * block, slots_ - block)
        keys, values, seen = (
            jax.lax.dynamic_slice_in_dim(leaf, at, block, axis=2)
            for leaf in (k, v, mask)
        )
        seen &= jnp.arange(block) + at >= i * block
        scores = _scores(queries, keys, seen, cap)
        new = jnp.maximum(top, scores.max(-1))
        level = jnp.where(jnp.isneginf(new), 0.0, new)  # nothing seen as yet
        weights = jnp.exp(scores - level[..., None])
        less = jnp.exp(top - level)
        mean = mean * less[..., None] + _mix(weights, values)
        return new, total * less + weights.sum(-1), mean

    first, last = reach
    last = jnp.minimum(last, slots_)
    zero = jnp.zeros(queries.shape[:-1], jnp.float32)
    start = zero - jnp.inf, zero, jnp.zeros(queries.shape, jnp.float32)
    _, total, mean = jax.lax.fori_loop(first // block, -(-last // block), turn, start)
    out = (mean / total[..., None]).transpose(0, 3, 1, 2, 4)
    return out.reshape(*q.shape[:2], -1).astype(q.dtype)


@attend_within.defjvp
def _(scale, cap, block, primals, tangents):
    tangent = _tangent(primals, tangents, scale, cap)
    return attend_within(*primals, scale, cap, block), tangent


def _tangent(primals, tangents, scale, cap):
    """The derivative of `attend` by q, k and v."""
    parts, mask = primals[:3], primals[3]

    def whole(q, k, v):
        return attend(q, k, v, mask, scale, cap)[0]

    return jax.jvp(whole, parts, tangents[:3])[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def attend_natively(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    reach: tuple[jax.Array, jax.Array],
    scale: float,
    cap: float | None,
) -> jax.Array:
    """The output of `attend` by native code, from the slots that `reach` touches.

    XLA takes ten small kernels for the attention of a token, which cost more than what
    they do; of a long text it writes all scores to the memory. Weights stay float32
    where the cache is bfloat16; derivatives are those of `attend`. On a CPU alone, and
    where `collab_jax.native` is available.

    Args:
      q: `[B, T, H * G, K]`.
      k: `[B, H, S, K]` float32 or bfloat16.
      v: likewise.
      mask: `[B, T, S]` bool; False outside of `reach`.
      reach: first slot, and the slot behind the last, that any token may read: `[]`.
      scale: see `attend`.
      cap: see `attend`.

    >>> q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 1, 5, 4))
    >>> mask, reach = jnp.arange(5)[None, None] < 3, (jnp.int32(0), jnp.int32(3))
    >>> read = attend_natively if native.available() else attend_within
    >>> more = () if native.available() else (2,)
    >>> read(q, k, 2 * k, mask, reach, 0.5, None, *more)[0, 0, :3].tolist()
    [2.0, 2.0, 2.0]
    """
    first, last = (jnp.asarray(slot, jnp.int32) for slot in reach)
    queries = (q * jnp.asarray(scale, q.dtype)).astype(jnp.float32)
    result = jax.eval_shape(
        lambda q, k, v: attend(q, k, v, mask, 1.0)[0], queries, k, v
    )
    return native.attend(queries, k, v, mask, (first, last), cap, result).astype(
        q.dtype
    )


@attend_natively.defjvp
def _(scale, cap, primals, tangents):
    tangent = _tangent(primals, tangents, scale, cap)
    return attend_natively(*primals, scale, cap), tangent


def reach(
    length: jax.Array, count: int, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """The slots that `count` new tokens may read, of all rows together: first, end.

    Args:
      length: `[B]`, tokens consumed before this call.
      count: tokens, or nodes, of this call.
      window: as in `windowed`; None reads from the beginning.

    >>> [int(slot) for slot in reach(jnp.array([7, 5]), 2, 3)]
    [3, 9]
    """
    first = jnp.int32(0)
    if window is not None:
        first = jnp.maximum(length.min() - window + 1, 0)
    return first, length.max() + count


def windowed(
    mask: jax.Array,
    length: jax.Array,
    window: int,
    parents: jax.Array | None = None,
) -> jax.Array:
    """Narrows a mask to the last `window` positions, the token's own counted.

    Args:
      mask: `[B, T, S]` bool, from `slots.visible`.
      length: `[B]`, tokens consumed before this call.
      window: number of positions that a token sees.
      parents: `[B, N]` for a tree, whose nodes stand at `length + depth`.

    >>> length = jnp.array([2])
    >>> windowed(slots.visible(length, 1, 4), length, 2)[0].astype(int).tolist()
    [[0, 1, 1, 0]]
    """
    batch, count, size = mask.shape
    slot = jnp.broadcast_to(jnp.arange(size, dtype=length.dtype), (batch, size))
    if parents is None:
        token = slots.positions(length, count)
    else:
        depth = slots.depths(parents).astype(length.dtype)
        token = length[:, None] + depth
        node = jnp.clip(slot - length[:, None], 0, count - 1)
        place = length[:, None] + jnp.take_along_axis(depth, node, axis=1)
        slot = jnp.where(slot < length[:, None], slot, place)
    return mask & (token[:, :, None] - slot[:, None, :] < window)


class Attention(nn.Module):
    """Queries, keys and values, their norms and rotation, the cache, and the output."""

    config: Config
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the projections and norms."""
        c = self.config
        queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
        self.q = Projection(c.width, queries, c.qkv_bias, self.dtype)
        self.k = Projection(c.width, keys, c.qkv_bias, self.dtype)
        self.v = Projection(c.width, keys, c.qkv_bias, self.dtype)
        self.o = Projection(queries, c.width, c.out_bias, self.dtype)
        if c.head_norm or c.width_norm:
            sizes = (c.head_size,) * 2 if c.head_norm else (queries, keys)
            self.q_norm = Norm(c, sizes[0], self.dtype)
            self.k_norm = Norm(c, sizes[1], self.dtype)

    def __call__(self, x, cache, length, mask, within, angles, tapped):
        """Reads `[B, T, W]`; writes keys and values behind `length` into the cache.

        Args:
          x: `[B, T, W]`.
          cache: keys and values `[B, H, S, K]`, or None to attend over x alone.
          length: `[B]`.
          mask: `[B, T, S]` bool.
          within: the slots outside of which the mask is False, from `reach`.
          angles: cosine and sine `[B, T, R / 2]`, or None.
          tapped: whether the weights are wanted; they are those of the whole buffer.

        Returns:
          `[B, T, W]`, the cache, and the weights `[B, H, G, T, S]`, or None.
        """
        c = self.config
        split = (*x.shape[:2], -1, c.head_size)
        q, k, v = together(x, self.q, self.k, self.v)
        v = v.reshape(split)
        if c.width_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.reshape(split), k.reshape(split)
        if c.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is None:
            keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        else:
            keys = slots.write(cache[0], k, length, axis=2)
            values = slots.write(cache[1], v, length, axis=2)
            cache = (keys, values)
        numbers = c.query_scale, c.attention_cap
        if tapped or cache is None:
            out, weights = attend(q, keys, values, mask, *numbers)
            return self.o(out), cache, weights if tapped else None

        def read(block, q, keys, values, mask, within):
            if keys.shape[2] <= 2 * block:  # a loop would cost more than it leaves out
                return attend(q, keys, values, mask, *numbers)[0]
            return attend_within(q, keys, values, mask, within, *numbers, block)

        def on_a_cpu(*args):
            if self._natively(keys):
                return attend_natively(*args, *numbers)
            return read(CPU_BLOCK, *args)

        out = jax.lax.platform_dependent(
            q,
            keys,
            values,
            mask,
            within,
            cpu=on_a_cpu,
            default=functools.partial(read, block_of(x.shape[1])),
        )
        return self.o(out), cache, None

    def _natively(self, keys: jax.Array) -> bool:
        """Whether native code reads the cache: where it multiplies the matrices.

        Those lie on one device; XLA would gather a cache that lies on several.
        """
        types = keys.dtype in (jnp.float32, jnp.bfloat16)
        return (
            types and keys.shape[3] <= native.LARGEST and is_native(self.o.weights()[0])
        )
