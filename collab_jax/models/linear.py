"""The one door for every product with a weight matrix.

A kernel is an array, or a NamedTuple with a method `project(x)` that stands for one
(a low-rank correction, quantised weights). Layouts, kernels of a backend and such
leaves are decided here and nowhere else.

Shapes: B rows, T tokens of this call, I size in, O size out, E experts, N tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Kernel = Any  # an array, or a NamedTuple with a method project(x)


def project(x: jax.Array, kernel: Kernel, bias: jax.Array | None = None) -> jax.Array:
    """Multiplies by a weight matrix: `y = x @ kernel + bias`.

    Args:
      x: `[..., I]`.
      kernel: `[I, O]`, or a NamedTuple with a method `project(x)`.
      bias: `[O]` or None.

    Returns:
      `[..., O]` in the type of x.

    >>> project(jnp.ones((1, 2)), jnp.eye(2), jnp.array([1.0, 2.0])).tolist()
    [[2.0, 3.0]]
    """
    if hasattr(kernel, "project"):
        y = kernel.project(x)
    else:
        y = jnp.dot(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(y.dtype)


def attend(x: jax.Array, embedding: Kernel) -> jax.Array:
    """Multiplies by the transpose of an embedding (a tied head): `y = x @ embedding.T`.

    Args:
      x: `[..., W]`.
      embedding: `[V, W]`, or a NamedTuple with a method `attend(x)`.

    Returns:
      `[..., V]` float32.

    >>> attend(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[3.0, 7.0]]
    """
    if hasattr(embedding, "attend"):
        return embedding.attend(x)
    return jax.lax.dot_general(
        x,
        embedding.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def lookup(tokens: jax.Array, embedding: Kernel) -> jax.Array:
    """Reads the rows of an embedding: `y[b, t] = embedding[tokens[b, t]]`.

    Args:
      tokens: integers of any shape.
      embedding: `[V, W]`, or a NamedTuple with a method `lookup(tokens)`.

    >>> lookup(jnp.array([1]), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[3.0, 4.0]]
    """
    if hasattr(embedding, "lookup"):
        return embedding.lookup(tokens)
    return embedding[tokens]


def leaf(module: nn.Module, name: str, init, shape: tuple[int, ...], dtype) -> Kernel:
    """A parameter of a Linen module which may be something else than an array.

    Linen compares a parameter with the shape it would be initialised to; a NamedTuple
    that stands for a kernel must pass unhindered.

    Args:
      module: the module that owns the parameter.
      name: its name.
      init: `(key, shape, dtype) -> array`, called only when the model is initialised.
      shape: its shape.
      dtype: its type.

    >>> class Scale(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return x * leaf(self, "scale", nn.initializers.ones, (2,), x.dtype)
    >>> params = {"scale": jnp.array([2.0, 3.0])}
    >>> Scale().apply({"params": params}, jnp.ones(2)).tolist()
    [2.0, 3.0]
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, dtype)


class Projection(nn.Module):
    """A weight matrix with its bias, applied by `project`."""

    size_in: int
    size_out: int
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., I]` to `[..., O]`."""
        shape = (self.size_in, self.size_out)
        init = nn.initializers.normal(self.size_in**-0.5)
        kernel = leaf(self, "kernel", init, shape, self.dtype)
        if not self.bias:
            return project(x, kernel)
        zeros = nn.initializers.zeros
        return project(x, kernel, leaf(self, "bias", zeros, shape[1:], self.dtype))


class Embedding(nn.Module):
    """A table of vectors, read by `lookup` and, as a tied head, by `attend`."""

    count: int
    width: int
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the table `[V, W]`."""
        init = nn.initializers.normal(0.02)
        shape = (self.count, self.width)
        self.embedding = leaf(self, "embedding", init, shape, self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[B, T]` to `[B, T, W]`."""
        return lookup(tokens, self.embedding)

    def attend(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, W]` to logits `[B, T, V]` float32."""
        return attend(x, self.embedding)
