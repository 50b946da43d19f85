"""Products of rows with a weight matrix, in a form that every compiler does well."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def multiplied(
    dot: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, matrix: jax.Array
) -> jax.Array:
    """`dot(x, matrix)`, for which a GPU reads one row as two.

    Of one row the compiler makes sums of products, which it writes to the memory for
    small matrices. Of two it makes a product for the matrix units, with queries, keys
    and values in one kernel; the second costs nothing, as they take sixteen.

    Args:
      dot: of x and the matrix; axes of x but the last lead in the result.
      x: `[..., I]`.
      matrix: as `dot` reads it.

    >>> multiplied(jnp.dot, jnp.ones((1, 2)), jnp.eye(2)).tolist()
    [[1.0, 1.0]]
    """
    if x.ndim < 2 or math.prod(x.shape[:-1]) != 1:
        return dot(x, matrix)

    def as_two(x, matrix):
        return dot(jnp.pad(x, ((0, 1), *((0, 0),) * (x.ndim - 1))), matrix)[:1]

    return jax.lax.platform_dependent(x, matrix, cuda=as_two, rocm=as_two, default=dot)
