"""Means on the sphere, as weights: nothing but norms and angles is read of the leaves.

Every iteration of a mean runs on N x N numbers, so that a leaf is passed over once.
Angles come from distances of unit vectors, which keep their precision where a cosine is
near 1, as it is between fine-tunes of one model.

Shapes: N experts, S the shape of a leaf, A the shape that a sum over `axis` leaves.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from collab_jax.merge.stack import total

Axis = int | None  # None: over the whole leaf
Length = Callable[[jax.Array], jax.Array]


def norm(x: jax.Array, axis: Axis = None) -> jax.Array:
    """The Euclidean norm over an axis that stays with length 1, or of a whole leaf.

    The gradient at zero is zero.

    Args:
      x: `[*S]`.
      axis: which one, or None for all: the result is then `[]`.

    >>> float(norm(jnp.array([[3.0], [4.0]])))
    5.0
    """
    square = inner(x, x, axis)
    safe = jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, jnp.sqrt(safe), 0)


def inner(a: jax.Array, b: jax.Array, axis: Axis = None) -> jax.Array:
    """The inner product over an axis that stays with length 1, or of whole leaves.

    Args:
      a: `[*S]`.
      b: `[*S]`.
      axis: see `norm`.

    >>> float(inner(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
    11.0
    """
    product = a * b
    if axis is None or product.ndim == 0:
        return product.sum()
    return product.sum(axis, keepdims=True)


def cosine(
    a: jax.Array, b: jax.Array, axis: Axis = None, length: Length | None = None
) -> jax.Array:
    """The cosine of the angle between two leaves, in [-1, 1], `[*A]`.

    Args:
      a: `[*S]`.
      b: `[*S]`.
      axis: see `norm`.
      length: norm -> what to divide by; None leaves what is not above 1e-8 as it is.

    >>> float(cosine(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))
    0.0
    """
    by = (lambda n: jnp.where(n > 1e-8, n, 1)) if length is None else length
    return jnp.clip(inner(a / by(norm(a, axis)), b / by(norm(b, axis)), axis), -1, 1)


def arc(cosine: jax.Array, t, straight) -> tuple[jax.Array, jax.Array]:
    """The two weights of spherical interpolation.

    `w = (sin((1 - t) theta), sin(t theta)) / sin(theta)`, `theta = acos(cosine)`, and
    `(1 - t, t)` where the way is straight.

    Args:
      cosine: `[*A]`.
      t: from 0, the first, to 1, the second; a number or tracer.
      straight: `[*A]` bool, where to interpolate linearly; it should hold wherever the
        cosine is 1 or -1.

    Source: Shoemake 1985, "Animating rotation with quaternion curves".

    >>> [round(float(w), 4) for w in arc(jnp.array(0.0), 0.5, False)]
    [0.7071, 0.7071]
    """
    theta = jnp.arccos(jnp.where(straight, 0, cosine))
    sine = jnp.sin(theta)
    return (
        jnp.where(straight, 1 - t, jnp.sin((1 - t) * theta) / sine),
        jnp.where(straight, t, jnp.sin(t * theta) / sine),
    )


def squared_distances(units: Sequence[jax.Array]) -> jax.Array:
    """`E_ij = ||u_i - u_j||^2`, `[N, N]`.

    Args:
      units: N of `[*S]`; of norm 1, if they shall go to `karcher_weights`.

    >>> squared_distances([jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]).tolist()
    [[0.0, 2.0], [2.0, 0.0]]
    """
    count = len(units)
    zero = jnp.zeros((), units[0].dtype)
    found = [[zero] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            gap = units[i] - units[j]
            found[i][j] = found[j][i] = (gap * gap).sum()
    return jnp.stack([jnp.stack(row) for row in found])


def karcher_weights(
    distances: jax.Array, shares: jax.Array, max_iter=10, tol=1e-5
) -> jax.Array:
    """The Karcher mean of unit vectors as weights: `u = sum_n c_n u_n`, `[N]`.

    From the normalised mean, `u <- exp_u(sum_n a_n log_u(u_n))` until that step is
    shorter than `tol`. All angles and lengths follow from the distances: of
    `v = sum_n v_n u_n`, `||v||^2 = (sum_n v_n)^2 - v' E v / 2`.

    Args:
      distances: `[N, N]`, see `squared_distances`.
      shares: `[N]`, at least 0 and not all 0; vectors of share 0 have no part in it.
      max_iter: steps at most, a number or tracer.
      tol: vectors at a smaller angle do not pull; a number or tracer.

    Source: Karcher 1977; arXiv 2603.04972 for merging.

    >>> square = jnp.array([[0.0, 2.0], [2.0, 0.0]])
    >>> karcher_weights(square, jnp.array([0.5, 0.5])).round(4).tolist()
    [0.7071, 0.7071]
    """
    shares = shares / shares.sum()

    def length(v):
        square = v.sum() ** 2 - v @ (distances * 0.5) @ v
        return jnp.sqrt(jnp.where(square > 0, square, 0))

    def normalised(v, otherwise):
        size = length(v)
        return jnp.where(size > tol, v / jnp.where(size > tol, size, 1), otherwise)

    def step(state):
        i, mean, _ = state
        gap = 1 - mean.sum() + 0.5 * (distances @ mean)  # 1 - cosine to each vector
        gap = jnp.clip(gap, 0, 2)
        theta = 2 * jnp.arcsin(jnp.sqrt(gap / 2))
        pull = jnp.where(
            theta < tol, 0, shares * theta / jnp.sin(jnp.maximum(theta, tol))
        )
        tangent = pull - (pull * (1 - gap)).sum() * mean
        size = length(tangent)
        far = size >= tol
        unit = tangent / jnp.where(far, size, 1)
        moved = jnp.cos(size) * mean + jnp.sin(size) * unit
        return i + 1, jnp.where(far, normalised(moved, moved), mean), ~far

    first = jnp.zeros_like(shares).at[jnp.argmax(shares > 0)].set(1)
    start = jnp.asarray(0), normalised(shares, first), jnp.asarray(False)
    loop = jax.lax.while_loop(lambda s: (s[0] < max_iter) & ~s[2], step, start)
    return loop[1]


def karcher(deltas: Sequence[jax.Array], max_iter=10, tol=1e-5) -> list[jax.Array]:
    """Weights of the Karcher mean of leaves, with their mean norm, N of `[]`.

    `theta = (sum_n ||x_n|| / N) u`, `u` the mean of `x_n / ||x_n||` on the sphere. What
    has a norm of at most `tol` has no direction and counts with its norm alone.

    Args:
      deltas: N of `[*S]`.
      max_iter: see `karcher_weights`.
      tol: see `karcher_weights`.

    Source: arXiv 2603.04972.

    >>> x = [jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])]
    >>> [round(float(w), 4) for w in karcher(x)]
    [0.7071, 0.7071]
    """
    norms = [norm(delta) for delta in deltas]
    lengths = [jnp.where(n > 0, n, 1) for n in norms]
    units = [delta / n for delta, n in zip(deltas, lengths, strict=True)]
    shares = jnp.stack([jnp.where(n > tol, 1.0, 0.0).astype(n.dtype) for n in norms])
    some = shares.sum() > 0
    around = karcher_weights(
        squared_distances(units), jnp.where(some, shares, 1), max_iter, tol
    )
    size = jnp.where(some, total(norms) / len(norms), 0)
    return [size * around[i] / n for i, n in enumerate(lengths)]
