"""Parts that set the weights.

Shapes: N experts.
"""

from collab_jax.merge.stack import Stack, total


def scale(factor):
    """Multiplies the weights.

    Args:
      factor: a number or tracer; negative to forget.

    >>> import jax, jax.numpy as jnp
    >>> one = jnp.ones(1)
    >>> stack = Stack(one, (one, one), (1.0, 3.0), jax.random.key(0))
    >>> scale(0.5)(stack).weights
    (0.5, 1.5)
    """
    return lambda stack: stack._replace(
        weights=tuple(factor * weight for weight in stack.weights)
    )


def mean(stack: Stack) -> Stack:
    """Divides the weights by their sum: `w'_n = w_n / sum_m w_m`.

    Args:
      stack: one leaf.

    >>> import jax, jax.numpy as jnp
    >>> one = jnp.ones(1)
    >>> mean(Stack(one, (one, one), (1.0, 3.0), jax.random.key(0))).weights
    (0.25, 0.75)
    """
    whole = total(stack.weights)
    return stack._replace(weights=tuple(weight / whole for weight in stack.weights))
