"""The one door for every product with a weight matrix.

A kernel is an array, or a value with a method `project(x)` that stands for one: a
low-rank correction, or a packed matrix, which may be rounded and which native code may
multiply. Layouts, kernels of a backend and such leaves are decided here and nowhere
else; the form for arrays is the plain one that the others are compared with.

Shapes: B rows, T tokens of this call, I size in, O size out, E experts, N tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax.models import packed
from collab_jax.models.packed import Packed
from collab_jax.models.product import multiplied

Kernel = Any  # an array, or a value with a method project(x)


def project(x: jax.Array, kernel: Kernel, bias: jax.Array | None = None) -> jax.Array:
    """Multiplies by a weight matrix: `y = x @ kernel + bias`.

    Args:
      x: `[..., I]`.
      kernel: `[I, O]`, or a value with a method `project(x)`.
      bias: `[O]` or None.

    Returns:
      `[..., O]` in the type of x.

    >>> project(jnp.ones((1, 2)), jnp.eye(2), jnp.array([1.0, 2.0])).tolist()
    [[2.0, 3.0]]
    """
    if hasattr(kernel, "project"):
        y = kernel.project(x)
    else:
        y = multiplied(jnp.dot, x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(y.dtype)


def project_all(
    x: jax.Array, kernels: Sequence[Kernel], biases: Sequence[jax.Array | None]
) -> tuple[jax.Array, ...]:
    """Multiplies the same x by several weight matrices, packed ones in one go.

    Args:
      x: `[..., I]`.
      kernels: each `[I, O]`, O may differ; see `project`.
      biases: for each kernel `[O]`, or None.

    Returns:
      `[..., O]` in the type of x for each kernel.

    >>> q, k = project_all(jnp.ones((1, 2)), [jnp.eye(2), 2 * jnp.eye(2)], [None, None])
    >>> q.tolist(), k.tolist()
    ([[1.0, 1.0]], [[2.0, 2.0]])
    """
    alike = {isinstance(k, Packed) and k.panels.dtype for k in kernels}
    if len(alike) > 1 or False in alike:
        pairs = zip(kernels, biases, strict=True)
        return tuple(project(x, kernel, bias) for kernel, bias in pairs)
    products = zip(packed.project_all(x, kernels), biases, strict=True)
    return tuple(y if b is None else y + b.astype(y.dtype) for y, b in products)


def is_native(kernel: Kernel) -> bool:
    """Whether native code multiplies by a weight matrix, on a CPU.

    >>> is_native(jnp.eye(2))
    False
    """
    return isinstance(kernel, Packed) and packed.is_fast(kernel)


def contract(equation: str, x: jax.Array, kernels: Kernel) -> jax.Array:
    """Multiplies by the weight matrices of several experts, as `jnp.einsum` does.

    Args:
      equation: as in "nw,ewf->enf"; the axes of one matrix are the last two, and what
        x and the matrices share before them leads in both.
      x: as the equation says.
      kernels: likewise, an array or a `Packed` with leading axes.

    Returns:
      What the equation says, in the type of x.

    >>> x, kernels = jnp.ones((1, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> contract("nw,ewf->enf", x, kernels).tolist()
    [[[1.0, 1.0]], [[2.0, 2.0]]]
    """
    if not isinstance(kernels, Packed):
        return jnp.einsum(equation, x, kernels.astype(x.dtype))
    operands, out = equation.split("->")
    left, right = operands.split(",")
    lead, size_in, size_out = right[:-2], right[-2], right[-1]
    multiply = project
    for axis in reversed(lead):
        multiply = jax.vmap(multiply, (0 if axis in left else None, 0))
    rest = [axis for axis in left if axis not in (*lead, size_in)]
    found = "".join((*lead, *rest, size_out))
    return jnp.einsum(f"{found}->{out}", multiply(x, kernels))


def pick(kernels: Kernel, chosen: jax.Array) -> Kernel:
    """The matrices of chosen experts: `kernels[chosen]`.

    Args:
      kernels: `[E, I, O]`, an array or a `Packed`.
      chosen: integers of any shape.

    >>> pick(jnp.ones((3, 4, 5)), jnp.array([[0, 2]])).shape
    (1, 2, 4, 5)
    """
    return jax.tree.map(lambda leaf: leaf[chosen], kernels)


def unembed(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Multiplies by a head of its own, whose sums are not rounded: `y = x @ kernel`.

    Logits of bfloat16 have eight bits, and tie where those of float32 do not.

    Args:
      x: `[..., W]`.
      kernel: `[W, V]`, or a value with a method `project(x)`, which may round.

    Returns:
      `[..., V]` float32.

    >>> unembed(jnp.ones((1, 2), jnp.bfloat16), jnp.array([[256.0], [1.0]])).tolist()
    [[257.0]]
    """
    if isinstance(kernel, Packed):
        return kernel.attend(x)
    if hasattr(kernel, "project"):
        return kernel.project(x).astype(jnp.float32)
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return multiplied(dot, x, kernel.astype(x.dtype))


def attend(x: jax.Array, embedding: Kernel) -> jax.Array:
    """Multiplies by the transpose of an embedding (a tied head): `y = x @ embedding.T`.

    Args:
      x: `[..., W]`.
      embedding: `[V, W]`, or a value with a method `attend(x)`.

    Returns:
      `[..., V]` float32.

    >>> attend(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[3.0, 7.0]]
    """
    if hasattr(embedding, "attend"):
        return embedding.attend(x)
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return multiplied(dot, x, embedding.astype(x.dtype))


def lookup(tokens: jax.Array, embedding: Kernel) -> jax.Array:
    """Reads the rows of an embedding: `y[b, t] = embedding[tokens[b, t]]`.

    Args:
      tokens: integers of any shape.
      embedding: `[V, W]`, or a value with a method `lookup(tokens)`.

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


@functools.partial(jax.jit, static_argnums=0)  # traced once for equal modules
def drawn(module: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Random parameters of a model that reads tokens, a plain nested dict.

    Args:
      module: called with tokens `[B, T]` it touches every parameter.
      key: consumed.

    >>> drawn(Embedding(3, 2), jax.random.key(0))["embedding"].shape
    (3, 2)
    """
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


class Projection(nn.Module):
    """A weight matrix with its bias, applied by `project`."""

    size_in: int
    size_out: int
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def weights(self) -> tuple[Kernel, jax.Array | None]:
        """The matrix `[I, O]`, and the bias `[O]` or None."""
        shape = (self.size_in, self.size_out)
        init = nn.initializers.normal(self.size_in**-0.5)
        kernel = leaf(self, "kernel", init, shape, self.dtype)
        if not self.bias:
            return kernel, None
        zeros = nn.initializers.zeros
        return kernel, leaf(self, "bias", zeros, shape[1:], self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., I]` to `[..., O]`."""
        return project(x, *self.weights())

    def unembed(self, x: jax.Array) -> jax.Array:
        """Maps `[..., W]` to logits `[..., V]` float32, without a bias."""
        return unembed(x, self.weights()[0])


def together(x: jax.Array, *layers: Projection) -> tuple[jax.Array, ...]:
    """Several projections of the same x, see `project_all`.

    Args:
      x: `[..., I]`.
      layers: bound to their parameters.

    >>> class Pair(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return together(x, Projection(2, 3), Projection(2, 1, True))
    >>> x = jnp.ones((4, 2))
    >>> pair = Pair().init_with_output(jax.random.key(0), x)[0]
    >>> [y.shape for y in pair]
    [(4, 3), (4, 1)]
    """
    kernels, biases = zip(*(layer.weights() for layer in layers), strict=True)
    return project_all(x, kernels, biases)


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
