"""Random masks that depend on a key and on positions alone.

The bits at a position are a hash of (key, position). Whatever part of a leaf a device
or a chunk holds, it draws the same bits; and a CPU draws them about ten times faster
than with threefry. The hash is two rounds of a 32-bit integer mixer, each with a word
of the key: good statistics, no cryptography.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from collab_jax.merge import pieces


def fold_in(key: jax.Array, number) -> jax.Array:
    """A new key from a key and a number, as `jax.random.fold_in`, by the same mixer.

    Args:
      key: one typed key.
      number: an integer below 2 ** 32, or a tracer.

    >>> key = jax.random.key(0)
    >>> bool((jax.random.key_data(fold_in(key, 1)) == jax.random.key_data(key)).all())
    False
    """
    return _fold_in(key, jnp.asarray(number, jnp.uint32))


@jax.jit  # programs fold a dozen times: it is traced and lowered once
def _fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    words = jax.random.key_data(key)
    place = jnp.arange(len(words), dtype=jnp.uint32)
    # every new word depends on all old ones
    every = lax.reduce(_mix(words + place), jnp.uint32(0), lax.bitwise_xor, (0,))
    mixed = _mix(_mix(words + number) ^ _mix(every + place + 1))
    return jax.random.wrap_key_data(mixed, impl=jax.random.key_impl(key))


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform random bits, `[*shape]` uint32.

    `bits[i] = mix(mix(i + k_0) ^ k_1)`, i the row-major position in the leaf
    modulo 2 ** 32, and `k_0, k_1` the words of the key.

    Args:
      key: one typed key; it is consumed.
      shape: of the result.

    Source: the mixer is of the form found by Chris Wellons' hash prospector.

    >>> bits(jax.random.key(0), (2, 2)).dtype
    dtype('uint32')
    """
    words = jax.random.key_data(fold_in(key, 0))
    return _mix(_mix(pieces.positions(shape) + words[0]) ^ words[1])


@jax.jit
def _mix(h: jax.Array) -> jax.Array:
    # in lax, which traces four times faster than operators do: programs hold dozens
    for shift, factor in (16, 0x21F0AAAD), (15, 0x735A2D97):
        h = lax.mul(_shifted(h, shift), np.uint32(factor))
    return _shifted(h, 15)


def _shifted(h: jax.Array, shift: int) -> jax.Array:
    return lax.bitwise_xor(h, lax.shift_right_logical(h, np.uint32(shift)))


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
