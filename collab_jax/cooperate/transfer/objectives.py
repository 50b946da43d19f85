"""Several tuned models as one that serves all of their objectives.

Each member was tuned from one reference to an objective of its own, with a divergence
from the reference as the penalty. The mean of the objectives then has a closed form at
decode time, a mean of the members' laws; which mean depends on the divergence.

Shapes: B rows, T tokens, V vocabulary, N members.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from collab_jax.law import log_probs
from collab_jax.pool import Pool, check_members, linear


def mod(*weights) -> Pool:
    """Multi-objective decoding of models tuned with a reverse KL penalty, as by DPO.

    `p[v]` proportional to `prod_n p_n[v] ** w[n]`.

    Args:
      *weights: of the objectives, of sum 1; a negative one turns away from its.

    Raises:
      ValueError: for known weights whose sum is not 1.

    Source: arXiv 2406.18853.

    >>> laws = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    >>> jax.nn.softmax(mod(0.5, 0.5)(laws)).tolist()  # 3 to 1
    [0.75, 0.25]
    """
    _check_sum(weights)
    return linear(*weights)


def power_mean(exponent: float, *weights) -> Pool:
    """Multi-objective decoding of models tuned with an alpha-divergence penalty.

    `p[v]` proportional to `(sum_n w[n] p_n[v] ** r) ** (1 / r)` with r = -alpha. The
    exponent -1 is the forward KL divergence, towards 0 it goes to `mod`, and 1 is
    `pool.mixture`. Below 0 a token that a member of positive weight forbids is
    forbidden; above 0 that member counts as 0.

    Args:
      exponent: r, not 0.
      *weights: of the objectives, at least 0, of sum 1.

    Raises:
      ValueError: for an exponent of 0, and for known weights that are negative or whose
        sum is not 1.

    Source: arXiv 2406.18853, its table of divergences.

    >>> laws = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    >>> jax.nn.softmax(power_mean(-1, 0.5, 0.5)(laws)).tolist()
    [0.7941, 0.2059]
    """
    if exponent == 0:
        raise ValueError("exponent = 0: that mean is mod(*weights)")
    _check_sum(weights)
    _check_positive(weights)

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        check_members(members, weights)
        share = jnp.stack([jnp.asarray(w, jnp.float32) for w in weights])
        share = share.reshape(-1, *(1,) * members[0].ndim)
        laws = jnp.stack([log_probs(member) for member in members])
        # terms w p ** r; a law of probability 0 is an infinite term where r < 0
        gone = jnp.isneginf(laws)
        terms = exponent * jnp.where(gone, 0.0, laws)
        counted = (share > 0) & ~gone
        top = jnp.max(jnp.where(counted, terms, -jnp.inf), axis=0)
        top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
        # a term of weight 0 may lie far above the others
        size = jnp.exp(jnp.minimum(terms - top, 80.0))
        total = jnp.where(gone, 0.0, share * size).sum(0)
        nothing = total == 0.0
        mean = (top + jnp.log(jnp.where(nothing, 1.0, total))) / exponent
        dead = nothing if exponent > 0 else nothing | (gone & (share > 0)).any(0)
        return jnp.where(dead, -jnp.inf, mean)

    return pooled


def jensen_shannon_mean(*weights) -> Pool:
    """Multi-objective decoding of models tuned with a Jensen-Shannon penalty.

    `p[v] = p_0[v] / (c prod_n (1 + p_0[v] / p_n[v]) ** w[n] - 1)` of (reference, model,
    model, ..), with the one c that makes it a law, found by bisection. A token that the
    reference forbids, or a model of positive weight, is forbidden.

    Args:
      *weights: of the objectives, at least 0, of sum 1; one less than members.

    Raises:
      ValueError: for known weights that are negative or whose sum is not 1; when first
        called, for other numbers of members.

    Source: arXiv 2406.18853, its table of divergences.

    >>> laws = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]))
    >>> jax.nn.softmax(jensen_shannon_mean(1.0, 0.0)(laws)).tolist()
    [0.9, 0.1]
    >>> jax.nn.softmax(jensen_shannon_mean(0.5, 0.5)(laws)).tolist()
    [0.7758, 0.2242]
    """
    _check_sum(weights)
    _check_positive(weights)

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        check_members(members, (1, *weights))
        reference, *laws = map(log_probs, members)
        absent = jnp.isneginf(reference)
        own = jnp.where(absent, 0.0, reference)
        # log A = sum_n w log(1 + p_0 / p_n); 0 is its least, and d how far it is above
        above = jnp.zeros_like(own)
        for weight, law in zip(weights, laws, strict=True):
            gone = jnp.isneginf(law)
            share = jax.nn.softplus(own - jnp.where(gone, 0.0, law))
            above += weight * jnp.where(gone, 0.0, share)
            absent |= gone & (jnp.asarray(weight) > 0)
        least = jnp.min(jnp.where(absent, jnp.inf, above), axis=-1, keepdims=True)
        # compiled programs may compute a sum twice and round it in two ways
        d = jnp.maximum(above - jnp.where(jnp.isinf(least), 0.0, least), 0.0)
        d = jnp.where(absent, 0.0, d)
        own = jnp.where(absent, 0.0, jnp.exp(own - d))

        def mass(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Of the law with `c = (1 + t) / min A`, and its slope."""
            gap = t - jnp.expm1(-d)
            share = jnp.where(absent, 0.0, own / jnp.where(absent, 1.0, gap))
            slope = jnp.where(absent, 0.0, share / jnp.where(absent, 1.0, gap))
            return share.sum(-1, keepdims=True), -slope.sum(-1, keepdims=True)

        def halve(_, bounds):
            low, high = bounds  # of log t
            middle = (low + high) / 2
            heavy = mass(jnp.exp(middle))[0] > 1
            return jnp.where(heavy, middle, low), jnp.where(heavy, high, middle)

        zero = jnp.zeros_like(least)
        bounds = zero - 46.0, zero  # the law of t = 1 has a mass of 1 at most
        t = jnp.exp(jax.lax.fori_loop(0, 40, halve, bounds)[1])
        t = jax.lax.stop_gradient(t)
        # a step of Newton's method, so that t has its gradient
        total, slope = mass(t)
        slope = jax.lax.stop_gradient(jnp.where(slope == 0, 1.0, slope))
        t = t - (total - 1) / slope
        gap = jnp.where(absent, 1.0, t - jnp.expm1(-d))
        return jnp.where(
            absent, -jnp.inf, jnp.where(absent, 0.0, reference) - d - jnp.log(gap)
        )

    return pooled


def _check_positive(weights: Sequence) -> None:
    known = [w for w in weights if not isinstance(w, jax.core.Tracer)]
    if any(float(w) < 0 for w in known):
        raise ValueError(f"weights {known}: weights of at least 0 are expected")


def _check_sum(weights: Sequence) -> None:
    if any(isinstance(w, jax.core.Tracer) for w in weights):
        return
    if abs(sum(map(float, weights)) - 1) > 1e-3:
        raise ValueError(
            f"weights {tuple(map(float, weights))} of sum {sum(map(float, weights)):g}:"
            " weights of sum 1 are expected"
        )
