"""Merges that act on the singular vectors of the deltas, matrix by matrix.

A part here leaves one delta. A leaf with two axes is a matrix; one with four, the
kernel `[out, in, height, width]` of a convolution, is the matrix `[out, in * height *
width]`. Of all other leaves, biases and gains of norms, the mean of the deltas is left,
as the papers have it. Embeddings are matrices too, and what is factored is never larger
than their short side squared; to leave them out, merge them by `mean`:

    chain(where(".*proj.*", flatten_spectrum), where("(?!.*proj).*", mean))

Directions without a delta in them stay so: see `polar`.

Memory: the buffers of a merge are those of 2 N + 6 leaves at most. LAPACK works beside
them, on CPUs, on twice the matrix that it factors: k^2 entries, and for
`remove_interference`, which looks at all experts together, min(n, N m)^2. With three
experts and n = 3 m that is six leaves, and 16 in all. Embeddings, whose short side is
what counts, are larger than such matrices: 2 N + 6 of the largest tensor of a language
model suffice (of Llama-2-70B, 262M entries beside 235M, barely).

Shapes: N experts, S the shape of a leaf, m rows, n columns, k the smaller of them.
`tau_i` is the weighted delta `w_i delta_i`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from collab_jax.merge.polar import null_tolerance, polar, product, svd, top_svd
from collab_jax.merge.stack import Stack, Transform, chain, total
from collab_jax.merge.weigh import scale

Deltas = Sequence[jax.Array]


def on_matrices(make: Callable[[Deltas], jax.Array]) -> Callable[[Stack], Stack]:
    """Replaces the deltas of a matrix by one delta, other deltas by their mean.

    Args:
      make: from N weighted deltas `[m, n]` to one.

    >>> largest = on_matrices(lambda taus: taus[0])
    >>> one = jnp.ones(2)
    >>> largest(Stack(one, (one, 3 * one), (1.0, 1.0), jax.random.key(0))).deltas
    (Array([2., 2.], dtype=float32),)
    """

    def apply(stack: Stack) -> Stack:
        shape = stack.base.shape
        taus = [w * d for w, d in zip(stack.weights, stack.deltas, strict=True)]
        if len(shape) in (2, 4) and stack.base.size:
            rows = [tau.reshape(shape[0], math.prod(shape[1:])) for tau in taus]
            delta = make(rows).reshape(shape)
        else:
            delta = total(taus) / len(taus)
        one = jnp.ones((), delta.dtype)
        return Stack(stack.base, (delta,), (one,), stack.key)

    return apply


def after(values, *done: jax.Array):
    """Values as they are, but computed only when others are there: it saves memory.

    XLA for CPUs computes what it can as early as it can, so the deltas of all experts
    and whatever follows from each, and holds them until their last use. Barriers do not
    stop it: it drops them before it plans. So here is a factor of 1 that depends on the
    others: it is NaN where they have one already.

    Args:
      values: a tree of arrays. They are not held since an earlier use, but computed
        once more: they should be cheap, such as deltas.
      *done: what has to be there before.

    >>> after([jnp.ones(2)], jnp.zeros((2, 2)))
    [Array([1., 1.], dtype=float32)]
    """
    first = [jax.lax.optimization_barrier(x)[(0,) * x.ndim] for x in done]
    if not first:
        return values
    gate = jnp.where(jnp.isnan(total(first)), jnp.nan, 1)
    return jax.tree.map(lambda x: x * gate.astype(x.dtype), values)


def join_singular_vectors(stack: Stack) -> Stack:
    """Gives each expert k / N singular directions, and makes all of them orthogonal.

    `delta = polar([U_1 .. U_N]) diag(S_1 .. S_N) polar([V_1 .. V_N])^T`, where
    `U_i S_i V_i^T` is the best approximation of `tau_i` with rank `floor(k / N)`. A
    matrix too small to give each expert a direction gets the mean.

    Args:
      stack: one leaf.

    Source: TSV-M, arXiv 2412.00081.

    >>> one = jnp.diag(jnp.array([2.0, 0.0])), jnp.diag(jnp.array([0.0, 3.0]))
    >>> stack = Stack(jnp.zeros((2, 2)), one, (1.0, 1.0), jax.random.key(0))
    >>> join_singular_vectors(stack).deltas[0].round(4).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """

    def make(taus: Deltas) -> jax.Array:
        rank = min(taus[0].shape) // len(taus)
        if rank == 0:
            return total(taus) / len(taus)
        u, s, v = _one_by_one(lambda tau: top_svd(tau, rank), taus)
        left = polar(u) * s
        return product(left, polar(after(v, left)).T)

    return on_matrices(make)(stack)


def flatten_spectrum(stack: Stack) -> Stack:
    """Gives the sum of the deltas equal singular values, their mean.

    `delta = s U V^T`, `U S V^T = sum_i tau_i`, `s = trace(S) / k`.

    Args:
      stack: one leaf.

    Source: Iso-C, arXiv 2502.04959.

    >>> delta = jnp.diag(jnp.array([3.0, 1.0]))
    >>> stack = Stack(jnp.zeros((2, 2)), (delta,), (1.0,), jax.random.key(0))
    >>> flatten_spectrum(stack).deltas[0].round(4).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """

    def make(taus: Deltas) -> jax.Array:
        whole = total(taus)
        factor = polar(whole)
        return (factor * whole).sum() / min(whole.shape) * factor

    return on_matrices(make)(stack)


def flatten_subspaces(common: float = 0.8) -> Callable[[Stack], Stack]:
    """As `flatten_spectrum`, with a share of the directions given to single experts.

    The c leading directions `U_c, V_c` of the sum are kept, and for each expert the
    `d = (k - c) / N` leading ones of `tau_i - U_c U_c^T tau_i` come beside them; both
    sides are made orthogonal, and all singular values become their mean.

    Args:
      common: share of the directions that the sum keeps; c is about `common * k`, such
        that d is whole.

    Raises:
      ValueError: for a share outside of [0, 1].

    Source: Iso-CTS, arXiv 2502.04959.

    >>> delta = jnp.diag(jnp.array([3.0, 1.0]))
    >>> stack = Stack(jnp.zeros((2, 2)), (delta,), (1.0,), jax.random.key(0))
    >>> flatten_subspaces(0.5)(stack).deltas[0].round(4).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if not 0 <= common <= 1:
        raise ValueError(f"common = {common} was given, a number in [0, 1] is expected")

    def make(taus: Deltas) -> jax.Array:
        k, count = min(taus[0].shape), len(taus)
        own = round((k - int(k * common)) / count)
        if own * count > k:
            own = k // count
        kept = k - own * count
        if own == 0:
            return _flat(svd(total(taus)))
        u, s, v = (x[..., :kept] for x in svd(total(taus)))
        start = [(u, s, v)]
        return _flat(_one_by_one(lambda tau: _beside(u, tau, own), taus, start))

    return on_matrices(make)


def remove_interference(ridge=0.0) -> Callable[[Stack], Stack]:
    """The delta that disturbs the inputs of each expert least: a linear regression.

    The rows of `tau_i` stand in for the expert's inputs. Minimises `sum_i ||(x -
    tau_i) tau_i^T||^2 / ||tau_i||^2 + mu ||x - t||^2` with `t = sum_i tau_i`, so

    `delta = t - (sum_i (t - tau_i) G_i) (sum_i G_i + mu)^+`, `G_i = tau_i^T tau_i /
    ||tau_i||^2`.

    The paper takes some hundred steps of Adam from t instead; a ridge is the smooth way
    to stop early. Directions that rounding hides in the Gram matrices keep t.

    Args:
      ridge: mu in units of the mean eigenvalue of `sum_i G_i`; 0 is the least squares
        solution, infinity the sum of the deltas. May be a tracer.

    Raises:
      ValueError: for a negative ridge.

    Source: WUDI-Merging, arXiv 2503.08099, its loss in closed form.

    >>> deltas = jnp.diag(jnp.array([2.0, 0.0])), jnp.diag(jnp.array([0.0, 3.0]))
    >>> stack = Stack(jnp.zeros((2, 2)), deltas, (1.0, 1.0), jax.random.key(0))
    >>> remove_interference()(stack).deltas[0].round(4).tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    if not isinstance(ridge, jax.core.Tracer) and not ridge >= 0:
        raise ValueError(f"ridge = {ridge} was given, at least 0 is expected")

    def make(taus: Deltas) -> jax.Array:
        (m, n), count = taus[0].shape, len(taus)
        if count == 1:  # nothing interferes
            return taus[0]
        sizes: list[jax.Array] = []
        for tau in taus:
            square = (after(tau, *sizes[-1:]) ** 2).sum()
            sizes.append(jnp.where(square > 0, square, 1))
        if m * count < n:  # the same by A (A^T A)^+ = (A A^T)^+ A
            rows = _rows(after(taus, sizes[-1]), sizes)
            gram = product(rows, rows.T)
            blocks = gram.reshape(count, m, count, m)
            mixed = [
                total(jnp.sqrt(sizes[j]) * blocks[j, :, i] for j in _others(i, count))
                for i in range(count)
            ]
            factor = _divided(jnp.concatenate(mixed, 1), gram, ridge)
            moved = product(factor, _rows(after(taus, factor), sizes))
        else:
            right = jnp.zeros((m, n), taus[0].dtype)
            for i, size in enumerate(sizes):
                own = after(taus, size, right)
                tau, rest = own[i], total(own[j] for j in _others(i, count))
                if n <= m:
                    right += product(rest, product(tau.T, tau) / size)
                else:
                    right += product(product(rest, tau.T) / size, tau)
            rows = _rows(after(taus, right), sizes)
            moved = _divided(right, product(rows.T, rows), ridge)
        return total(after(taus, moved)) - moved

    return on_matrices(make)


def _rows(taus: Deltas, sizes: Sequence[jax.Array]) -> jax.Array:
    """The rows of all deltas, each delta at norm 1."""
    pairs = zip(taus, sizes, strict=True)
    return jnp.concatenate([tau / jnp.sqrt(size) for tau, size in pairs])


def _others(i: int, count: int) -> list[int]:
    return [j for j in range(count) if j != i]


def _divided(right: jax.Array, gram: jax.Array, ridge) -> jax.Array:
    """`right (gram + mu)^+`."""
    s, q = jnp.linalg.eigh(gram, symmetrize_input=False)
    mu = ridge * s.sum() / len(gram)
    kept = s > null_tolerance(gram.shape, gram.dtype) * s[-1]
    half = q * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, s + mu, 1)), 0)
    return product(product(right, half), half.T)


def _beside(u: jax.Array, tau: jax.Array, r: int):
    """The r leading directions of a delta that columns u leave; rounding gives none."""
    left, s, right = top_svd(tau - product(u, product(u.T, tau)), r)
    kept = s > null_tolerance(tau.shape, tau.dtype) * jnp.sqrt((tau**2).sum())
    return left * kept, s * kept, right * kept


def _one_by_one(factor, taus: Deltas, start=()):
    """U, S, V of an approximation of each delta side by side, behind those of `start`.

    A delta waits for the singular values of the one before it.
    """
    found = list(start)
    for tau in taus:
        found.append(factor(after(tau, *(s for _, s, _ in found[-1:]))))
    u, s, v = zip(*found, strict=True)
    return jnp.concatenate(u, 1), jnp.concatenate(s), jnp.concatenate(v, 1)


def _flat(factors) -> jax.Array:
    """Both sides made orthogonal, with the mean of the singular values."""
    u, s, v = factors
    left = polar(u)
    return s.mean() * product(left, polar(after(v, left)).T)


def tsv_m(lam=1.0) -> Transform:
    """Task singular vectors, made orthogonal and merged: TSV-M.

    Args:
      lam: scale of the merged delta.

    Source: arXiv 2412.00081.

    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.zeros((2, 3))}, {"a": jnp.eye(2, 3)}
    >>> merge(tsv_m(), base, [expert])["a"].round(4).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    return chain(join_singular_vectors, scale(lam))


def iso_c(lam=1.0) -> Transform:
    """Isotropic merging in the common subspace: Iso-C.

    Args:
      lam: scale of the merged delta; 1 to 1.5 is typical.

    Source: arXiv 2502.04959.

    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.zeros((2, 2))}, {"a": jnp.diag(jnp.array([3.0, 1.0]))}
    >>> merge(iso_c(0.5), base, [expert])["a"].round(4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return chain(flatten_spectrum, scale(lam))


def iso_cts(common=0.8, lam=1.0) -> Transform:
    """Isotropic merging in common and task-specific subspaces: Iso-CTS.

    Args:
      common: share of the directions that the sum keeps, in [0, 1].
      lam: scale of the merged delta; 1 to 1.5 is typical.

    Raises:
      ValueError: for a share outside of [0, 1].

    Source: arXiv 2502.04959.

    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.zeros((2, 2))}, {"a": jnp.diag(jnp.array([3.0, 1.0]))}
    >>> merge(iso_cts(0.5), base, [expert])["a"].round(4).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    return chain(flatten_subspaces(common), scale(lam))


def wudi(ridge=0.0, lam=1.0) -> Transform:
    """Data-free removal of interference: WUDI-Merging, in closed form.

    Args:
      ridge: see `remove_interference`; 0 is the minimum of the paper's loss.
      lam: scale of the merged delta.

    Raises:
      ValueError: for a negative ridge.

    Source: arXiv 2503.08099.

    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.zeros((2, 3))}, {"a": jnp.eye(2, 3)}
    >>> merge(wudi(), base, [expert])["a"].round(4).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    return chain(remove_interference(ridge), scale(lam))
