"""Pools: the next-token laws of several members become one.

A pool is a function from a sequence of N arrays `[B, T, V]` of logits to one such
array. Weights may be numbers or tracers, so they can be swept, vmapped and
differentiated.

-inf means forbidden. In `linear` and what is built on it, the base (the first member)
forbids with its -inf; another member's -inf forbids where its weight is positive, and
leaves the member out for that token where it is not. `mixture` reads -inf as
probability 0. No pool makes a NaN; a NaN of a member stays visible.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.law import best, log_probs

Pool = Callable[[Sequence[jax.Array]], jax.Array]


def check_members(members: Sequence[jax.Array], weights: Sequence | None) -> None:
    """Refuses members of unequal vocabularies, and weights that do not fit the members.

    Raises:
      ValueError: naming both sides.

    >>> check_members([jnp.zeros((1, 1, 3))] * 2, (0.5, 0.5))
    """
    sizes = [member.shape[-1] for member in members]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"members with vocabularies of {sizes} tokens cannot be pooled: one "
            "vocabulary is expected; bring them to one with translate(lm, bridge)"
        )
    if weights is not None and len(weights) != len(members):
        raise ValueError(
            f"{len(weights)} weights for {len(members)} members: give one weight each"
        )


def _refuse_negative(name: str, values: Sequence) -> None:
    for value in values:
        if not isinstance(value, jax.core.Tracer) and (np.asarray(value) < 0).any():
            raise ValueError(f"{name}: a weight of {value} was given, >= 0 is expected")


def mixture(*weights) -> Pool:
    """Mean of probabilities: `p[v] = sum_n w[n] p_n[v]`.

    Args:
      *weights: one number >= 0 a member, usually of sum 1; none for equal weights.

    Raises:
      ValueError: for a negative weight, or when the weights do not fit the members.

    Source: the linear opinion pool; for language models e.g. arXiv 2311.08306.

    >>> heads = jnp.log(jnp.array([[[0.9, 0.1]]])), jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> jnp.exp(mixture(0.5, 0.5)(heads))[0, 0].tolist()
    [0.7, 0.3]
    """
    _refuse_negative("mixture", weights)

    def pool(members):
        count = len(members)
        share = weights or (1.0 / count,) * count
        check_members(members, share)
        laws = [log_probs(member) for member in members]
        top = laws[0]
        for law in laws[1:]:
            top = jnp.maximum(top, law)
        top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
        total = sum(w * jnp.exp(law - top) for w, law in zip(share, laws, strict=True))
        nothing = total == 0.0
        return jnp.where(nothing, -jnp.inf, top + jnp.log(jnp.where(nothing, 1, total)))

    return pool


def linear(*weights) -> Pool:
    """Product of experts: `log p[v] = sum_n w[n] log p_n[v]`, up to a constant.

    Proxy tuning is `linear(1, 1, -1)` of (base, expert, anti-expert); context-aware
    decoding is `linear(1 + a, -a)` of one model with and without the context.

    Args:
      *weights: one number a member, of any sign; the first member is the base.

    Raises:
      ValueError: when the weights do not fit the members.

    Source: Hinton 2002; arXiv 2105.03023 (DExperts), arXiv 2401.08565 (proxy tuning).

    >>> base, expert = jnp.array([[[0.0, 0.0]]]), jnp.log(jnp.array([[[0.8, 0.2]]]))
    >>> z = linear(1, 1, -1)([base, expert, base])
    >>> jax.nn.softmax(z)[0, 0].tolist()
    [0.8, 0.2]
    """

    def pool(members):
        check_members(members, weights)
        result = 0.0
        for n, (weight, member) in enumerate(zip(weights, members, strict=True)):
            log_p = log_probs(member)
            absent = jnp.isneginf(log_p)
            if n == 0:
                without = -jnp.inf
            else:
                without = jnp.where(jnp.asarray(weight) > 0, -jnp.inf, 0.0)
            result += jnp.where(absent, without, weight * jnp.where(absent, 0.0, log_p))
        return result

    return pool


def plausible(alpha, pool: Pool) -> Pool:
    """A pool restricted to what the base finds plausible: `p_0[v] >= alpha max p_0`.

    Args:
      alpha: share of the base's best probability, in [0, 1]; 0 keeps every token.
      pool: what scores the tokens that are kept.

    Raises:
      ValueError: for an alpha outside of [0, 1].

    Source: arXiv 2210.15097, equation 2.

    >>> base, other = jnp.log(jnp.array([[[0.9, 0.1]]])), jnp.zeros((1, 1, 2))
    >>> plausible(0.5, linear(1, -1))([base, other])[0, 0, 1].item()
    -inf
    """
    if not isinstance(alpha, jax.core.Tracer) and not 0 <= float(alpha) <= 1:
        raise ValueError(f"alpha = {alpha} was given, a number in [0, 1] is expected")

    def masked(members):
        base = log_probs(members[0])
        least = jnp.log(jnp.asarray(alpha, base.dtype)) + base.max(-1, keepdims=True)
        return jnp.where(base < jax.lax.stop_gradient(least), -jnp.inf, pool(members))

    return masked


def contrast(alpha, beta) -> Pool:
    """Contrastive decoding of (expert, amateur) with a plausibility mask.

    `log p = (1 + beta) log p_e - beta log p_a` where `p_e >= alpha max p_e`, else -inf.
    The first form of the method (arXiv 2210.15097) is `plausible(alpha, linear(1,
    -1))`.

    Args:
      alpha: plausibility, in [0, 1]; 0.1 in the paper.
      beta: strength of the contrast; 0.5 in the paper.

    Source: arXiv 2309.09117.

    >>> expert, amateur = jnp.log(jnp.array([[[[0.6, 0.4]]], [[[0.9, 0.1]]]]))
    >>> jax.nn.softmax(contrast(0.1, 0.5)([expert, amateur]))[0, 0].tolist()
    [0.38, 0.62]
    """
    return plausible(alpha, linear(1 + beta, -beta))


def minimum() -> Pool:
    """The least probability of any member: `p[v]` proportional to `min_n p_n[v]`.

    No token becomes much likelier than the most reluctant member has it: the
    max-divergence form of near access-freeness.

    Source: arXiv 2302.10870 (CP-Delta), used in arXiv 2402.14845.

    >>> laws = jnp.log(jnp.array([[[[0.5, 0.5]]], [[[0.9, 0.1]]]]))
    >>> jax.nn.softmax(minimum()(laws))[0, 0].tolist()
    [0.8333, 0.1667]
    """

    def pool(members):
        check_members(members, None)
        result = log_probs(members[0])
        for member in members[1:]:
            result = jnp.minimum(result, log_probs(member))
        return result

    return pool


def vote(*weights) -> Pool:
    """Plurality: `p[v]` is the share of the members whose best token is v.

    Args:
      *weights: votes of each member; none for one vote each.

    >>> laws = jnp.array([[[[3.0, 0.0]]], [[[1.0, 0.0]]], [[[0.0, 9.0]]]])
    >>> jax.nn.softmax(vote()(laws))[0, 0].tolist()
    [0.6667, 0.3333]
    """
    _refuse_negative("vote", weights)
    count = mixture(*weights)

    def ballot(member):
        first = best(member)[..., None] == jnp.arange(member.shape[-1])
        blank = jnp.isnan(member).any(-1, keepdims=True)
        return jnp.where(blank, jnp.nan, jnp.where(first, 0.0, -jnp.inf))

    return lambda members: count([ballot(member) for member in members])
