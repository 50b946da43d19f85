"""Small heads over the hidden states of a backbone.

`linear` reads a number (or a few) from each token: a value, a reward, a router's score.
`residual` is the head of Medusa (arXiv:2401.10774) and of SpecDec++'s acceptance
prediction (arXiv:2405.19715): residual blocks and then a linear layer.

Shapes: `...` any leading axes, W width of the hidden states, O outputs.
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
    """`x = x + silu(W x + c)` a few times, then a linear layer."""

    width: int
    outputs: int
    blocks: int
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the blocks and the last layer."""
        size = (self.width, self.width, True, self.dtype)
        self.block = [Projection(*size) for _ in range(self.blocks)]
        self.out = Projection(self.width, self.outputs, True, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., W]` to `[..., O]` float32."""
        for block in self.block:
            x = x + jax.nn.silu(block(x))
        return self.out(x).astype(jnp.float32)


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
    width: int, outputs: int = 1, blocks: int = 1, dtype: Any = jnp.float32
) -> Head:
    """Residual blocks `x <- x + silu(W x + c)`, then a linear layer.

    The blocks start at W = 0, c = 0, so that a new head is a linear one.

    Args:
      width: W.
      outputs: O.
      blocks: how many.
      dtype: type of the parameters; outputs are float32.

    Raises:
      ValueError: for sizes below 1, or a negative number of blocks.

    >>> head = residual(width=4, outputs=10, blocks=2)
    >>> params = head.init(jax.random.key(0))
    >>> sorted(params), head.apply(params, jnp.ones((2, 4))).shape
    (['block_0', 'block_1', 'out'], (2, 10))
    """
    if width < 1 or outputs < 1 or blocks < 0:
        raise ValueError(
            f"width {width}, outputs {outputs}, blocks {blocks}: sizes of at least 1 "
            "and 0 or more blocks are expected"
        )
    module = Blocks(width, outputs, blocks, dtype)

    def init(key: jax.Array) -> Params:
        params = dict(module.init(key, jnp.zeros((1, width), dtype))["params"])
        for i in range(blocks):
            params[f"block_{i}"] = jax.tree.map(jnp.zeros_like, params[f"block_{i}"])
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        y: Any = module.apply({"params": params}, x)
        return y

    return Head(init, apply)
