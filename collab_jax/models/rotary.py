"""Rotary position embeddings and the rules that stretch them to longer texts.

Pair i of the R rotated dimensions of a head turns by `position * frequency[i]`, where
`frequency[i] = base ** (-2 i / R)` before scaling. The pair is (i, i + R/2).

Shapes: B rows, T tokens of this call, H heads, K size of a head, R rotated dimensions.
Source: RoFormer, arXiv:2104.09864.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def _frequencies(base: float, size: int) -> np.ndarray:
    # the float32 steps of the reference, so that position 100,000 turns by as much
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1) / np.power(float(base), exponent.astype(float)).astype(
        np.float32
    )


class Interpolation(NamedTuple):
    """All frequencies divided by one factor (arXiv:2306.15595)."""

    factor: float

    def apply(self, base: float, size: int) -> tuple[np.ndarray, float]:
        """Frequencies `[R / 2]`, and what cosine and sine are multiplied by."""
        return _frequencies(base, size) / np.float32(self.factor), 1.0


class Llama3(NamedTuple):
    """Low frequencies divided by a factor, high ones kept, between them a ramp.

    Source: The Llama 3 Herd of Models, arXiv:2407.21783.
    """

    factor: float
    low: float  # wavelengths longer than original / low are divided
    high: float  # wavelengths shorter than original / high are kept
    original: int  # context of the first training, tokens

    def apply(self, base: float, size: int) -> tuple[np.ndarray, float]:
        """Frequencies `[R / 2]`, and what cosine and sine are multiplied by."""
        plain = _frequencies(base, size)
        turns = self.original / (2 * math.pi / plain)
        ramp = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return ((1 - ramp) * plain / self.factor + ramp * plain).astype(np.float32), 1.0


class Yarn(NamedTuple):
    """A ramp over the pairs between divided and kept frequencies (arXiv:2309.00071)."""

    factor: float
    original: int  # context of the first training, tokens
    attention: float  # what cosine and sine are multiplied by
    fast: float = 32.0  # turns over the original context from which pairs are kept
    slow: float = 1.0  # turns up to which pairs are divided by the factor
    truncate: bool = True  # whether the ends of the ramp are whole dimensions

    def apply(self, base: float, size: int) -> tuple[np.ndarray, float]:
        """Frequencies `[R / 2]`, and what cosine and sine are multiplied by."""

        def dimension(turns):
            around = self.original / (turns * 2 * math.pi)
            return size * math.log(around) / (2 * math.log(base))

        low, high = dimension(self.fast), dimension(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        high = high + 0.001 if high == low else high
        index = np.arange((size + 1) // 2, dtype=np.float32)
        divided = np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
        plain = _frequencies(base, size)
        mixed = plain / np.float32(self.factor) * divided + plain * (1 - divided)
        return mixed.astype(np.float32), self.attention


class LongRope(NamedTuple):
    """One divisor per pair, from a list for short or for long texts (arXiv:2402.13753).

    The reference changes lists, for all positions at once, when the text outgrows the
    original context. What was cached would then be wrong, so here the list is part of
    the configuration: see `long_context`.
    """

    short: tuple[float, ...]  # [R / 2], divisors up to the original context
    long: tuple[float, ...]  # [R / 2], divisors beyond it
    original: int  # context of the first training, tokens
    attention: float  # what cosine and sine are multiplied by
    use_long: bool = False

    def apply(self, base: float, size: int) -> tuple[np.ndarray, float]:
        """Frequencies `[R / 2]`, and what cosine and sine are multiplied by."""
        divisor = np.asarray(self.long if self.use_long else self.short, np.float32)
        return _frequencies(base, size) / divisor, self.attention


Scaling = Interpolation | Llama3 | Yarn | LongRope


class Rotary(NamedTuple):
    """How one layer turns its queries and keys."""

    base: float = 10000.0
    fraction: float = 1.0  # part of each head that is turned
    scaling: Scaling | None = None


def frequencies(rotary: Rotary, size: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and what cosine and sine are multiplied by.

    Args:
      rotary: base, fraction and scaling.
      size: K, size of a head.

    Returns:
      `[R / 2]` float32, and a number.

    >>> turns, scale = frequencies(Rotary(base=100.0), size=4)
    >>> turns.tolist(), scale
    ([1.0, 0.1], 1.0)
    """
    turned = int(size * rotary.fraction)
    if rotary.scaling is None:
        return _frequencies(rotary.base, turned), 1.0
    return rotary.scaling.apply(rotary.base, turned)


def angles(
    rotary: Rotary, size: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `position * frequency` for every token and pair.

    Args:
      rotary: base, fraction and scaling.
      size: K, size of a head.
      positions: `[B, T]` integers.

    Returns:
      Two arrays `[B, T, R / 2]` float32.

    >>> cos, sin = angles(Rotary(), 4, jnp.array([[0, 1]]))
    >>> cos[0, :, 0].round(4).tolist()
    [1.0, 0.5403]
    """
    turns, scale = frequencies(rotary, size)
    radians = positions[..., None].astype(jnp.float32) * turns

    def fused(radians):
        return jnp.cos(radians) * scale, jnp.sin(radians) * scale

    def in_a_loop(radians):
        # which XLA does not merge with what they turn; merged, they are computed again
        # for every head of every layer
        found = jax.lax.map(
            lambda own: jnp.where(own, *fused(radians)), jnp.array([True, False])
        )
        return found[0], found[1]

    return jax.lax.platform_dependent(radians, cpu=in_a_loop, default=fused)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each pair (x_i, x_{i + R/2}) of every head by its angle.

    Args:
      x: `[B, T, H, K]`; dimensions from R on stay as they are.
      cos: `[B, T, R / 2]`.
      sin: `[B, T, R / 2]`.

    Returns:
      `[B, T, H, K]` in the type of x.

    >>> x = jnp.array([[[[1.0, 0.0]]]])
    >>> rotate(x, jnp.array([[[0.0]]]), jnp.array([[[1.0]]]))[0, 0, 0].tolist()
    [0.0, 1.0]
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = [part.astype(x.dtype) for part in turned]
    return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)
