"""Parts that make the deltas agree on a sign, and average those that agree.

Shapes: N experts, S the shape of a leaf.
"""

import jax.numpy as jnp

from collab_jax.merge.stack import Stack, spread


def elect_sign(stack: Stack) -> Stack:
    """Zeroes the entries whose sign is not that of the weighted sum of the deltas.

    `delta'_n = delta_n [sign(w_n delta_n) = s]`, `s = sign(sum_n w_n delta_n)`, with
    `s = +1` where the sum is zero.

    Args:
      stack: one leaf.

    Source: arXiv 2306.01708.

    >>> import jax
    >>> deltas = jnp.array([[2.0, -1.0], [-1.0, -3.0]])
    >>> elect_sign(Stack(jnp.zeros(2), deltas, jnp.ones(2), jax.random.key(0))).deltas
    Array([[ 2., -1.],
           [ 0., -3.]], dtype=float32)
    """
    moved = spread(stack) * stack.deltas
    positive = moved.sum(0) >= 0
    agrees = jnp.where(positive, moved > 0, moved < 0)
    return stack._replace(deltas=jnp.where(agrees, stack.deltas, 0))


def disjoint_mean(stack: Stack) -> Stack:
    """Weights of a mean over the experts whose entry is not zero.

    `w'_n = w_n [delta_n != 0] / sum_m w_m [delta_m != 0]`, and 0 where all are zero.

    Args:
      stack: one leaf.

    Source: arXiv 2306.01708.

    >>> import jax
    >>> deltas = jnp.array([[2.0, 0.0], [4.0, -3.0]])
    >>> stack = Stack(jnp.zeros(2), deltas, jnp.ones(2), jax.random.key(0))
    >>> disjoint_mean(stack).weights
    Array([[0.5, 0. ],
           [0.5, 1. ]], dtype=float32)
    """
    weights = jnp.where(stack.deltas != 0, spread(stack), 0)
    total = weights.sum(0)
    return stack._replace(weights=weights / jnp.where(total == 0, 1, total))
