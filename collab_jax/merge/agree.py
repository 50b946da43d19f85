"""Parts in which deltas meet: they agree on a sign, or share positions.

Shapes: N experts, S the shape of a leaf.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from collab_jax.merge.pieces import flat
from collab_jax.merge.stack import Stack, total


@flat
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
    agree = tuple(
        jnp.where(jnp.where(positive, m > 0, m < 0), d, 0)
        for m, d in zip(moved, stack.deltas, strict=True)
    )
    return stack._replace(deltas=agree)


@flat
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


def shared_by(count: int) -> Callable[[Stack], Stack]:
    """Zeroes the entries that fewer than `count` deltas have; a consensus of masks.

    `delta'_n = delta_n [#{m : delta_m != 0} >= count]`

    Args:
      count: at least 1.

    Source: Consensus merging, arXiv 2405.07813, there after TALL masks.

    >>> import jax
    >>> deltas = jnp.array([2.0, 0.0]), jnp.array([4.0, -3.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (1.0, 1.0), jax.random.key(0))
    >>> [delta.tolist() for delta in shared_by(2)(stack).deltas]
    [[2.0, 0.0], [4.0, 0.0]]
    """

    @flat
    def apply(stack: Stack) -> Stack:
        enough = total((delta != 0).astype(jnp.int32) for delta in stack.deltas)
        shared = (jnp.where(enough >= count, delta, 0) for delta in stack.deltas)
        return stack._replace(deltas=tuple(shared))

    return apply


@flat
def largest(stack: Stack) -> Stack:
    """Keeps at each position the delta of largest magnitude; the later one of equals.

    `delta'_n = delta_n [n = argmax_m |delta_m|]`

    Args:
      stack: one leaf.

    Source: MagMax, arXiv 2407.06322.

    >>> import jax
    >>> deltas = jnp.array([2.0, -1.0, 1.0]), jnp.array([-1.0, -3.0, -1.0])
    >>> found = largest(Stack(jnp.zeros(3), deltas, (1.0, 1.0), jax.random.key(0)))
    >>> [delta.tolist() for delta in found.deltas]
    [[2.0, 0.0, 0.0], [0.0, -3.0, -1.0]]
    """
    sizes = [jnp.abs(delta) for delta in stack.deltas]
    most = functools.reduce(jnp.maximum, sizes)
    taken = jnp.zeros(stack.base.shape, bool)
    winners = []
    for delta, size in zip(reversed(stack.deltas), reversed(sizes), strict=True):
        wins = (size == most) & ~taken
        taken |= wins
        winners.append(jnp.where(wins, delta, 0))
    return stack._replace(deltas=tuple(reversed(winners)))
