"""Parts that make the deltas agree on a sign, and average those that agree.

Shapes: N experts, S the shape of a leaf.
"""

import jax.numpy as jnp

from collab_jax.merge.stack import Stack, total


def elect_sign(stack: Stack) -> Stack:
    """Zeroes the entries whose sign is not that of the weighted sum of the deltas.

    `delta'_n = delta_n [sign(w_n delta_n) = s]`, `s = sign(sum_n w_n delta_n)`, with
    `s = +1` where the sum is zero.

    Args:
      stack: one leaf.

    Source: arXiv 2306.01708.

    >>> import jax
    >>> deltas = jnp.array([2.0, -1.0]), jnp.array([-1.0, -3.0])
    >>> found = elect_sign(Stack(jnp.zeros(2), deltas, (1.0, 1.0), jax.random.key(0)))
    >>> [delta.tolist() for delta in found.deltas]
    [[2.0, -1.0], [0.0, -3.0]]
    """
    moved = [w * d for w, d in zip(stack.weights, stack.deltas, strict=True)]
    positive = total(moved) >= 0
    kept = tuple(
        jnp.where(jnp.where(positive, m > 0, m < 0), d, 0)
        for m, d in zip(moved, stack.deltas, strict=True)
    )
    return stack._replace(deltas=kept)


def disjoint_mean(stack: Stack) -> Stack:
    """Weights of a mean over the experts whose entry is not zero.

    `w'_n = w_n [delta_n != 0] / sum_m w_m [delta_m != 0]`, and 0 where all are zero.

    Args:
      stack: one leaf.

    Source: arXiv 2306.01708.

    >>> import jax
    >>> deltas = jnp.array([2.0, 0.0]), jnp.array([4.0, -3.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (1.0, 1.0), jax.random.key(0))
    >>> [weight.tolist() for weight in disjoint_mean(stack).weights]
    [[0.5, 0.0], [0.5, 1.0]]
    """
    weights = [
        jnp.where(d != 0, w, 0)
        for w, d in zip(stack.weights, stack.deltas, strict=True)
    ]
    whole = total(weights)
    whole = jnp.where(whole == 0, 1, whole)
    return stack._replace(weights=tuple(weight / whole for weight in weights))
