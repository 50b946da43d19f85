"""Polar factors and leading singular vectors of a matrix.

Directions whose singular value is at most `rtol` times the largest are null. An SVD
would fill them with arbitrary vectors; here they stay zero, so that what is returned
depends on the matrix continuously and a merge of LoRA deltas keeps their rank.

CPUs take a LAPACK SVD, at 576 x 1536 faster than any iteration. Elsewhere, where SVDs
are slow and products are fast, a scaled Newton-Schulz iteration is run: products of
matrices alone, which the compiler shards. A matrix much longer than wide is first
reduced to a square one by Gram matrices, so that nothing larger is ever factored.

Shapes: m rows, n columns, k the smaller of them, r a rank.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.lax.linalg import SvdAlgorithm

_HIGHEST = Precision.HIGHEST  # a TPU would multiply in bfloat16 otherwise
_LONG = 4  # a matrix so many times longer than wide is reduced to a square first
_STABLE = 1.6977  # largest scaling that keeps the top directions above a tenth


def null_tolerance(shape: tuple[int, ...], dtype) -> float:
    """Below which share of the largest singular value a direction counts as null.

    `10 * eps * sqrt(k)`: rounding the entries of a matrix moves its singular values by
    about eps times the largest, and an SVD by a small multiple of that.

    >>> 2e-5 < null_tolerance((576, 1536), jnp.float32) < 4e-5
    True
    """
    return 10 * float(jnp.finfo(dtype).eps) * math.sqrt(max(1, min(shape)))


def polar(x: jax.Array, rtol=None) -> jax.Array:
    """The polar factor: the nearest matrix with orthonormal rows or columns, `[m, n]`.

    `U V^T` of the thin SVD `x = U S V^T`, with the null directions left out. As in any
    backward stable algorithm its error is about eps times the condition number.

    Args:
      x: `[m, n]`, float32 or float64.
      rtol: singular values up to `rtol` times the largest are null; None is
        `null_tolerance`.

    Raises:
      ValueError: for what is no matrix.

    Source: Higham, Functions of Matrices, 2008, chapter 8.

    >>> polar(jnp.array([[3.0, 0.0, 0.0], [0.0, -0.5, 0.0]])).tolist()
    [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
    >>> polar(jnp.zeros((2, 2))).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    _check_matrix(x)
    if x.shape[0] < x.shape[1]:
        return polar(x.T, rtol).T
    rtol = null_tolerance(x.shape, x.dtype) if rtol is None else rtol
    if x.shape[0] > _LONG * x.shape[1]:
        q, t = thin(x)
        return product(q, polar(t, rtol))
    return jax.lax.platform_dependent(
        x,
        cpu=functools.partial(by_svd, rtol=rtol),
        default=functools.partial(by_products, rtol=rtol),
    )


def by_svd(x: jax.Array, rtol) -> jax.Array:
    """`polar` by the SVD of the platform.

    Args:
      x: `[m, n]`.
      rtol: see `polar`.

    >>> by_svd(jnp.array([[2.0], [0.0]]), 1e-6).tolist()
    [[1.0], [0.0]]
    """
    u, s, v = svd(x, rtol)
    return product(u * (s > 0), v.T)


def by_products(x: jax.Array, rtol: float) -> jax.Array:
    """`polar` by products of matrices: a scaled Newton-Schulz iteration.

    `X <- c X (3 - c^2 X^T X) / 2`, `c = min(sqrt(3 / (1 + l + l^2)), 1.6977)`, where
    `[l, 1]` holds the singular values; the number of steps follows from `rtol`, 15 in
    float32. Only where a Cholesky factorisation finds a null direction, the
    eigenvectors of `U^T x` (singular values, not their squares) sort these out.

    Args:
      x: `[m, n]`, m >= n.
      rtol: a number, see `polar`.

    Source: Chen and Chow, A stable scaling of Newton-Schulz for improving the sign
      function computation of a Hermitian matrix, preprint ANL/MCS-P5059-0114, 2014.

    >>> by_products(jnp.array([[2.0, 0.0], [0.0, 1e-3]]), 1e-6).round(5).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    largest = jnp.abs(x).max()
    scaled = x / jnp.where(largest > 0, largest, 1)  # so that no square overflows
    bound = _norm_bound(scaled)
    scaled = scaled / jnp.where(bound > 0, bound, 1)

    def step(u, c):
        square = c**2 * product(u.T, u)
        return c / 2 * (3 * u - product(u, square)), None

    scales = jnp.asarray(_scales(rtol / 2, jnp.finfo(x.dtype).eps), x.dtype)
    u, _ = jax.lax.scan(step, scaled, scales)
    h = product(u.T, scaled)
    h = (h + h.T) / 2
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    full = jnp.isfinite(jnp.linalg.cholesky(h - rtol * eye)).all()

    def clean(u):
        s, q = jnp.linalg.eigh(h)
        q = q * (s > rtol * s[-1])
        return product(u, product(q, q.T))

    return jax.lax.cond(full, lambda u: u, clean, u)


def _norm_bound(x: jax.Array) -> jax.Array:
    """A number between the largest singular value and k^(1/16) times it."""
    square = product(x.T, x)
    fourth = product(square, square)
    size = jnp.sqrt((fourth**2).sum())
    size = jnp.where(size > 0, size, 1)
    eighth = product(fourth / size, fourth / size)
    sixteenth = jnp.sqrt((eighth**2).sum()) * size**2
    return 1.001 * sixteenth ** (1 / 8)


@functools.lru_cache
def _scales(low: float, eps: float) -> tuple[float, ...]:
    """The factors of the iteration, for singular values in [low, 1]."""
    found, low = [], max(float(low), float(eps) ** 2)
    while 1 - low > 4 * eps:
        c = min(math.sqrt(3 / (1 + low + low**2)), _STABLE)
        image = [c * s * (3 - (c * s) ** 2) / 2 for s in (low, 1.0)]
        low = min(*image, 1.0)
        found.append(c)
    return (*found, 1.0, 1.0)  # steps without scaling remove the rounding of the others


def svd(x: jax.Array, rtol=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin SVD, null directions zero.

    `x = U diag(s) V^T`. Columns of U and V that belong to a null direction are zero,
    and so is their singular value.

    Args:
      x: `[m, n]`.
      rtol: see `polar`.

    Returns:
      U `[m, k]`, s `[k]` in descending order, V `[n, k]`.

    Raises:
      ValueError: for what is no matrix.

    >>> u, s, v = svd(jnp.array([[0.0, 2.0], [0.0, 0.0]]))
    >>> s.tolist(), abs(u[:, 1]).tolist(), abs(v[:, 0]).tolist()
    ([2.0, 0.0], [0.0, 0.0], [0.0, 1.0])
    """
    _check_matrix(x)
    if x.shape[0] < x.shape[1]:
        v, s, u = svd(x.T, rtol)
        return u, s, v
    rtol = null_tolerance(x.shape, x.dtype) if rtol is None else rtol
    if x.shape[0] > _LONG * x.shape[1]:
        q, t = thin(x)
        u, s, v = svd(t, rtol)
        return product(q, u), s, v
    cpu = _surely if x.size else _platform_svd
    u, s, vt = jax.lax.platform_dependent(x, cpu=cpu, default=_platform_svd)
    kept = s > rtol * s[:1]
    return u * kept, s * kept, vt.T * kept


def _platform_svd(x: jax.Array, algorithm=SvdAlgorithm.DEFAULT):
    found = jax.lax.linalg.svd(x, full_matrices=False, algorithm=algorithm)
    return tuple(found)


def _by_steps(x: jax.Array):
    return _platform_svd(x, SvdAlgorithm.QR)


@jax.custom_jvp
def _surely(x: jax.Array):
    """LAPACK's SVD, by QR steps where its divide and conquer has failed.

    That happens, with NaN everywhere: seen in the projections of real models, where
    nearly orthogonal bases come together. As turns of a loop both take the same memory.
    """

    def wanted(carry):
        turn, (_, s, _) = carry
        failed = jnp.isnan(s).any() & jnp.isfinite(x).all()
        return (turn == 0) | ((turn == 1) & failed)

    def attempt(carry):
        turn, _ = carry
        return turn + 1, jax.lax.cond(turn == 0, _platform_svd, _by_steps, x)

    # of x, so that they do not exist before it
    first = jax.lax.optimization_barrier(x)[0, 0]
    blank = [jnp.full(y.shape, first) for y in jax.eval_shape(_platform_svd, x)]
    return jax.lax.while_loop(wanted, attempt, (0, tuple(blank)))[1]


@_surely.defjvp
def _(primals, tangents):
    return jax.jvp(_by_steps, primals, tangents)


def top_svd(x: jax.Array, r: int, rtol=None):
    """The r largest singular values and their vectors, null directions zero.

    The leading eigenvectors Q of the smaller Gram matrix give a subspace; inside it
    the singular vectors are those of `x Q`, whose accuracy the squaring does not touch.
    At 576 x 1536 with r = 192 twice as fast as a whole SVD. Vectors agree with it as
    far as the gap behind the r-th singular value decides them.

    Args:
      x: `[m, n]`.
      r: at most k.
      rtol: see `polar`.

    Returns:
      U `[m, r]`, s `[r]`, V `[n, r]`.

    Raises:
      ValueError: for what is no matrix, or for a rank that it cannot have.

    >>> u, s, v = top_svd(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
    >>> s.tolist(), abs(u).round(4).tolist()
    ([3.0, 2.0], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    """
    _check_matrix(x)
    k = min(x.shape)
    if not 0 <= r <= k:
        raise ValueError(f"rank {r} of a matrix {x.shape}: 0 to {k} is expected")
    if 2 * r > k or r == 0:  # too much is asked for to save anything
        u, s, v = svd(x, rtol)
        return u[:, :r], s[:r], v[:, :r]
    if x.shape[0] < x.shape[1]:
        v, s, u = top_svd(x.T, r, rtol)
        return u, s, v
    rtol = null_tolerance(x.shape, x.dtype) if rtol is None else rtol
    _, q = jnp.linalg.eigh(product(x.T, x))
    y = product(x, q[:, : -r - 1 : -1])  # columns nearly orthogonal
    size = jnp.linalg.norm(y, axis=0)
    kept = size > rtol * size[0]
    y = y * jnp.where(kept, 1 / jnp.where(kept, size, 1), 0)
    gram = product(y.T, y) + jnp.diag((~kept).astype(y.dtype))
    factor = jnp.linalg.cholesky(gram)
    w = jax.lax.linalg.triangular_solve(factor, y, transpose_a=True, lower=True)
    v, s, rotation = svd(product(x.T, w), rtol)
    return product(w, rotation), s, v


def thin(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A long matrix as orthonormal columns times a square matrix, by Gram matrices.

    `x = Q T`: three rounds of `Q^T Q + shift = L L^T`, `Q <- Q L^-T`. The shift, some
    eps, lets a round through whatever the conditioning; the next sees a matrix that is
    so much better conditioned. Where x is null, Q T is zero but Q need not be.

    Args:
      x: `[m, n]`, m >= n.

    Returns:
      Q `[m, n]` and T `[n, n]`.

    Source: shifted CholeskyQR3, arXiv 1809.11085.

    >>> q, t = thin(jnp.array([[3.0], [4.0]]))
    >>> q.round(5).tolist(), abs(t).round(5).tolist()
    ([[0.6], [0.8]], [[5.0]])
    """
    n = x.shape[1]
    eps = float(jnp.finfo(x.dtype).eps)
    largest = jnp.abs(x).max()
    largest = jnp.where(largest > 0, largest, 1)
    q, t = x / largest, largest * jnp.eye(n, dtype=x.dtype)
    for safety in (10 * math.sqrt(n), 10 * math.sqrt(n), 20):
        gram = product(q.T, q)
        shift = safety * eps * jnp.diagonal(gram).max()
        shift = jnp.where(shift > 0, shift, 1)
        factor = jnp.linalg.cholesky(gram + shift * jnp.eye(n, dtype=x.dtype))
        q = jax.lax.linalg.triangular_solve(factor, q, transpose_a=True, lower=True)
        t = product(factor.T, t)
    return q, t


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of matrices in their own precision on every platform.

    >>> product(jnp.ones((1, 2)), jnp.ones((2, 1))).tolist()
    [[2.0]]
    """
    return jnp.matmul(a, b, precision=_HIGHEST)


def _check_matrix(x: jax.Array) -> None:
    if jnp.ndim(x) != 2:
        raise ValueError(f"an array of shape {jnp.shape(x)} was given, not a matrix")
