"""Random masks that depend on a key and on positions alone.

The bits at a position are a hash of (key, position). Whatever part of a leaf a device
or a chunk holds, it draws the same bits; and a CPU draws them about ten times faster
than with threefry. The hash is two rounds of a 32-bit integer mixer, each with a word
of the key: good statistics, no cryptography.
"""

import math

import jax
import jax.numpy as jnp


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform random bits, `[*shape]` uint32.

    `bits[i] = mix(mix(i + k_0) ^ k_1)`, i the row-major position modulo 2 ** 32, and
    `k_0, k_1` two words drawn from the key.

    Args:
      key: one typed key; it is consumed.
      shape: of the result.

    Source: the mixer is "triple32"-style, found by Chris Wellons' hash prospector.

    >>> bits(jax.random.key(0), (2, 2)).dtype
    dtype('uint32')
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return _mix(_mix(position + words[0]) ^ words[1])


def _mix(h: jax.Array) -> jax.Array:
    h ^= h >> 16
    h *= jnp.uint32(0x21F0AAAD)
    h ^= h >> 15
    h *= jnp.uint32(0x735A2D97)
    return h ^ (h >> 15)


def bernoulli(key: jax.Array, p, shape: tuple[int, ...]) -> jax.Array:
    """True with probability p, `[*shape]` bool; p = 0 never, p = 1 always.

    Args:
      key: one typed key; it is consumed.
      p: a number or an array that broadcasts to the shape; resolution 2 ** -24.
      shape: of the result.

    >>> bernoulli(jax.random.key(0), 1.0, (3,)).tolist()
    [True, True, True]
    """
    drawn = (bits(key, shape) >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    return drawn < jnp.asarray(p, jnp.float32)
