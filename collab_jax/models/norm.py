"""Root-mean-square and layer normalisation, with statistics in float32.

Shapes: W width of what is normalised.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax.models.config import Config
from collab_jax.models.linear import leaf


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0
) -> jax.Array:
    """`y = x / sqrt(mean(x^2) + eps) * (offset + scale)` (arXiv:1910.07467).

    Args:
      x: `[..., W]`.
      scale: `[W]`.
      eps: keeps the root away from zero.
      offset: 1.0 where the checkpoint stores the scale minus one.

    Returns:
      `[..., W]` in the type of x.

    >>> rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), 0.0).round(3).tolist()
    [0.849, 1.131]
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> jax.Array:
    """`y = (x - mean) / sqrt(var + eps) * scale + bias` (arXiv:1607.06450).

    Args:
      x: `[..., W]`.
      scale: `[W]`.
      bias: `[W]`.
      eps: keeps the root away from zero.

    Returns:
      `[..., W]` in the type of x.

    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.ones(2), 0.0).tolist()
    [0.0, 2.0]
    """
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide = wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return wide.astype(x.dtype)


class Norm(nn.Module):
    """The norm that a configuration asks for, over the last axis."""

    config: Config
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `[..., W]`."""
        c, shape = self.config, (self.width,)
        start = nn.initializers.constant(1.0 - c.norm_offset)
        scale = leaf(self, "scale", start, shape, self.dtype)
        if not c.layer_norm:
            return rms_norm(x, scale, c.eps, c.norm_offset)
        bias = leaf(self, "bias", nn.initializers.zeros, shape, self.dtype)
        return layer_norm(x, scale, bias, c.eps)
