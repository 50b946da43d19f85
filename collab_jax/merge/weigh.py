"""Parts that set the weights.

Shapes: N experts.
"""

from collab_jax.merge.stack import Stack


def scale(factor):
    """Multiplies the weights.

    Args:
      factor: a number or tracer; negative to forget.

    >>> import jax, jax.numpy as jnp
    >>> stack = Stack(jnp.zeros(1), jnp.ones((2, 1)), jnp.ones(2), jax.random.key(0))
    >>> scale(0.5)(stack).weights.tolist()
    [0.5, 0.5]
    """
    return lambda stack: stack._replace(weights=factor * stack.weights)


def mean(stack: Stack) -> Stack:
    """Divides the weights by their sum: `w'_n = w_n / sum_m w_m`.

    Args:
      stack: one leaf.

    >>> import jax, jax.numpy as jnp
    >>> stack = Stack(jnp.zeros(1), jnp.ones((2, 1)), jnp.array([1.0, 3.0]),
    ...               jax.random.key(0))
    >>> mean(stack).weights.tolist()
    [0.25, 0.75]
    """
    return stack._replace(weights=stack.weights / stack.weights.sum(0))
