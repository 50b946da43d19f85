"""Attention of a few new tokens over the slots of a cache.

The cache stays as it lies, `[B, H, S, K]`: no copy of it is made, and the queries of a
group share their keys and values without repeating them.

Shapes: B rows, T tokens of this call, S slots, H key-value heads, G queries a key-value
head, K size of a head, W width of the hidden states.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax import slots
from collab_jax.models.config import Config
from collab_jax.models.linear import Projection
from collab_jax.models.norm import Norm
from collab_jax.models.rotary import rotate


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
    batch, tokens, heads, size = q.shape
    group = heads // k.shape[1]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, tokens, -1, group, size)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, -1, group * tokens, size)
    scores = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = scores.reshape(batch, -1, group, tokens, k.shape[2])
    seen = mask[:, None, None, :, :]  # [B, 1, 1, T, S]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    flat = weights.astype(v.dtype).reshape(batch, -1, group * tokens, k.shape[2])
    out = jnp.einsum("bhqs,bhsk->bhqk", flat, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, -1, group, tokens, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, -1).astype(q.dtype), weights


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

    def __call__(self, x, cache, length, mask, angles):
        """Reads `[B, T, W]`; writes keys and values behind `length` into the cache.

        Args:
          x: `[B, T, W]`.
          cache: keys and values `[B, H, S, K]`, or None to attend over x alone.
          length: `[B]`.
          mask: `[B, T, S]` bool.
          angles: cosine and sine `[B, T, R / 2]`, or None.

        Returns:
          `[B, T, W]`, the cache, and the weights `[B, H, G, T, S]`.
        """
        c = self.config
        split = (*x.shape[:2], -1, c.head_size)
        q, k, v = self.q(x), self.k(x), self.v(x).reshape(split)
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
        out, weights = attend(q, keys, values, mask, c.query_scale, c.attention_cap)
        return self.o(out), cache, weights
