"""Means on the sphere, as weights: nothing but norms and angles is read of the leaves.

Every iteration of a mean runs on N x N numbers, so that a leaf is passed over once.
Angles come from distances of unit vectors, which keep their precision where a cosine is
near 1, as it is between fine-tunes of one model.

Shapes: N experts, S the shape of a leaf, A the shape that a sum over `axis` leaves.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from collab_jax.merge.pieces import over_leaf
from collab_jax.merge.stack import total

Axis = int | None  # None: over the whole leaf
Length = Callable[[jax.Array], jax.Array]


def inner(
    pairs: Sequence[tuple[jax.Array, jax.Array]], axis: Axis = None
) -> list[jax.Array]:
    """The inner product of each pair of leaves, each `[*A]`, in one pass over them.

    Flat for the axis None: the arrays may be pieces, see `collab_jax.merge.pieces`.

    Args:
      pairs: of `[*S]`.
      axis: one that stays with length 1, or None for the whole leaf, then A is ().

    >>> x, y = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    >>> [float(product) for product in inner([(x, y), (x, x)])]
    [11.0, 5.0]
    """
    products = [a * b for a, b in pairs]
    if axis is not None and products[0].ndim:
        return [product.sum(axis, keepdims=True) for product in products]
    sums = over_leaf([product.sum() for product in products])
    return [jnp.asarray(x, p.dtype) for x, p in zip(sums, products, strict=True)]


def norms(xs: Sequence[jax.Array], axis: Axis = None) -> list[jax.Array]:
    """The Euclidean norm of each leaf, each `[*A]`; its gradient at zero is zero.

    Args:
      xs: of `[*S]`.
      axis: see `inner`.

    >>> [float(x) for x in norms([jnp.array([[3.0], [4.0]]), jnp.ones((1, 1))])]
    [5.0, 1.0]
    """
    return [root(square) for square in inner([(x, x) for x in xs], axis)]


def norm(x: jax.Array, axis: Axis = None) -> jax.Array:
    """The norm of one leaf, see `norms`.

    >>> float(norm(jnp.array([3.0, 4.0])))
    5.0
    """
    return norms([x], axis)[0]


def root(square: jax.Array) -> jax.Array:
    """The square root, with gradient zero at zero; what is below is zero.

    >>> root(jnp.array([4.0, 0.0, -1e-9])).tolist()
    [2.0, 0.0, 0.0]
    """
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def cosine(
    a: jax.Array, b: jax.Array, axis: Axis = None, length: Length | None = None
) -> jax.Array:
    """The cosine of the angle between two leaves, in [-1, 1], `[*A]`.

    Args:
      a: `[*S]`.
      b: `[*S]`.
      axis: see `inner`.
      length: norm -> what to divide by; None leaves what is not above 1e-8 as it is.

    >>> float(cosine(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))
    0.0
    """
    by = (lambda n: jnp.where(n > 1e-8, n, 1)) if length is None else length
    of_a, of_b = norms([a, b], axis)
    return jnp.clip(inner([(a / by(of_a), b / by(of_b))], axis)[0], -1, 1)


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
    pairs = [(i, j) for i in range(count) for j in range(i)]
    gaps = [units[i] - units[j] for i, j in pairs]
    squares = inner([(gap, gap) for gap in gaps]) if pairs else []
    found = jnp.zeros((count, count), units[0].dtype)
    for (i, j), square in zip(pairs, squares, strict=True):
        found = found.at[i, j].set(square).at[j, i].set(square)
    return found


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
      max_iter: steps at most, a number or tracer; with a number, the weights have
        gradients: those of the steps that are taken.
      tol: vectors at a smaller angle do not pull, nor do those that are opposite, to
        which no shortest way leads; a number or tracer.

    Source: Karcher 1977; arXiv 2603.04972 for merging.

    >>> square = jnp.array([[0.0, 2.0], [2.0, 0.0]])
    >>> karcher_weights(square, jnp.array([0.5, 0.5])).round(4).tolist()
    [0.7071, 0.7071]
    """
    shares = shares / shares.sum()

    def length(v):
        return root(v.sum() ** 2 - v @ (distances * 0.5) @ v)

    def normalised(v, otherwise):
        size = length(v)
        return jnp.where(size > tol, v / jnp.where(size > tol, size, 1), otherwise)

    def step(state):
        i, mean, _ = state
        gap = 1 - mean.sum() + 0.5 * (distances @ mean)  # 1 - cosine to each vector
        gap = jnp.clip(gap, 0, 2)
        opposite = 2 - gap <= 8 * jnp.finfo(gap.dtype).eps
        # the angle has no slope at its ends, which a mask behind it would not remove
        theta = 2 * jnp.arcsin(root(jnp.where(opposite, 0, gap) / 2))
        still = (theta < tol) | opposite
        sine = jnp.where(still, 1, jnp.sin(theta))
        pull = jnp.where(still, 0, shares * theta / sine)
        tangent = pull - (pull * (1 - gap)).sum() * mean
        size = length(tangent)
        far = size >= tol
        unit = tangent / jnp.where(far, size, 1)
        moved = jnp.cos(size) * mean + jnp.sin(size) * unit
        return i + 1, jnp.where(far, normalised(moved, moved), mean), ~far

    first = jnp.zeros_like(shares).at[jnp.argmax(shares > 0)].set(1)
    start = jnp.asarray(0), normalised(shares, first), jnp.asarray(False)
    if not isinstance(max_iter, int):
        loop = jax.lax.while_loop(lambda s: (s[0] < max_iter) & ~s[2], step, start)
        return loop[1]

    def unless_done(state, _):
        return jax.lax.cond(state[2], lambda state: state, step, state), None

    # as the other loop, but it can be run backwards
    return jax.lax.scan(unless_done, start, None, max_iter)[0][1]


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
    sizes = norms(deltas)
    lengths = [jnp.where(n > 0, n, 1) for n in sizes]
    units = [delta / n for delta, n in zip(deltas, lengths, strict=True)]
    shares = jnp.stack([jnp.where(n > tol, 1.0, 0.0).astype(n.dtype) for n in sizes])
    some = shares.sum() > 0
    around = karcher_weights(
        squared_distances(units), jnp.where(some, shares, 1), max_iter, tol
    )
    size = jnp.where(some, total(sizes) / len(sizes), 0)
    return [size * around[i] / n for i, n in enumerate(lengths)]
