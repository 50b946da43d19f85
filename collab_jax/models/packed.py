"""Weight matrices laid out, and rounded, for fast products of a few rows.

Decoding reads every weight once a token, so what counts is how many bytes that is and
how they lie: no text is written faster than bytes over the bandwidth of the memory. A
packed matrix takes the place of a kernel or an embedding in the parameters, and the
model takes it unchanged. It is made once after loading; saving sees the plain tree
again, and merging and training refuse what is packed.

- Columns lie in panels of 32: one or a few rows then read a panel from its beginning to
  its end, in eight places at once, which the memory answers faster than one, and keep
  their sums in registers. What is asked for ahead is what the same thread reads next.
- XLA on a CPU takes another way from two rows on, at 1.4 times the time of one; with
  panels the bytes decide up to eight rows of float32 or more, so that verifying a draft
  costs little more than a token (two Zen cores).
- bfloat16 is widened in the registers, and so is int8, or activations become whole
  numbers of 24 bits where a processor multiplies bytes; sums are as near as those of
  float32. Only the weights are rounded: activations of 8 bits change texts. Where the
  model itself computes in bfloat16, its activations meet weights of bfloat16 as they
  are if the processor multiplies such pairs, at twice the rate, and become whole
  numbers of 16 bits before weights of int8.
- On other devices than a CPU, and without the library, the plain form computes: a
  matrix is one panel then.

Shapes: K size in, N size out, P panels of C columns, V vocabulary, W width.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from collab_jax import native, tree
from collab_jax.lm import Params
from collab_jax.models import layout
from collab_jax.models.product import multiplied

KINDS = "packed", "bfloat16", "int8"
# kernels, the experts' among them, but not of a router: it is small, and it decides
KERNELS = r"(?!(.*/)?router/)(.*/)?(kernel|experts/(gate|up|down))"
EMBEDDING = "embed/embedding"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("panels", "scale"),
    meta_fields=("size", "dtype", "tied"),
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight matrix `[K, N]` as panels of C columns; made by `pack`.

    Column n is that of the panels times `scale[n]`.
    """

    panels: Any  # [..., P, K, C], see `layout.lay`
    scale: Any  # [..., N] float32 for int8, otherwise None
    size: int  # N
    dtype: np.dtype  # of the matrix that was packed
    tied: bool  # that matrix is an embedding [N, K], and no kernel [K, N]

    @property
    def held(self) -> np.dtype:
        """The type of the numbers in the panels."""
        return layout.held(self.panels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that was packed."""
        *lead, _, depth, _ = self.panels.shape
        own = (self.size, depth) if self.tied else (depth, self.size)
        return (*lead, *own)

    def matrix(self, dtype: Any = jnp.float32) -> jax.Array:
        """`[..., K, N]` without the scale, in a type in which it is exact."""
        return layout.matrix(self.panels, self.size, dtype)

    def unpack(self) -> jax.Array:
        """The matrix in its type, exact where the panels have that type."""
        matrix = self.matrix()
        if self.scale is not None:
            matrix = matrix * self.scale[..., None, :]
        return (matrix.mT if self.tied else matrix).astype(self.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """`x @ kernel` in the type of x."""
        return project_all(x, [self])[0]

    def attend(self, x: jax.Array) -> jax.Array:
        """The product as a head, `x @ kernel` or `x @ embedding.T`, in float32."""
        return _multiply(x, (self,))[0]

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """Rows of the embedding."""
        rows = layout.columns(self.panels, tokens)
        if self.scale is not None:
            rows = rows * self.scale[tokens][..., None]
        return rows.astype(self.dtype)


def project_all(x: jax.Array, kernels: Sequence[Packed]) -> tuple[jax.Array, ...]:
    """Products of the same rows with several packed kernels, in one call.

    Args:
      x: `[..., K]`.
      kernels: packed alike, of any N.

    Returns:
      `[..., N]` in the type of x for each kernel.

    >>> kernel = pack({"kernel": jnp.eye(2)}, "int8")["kernel"]
    >>> [y.tolist() for y in project_all(jnp.array([3.0, 4.0]), [kernel, kernel])]
    [[3.0, 4.0], [3.0, 4.0]]
    """
    return tuple(y.astype(x.dtype) for y in _multiply(x, tuple(kernels)))


def _multiply(x: jax.Array, kernels: tuple[Packed, ...]) -> tuple[jax.Array, ...]:
    """`[..., N]` float32 for each kernel."""
    flat, held = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), kernels[0].held
    short = x.dtype == jnp.bfloat16 and held != jnp.float32
    if x.size > 0 and all(map(is_fast, kernels)):
        short = short and held.name in native.library().halves
        found = _fast(flat if short else flat.astype(jnp.float32), kernels)
    elif short:
        found = jax.lax.platform_dependent(flat, kernels, cpu=_plain, default=_short)
    else:
        found = _plain(flat, kernels)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in found)


def is_fast(kernel: Packed) -> bool:
    """Whether the native library multiplies by a packed matrix.

    >>> kernel = pack({"kernel": jnp.ones((2, 3))}, "int8")["kernel"]
    >>> is_fast(kernel) == native.available()
    True
    """
    laid = kernel.panels.dtype in (np.dtype(np.float32), *layout.TOGETHER)
    return laid and kernel.panels.shape[-1] == native.LANES and native.available()


def _plain(x: jax.Array, kernels: tuple[Packed, ...]) -> tuple[jax.Array, ...]:
    """What `_fast` computes, and the derivative of both."""
    return tuple(_product(x.astype(jnp.float32), kernel) for kernel in kernels)


def _short(x: jax.Array, kernels: tuple[Packed, ...]) -> tuple[jax.Array, ...]:
    """The same in the type of x, in which the weights are exact; sums are float32."""
    return tuple(_product(x, kernel) for kernel in kernels)


def _product(x: jax.Array, kernel: Packed) -> jax.Array:
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    y = multiplied(dot, x, kernel.matrix(x.dtype))
    return y if kernel.scale is None else y * kernel.scale


@jax.custom_jvp
def _fast(x: jax.Array, kernels: tuple[Packed, ...]) -> tuple[jax.Array, ...]:
    return _dispatch(x, kernels, native.library())


@functools.partial(jax.jit, static_argnums=2)
def _dispatch(x, kernels, library):
    """The native product on a CPU, the plain one elsewhere; traced once a shape."""

    def here(x, kernels):
        return native.products(
            x,
            [kernel.panels for kernel in kernels],
            [kernel.scale for kernel in kernels if kernel.scale is not None],
            jax.eval_shape(_plain, x, kernels),
            library,
        )

    return jax.lax.platform_dependent(x, kernels, cpu=here, default=_plain)


@_fast.defjvp
def _(primals, tangents):
    return _fast(*primals), jax.jvp(_plain, primals, tangents)[1]


def pack(params: Params, kind: str = "packed") -> Params:
    """The same parameters with packed matrices, which the model takes as they are.

    Packed are all kernels but those of routers, and the embedding where it is the head
    as well. Norms, biases and the cache keep their type. What lies on several devices
    stays as it is.

    Args:
      params: of a model, or of heads and drafters over one.
      kind: "packed" changes the layout alone, and nothing where the native library
        does not run; "bfloat16" rounds the matrices to half of the bytes of float32;
        "int8" to a quarter, `round(w / s)` with `s = max_k |w| / 127` for each column.

    Raises:
      ValueError: for another `kind`, parameters that are packed already, or numbers
        that are not finite, of which int8 has none.

    >>> params = {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    >>> small = pack(params, "int8")
    >>> small["up"]["kernel"].held, small["up"]["bias"].dtype
    (dtype('int8'), dtype('float32'))
    >>> unpack(small, rounded=True)["up"]["kernel"].shape
    (4, 6)
    """
    tree.refuse_packed(params, "packed again")
    tied = isinstance(params, dict) and "head" not in params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: pack_leaf(tree.path_string(path), leaf, kind, tied),
        params,
    )


def pack_leaf(path: str, leaf: Any, kind: str, tied: bool) -> Any:
    """One leaf of `pack`: itself, or a `Packed` in its place.

    Args:
      path: of the leaf, as in "layers_0/mlp/up/kernel".
      leaf: an array of NumPy or JAX.
      kind: see `pack`.
      tied: whether the embedding is the head as well.

    Raises:
      ValueError: see `pack`.

    >>> pack_leaf("head/kernel", np.ones((4, 6), np.float32), "int8", False).shape
    (4, 6)
    >>> pack_leaf("norm/scale", np.ones(4), "int8", False).shape
    (4,)
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: one of {', '.join(KINDS)} expected")
    embedding = tied and path == EMBEDDING
    if not (embedding or re.fullmatch(KERNELS, path)) or leaf.ndim < 2:
        return leaf
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return leaf
    fast = jax.default_backend() == "cpu" and native.available()
    if kind == "packed" and not fast:
        return leaf
    matrix = np.asarray(leaf)
    dtype = matrix.dtype
    matrix = matrix.swapaxes(-1, -2) if embedding else matrix
    scale = None
    if kind == "bfloat16":
        matrix = matrix.astype(ml_dtypes.bfloat16)
    elif kind == "int8":
        matrix, scale = quantise(matrix, path)
    elif dtype not in (np.float32, ml_dtypes.bfloat16):
        return leaf
    size = matrix.shape[-1]
    return Packed(
        jnp.asarray(layout.lay(matrix, native.LANES if fast else size, fast)),
        None if scale is None else jnp.asarray(scale),
        size,
        dtype,
        embedding,
    )


def quantise(
    matrix: np.ndarray, path: str = "the matrix"
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds each column to int8: `q = round(w / s)` with `s = max |w| / 127`.

    Args:
      matrix: `[..., K, N]`.
      path: what an error calls it.

    Returns:
      q `[..., K, N]` int8 and s `[..., N]` float32; s is 1 for a column of zeros.

    Raises:
      ValueError: for numbers that are not finite.

    >>> q, s = quantise(np.float32([[1.0, 0.0], [-0.5, 0.0]]))
    >>> q.tolist(), (s * 127).tolist()
    ([[127, 0], [-64, 0]], [1.0, 127.0])
    """
    wide = matrix.astype(np.float32)
    scale = np.abs(wide).max(axis=-2, initial=0.0) / np.float32(127)
    if not np.isfinite(scale).all():
        raise ValueError(
            f"{path} holds numbers that are not finite: int8 has none such"
        )
    scale = np.where(scale == 0, np.float32(1), scale)
    whole = np.rint(wide / scale[..., None, :])
    # a scale that is denormal is itself rounded
    return np.clip(whole, -127, 127).astype(np.int8), scale


def unpack(params: Params, rounded: bool = False) -> Params:
    """The plain parameters: the inverse of `pack`.

    Args:
      params: from `pack`.
      rounded: whether matrices that `pack` rounded may come back as they are now.

    Raises:
      ValueError: for matrices that were rounded, if that is not said to be fine.

    >>> params = {"up": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    >>> bool((unpack(pack(params))["up"]["kernel"] == params["up"]["kernel"]).all())
    True
    """

    def one(path, leaf):
        return plain(leaf, tree.path_string(path), rounded)

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda node: isinstance(node, Packed)
    )


def plain(leaf: Any, path: str, rounded: bool = False) -> Any:
    """One leaf of `unpack`: itself, or the matrix of a `Packed`.

    Args:
      leaf: an array, or a `Packed`.
      path: of the leaf, for the error.
      rounded: see `unpack`.

    Raises:
      ValueError: see `unpack`.

    >>> plain(jnp.ones(2), "norm/scale").tolist()
    [1.0, 1.0]
    """
    if not isinstance(leaf, Packed):
        return leaf
    if leaf.held != leaf.dtype and not rounded:
        raise ValueError(
            f"{path} was {leaf.dtype} and is rounded to {leaf.held}: load the "
            "model without matrices=, or say unpack(params, rounded=True)"
        )
    return leaf.unpack()
