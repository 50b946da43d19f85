"""Small heads over the hidden states of a backbone.

`linear` reads a number (or a few) from each token: a value, a reward, a router's score.
`residual` is the head of Medusa (arXiv:2401.10774) and of SpecDec++'s acceptance
prediction (arXiv:2405.19715): residual blocks and then a linear layer. `feed_forward`
is the layer of blockwise parallel decoding (arXiv:1811.03115).

Shapes: `...` any leading axes, W width of the hidden states, I width inside, O outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax.lm import Params
from collab_jax.models.linear import Projection


class Head(NamedTuple):
    """A head as two pure functions."""

    init: Callable[[jax.Array], Params]  # key -> a plain nested dict
    apply: Callable[[Params, jax.Array], jax.Array]  # (params, [..., W]) -> [..., O]


class Blocks(nn.Module):
    """`x = x + silu(W x + c)` a few times, then a linear layer if there are outputs."""

    width: int
    outputs: int | None
    blocks: int
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the blocks and the last layer."""
        size = (self.width, self.width, True, self.dtype)
        self.block = [Projection(*size) for _ in range(self.blocks)]
        if self.outputs is not None:
            self.out = Projection(self.width, self.outputs, True, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., W]` to `[..., O]` float32, or to `[..., W]` in the type of x."""
        for block in self.block:
            x = x + jax.nn.silu(block(x))
        return x if self.outputs is None else self.out(x).astype(jnp.float32)


class FeedForward(nn.Module):
    """`x + down(relu(up x))`."""

    width: int
    inner: int
    dtype: Any = jnp.float32

    def setup(self):
        """Declares both layers."""
        self.up = Projection(self.width, self.inner, True, self.dtype)
        self.down = Projection(self.inner, self.width, True, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., W]` to `[..., W]` in the type of x."""
        return x + self.down(jax.nn.relu(self.up(x)))


def linear(width: int, outputs: int = 1, dtype: Any = jnp.float32) -> Head:
    """A linear head: `y = x @ kernel + bias`.

    Args:
      width: W.
      outputs: O.
      dtype: type of the parameters; outputs are float32.

    >>> head = linear(width=4)
    >>> head.apply(head.init(jax.random.key(0)), jnp.ones((2, 3, 4))).shape
    (2, 3, 1)
    """
    return residual(width, outputs, 0, dtype)


def residual(
    width: int, outputs: int | None = 1, blocks: int = 1, dtype: Any = jnp.float32
) -> Head:
    """Residual blocks `x <- x + silu(W x + c)`, then a linear layer.

    The blocks start at W = 0, c = 0, so that a new head is a linear one.

    Args:
      width: W.
      outputs: O; None for the blocks alone, a new hidden state in the place of the old.
      blocks: how many.
      dtype: type of the parameters; outputs are float32, hidden states as they came.

    Raises:
      ValueError: for sizes below 1, or a negative number of blocks.

    >>> head = residual(width=4, outputs=10, blocks=2)
    >>> params = head.init(jax.random.key(0))
    >>> sorted(params), head.apply(params, jnp.ones((2, 4))).shape
    (['block_0', 'block_1', 'out'], (2, 10))
    """
    if width < 1 or (outputs is not None and outputs < 1) or blocks < 0:
        raise ValueError(
            f"width {width}, outputs {outputs}, blocks {blocks}: sizes of at least 1 "
            "and 0 or more blocks are expected"
        )
    start = {f"block_{i}" for i in range(blocks)}
    return _head(Blocks(width, outputs, blocks, dtype), start)


def feed_forward(width: int, inner: int, dtype: Any = jnp.float32) -> Head:
    """A new hidden state in the place of the old: `y = x + W2 relu(W1 x + c1) + c2`.

    It starts at W2 = 0, c2 = 0, so that a new layer is the identity.

    Args:
      width: W.
      inner: I.
      dtype: type of the parameters; outputs have the type of the inputs.

    Raises:
      ValueError: for sizes below 1.

    Source: arXiv 1811.03115, figure 3.

    >>> head = feed_forward(width=2, inner=8)
    >>> params = head.init(jax.random.key(0))
    >>> head.apply(params, jnp.array([3.0, 4.0])).tolist()
    [3.0, 4.0]
    """
    if width < 1 or inner < 1:
        raise ValueError(
            f"width {width}, inner {inner}: sizes of at least 1 are expected"
        )
    return _head(FeedForward(width, inner, dtype), {"down"})


def _head(module: Any, zero: set[str]) -> Head:
    """The head of a Linen module over `width`, of which some layers start at 0."""

    def init(key: jax.Array) -> Params:
        x = jnp.zeros((1, module.width), module.dtype)
        params = dict(module.init(key, x).get("params", {}))
        return params | {
            name: jax.tree.map(jnp.zeros_like, params[name]) for name in zero
        }

    def apply(params: Params, x: jax.Array) -> jax.Array:
        y: Any = module.apply({"params": params}, x)
        return y

    return Head(init, apply)
