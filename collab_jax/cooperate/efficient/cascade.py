"""Speculative cascades: pools that keep the small model's law where it is good enough.

A cascade asks the large model only where the small one is weak. As a law over tokens it
is a pool of (large, small), so it composes like any other; as a target whose draft is
the small model (`reuse`) it costs no more than speculation does. p is the large model's
law, q the small one's.

`chow`, `difference` and `optimal` decide place by place: q where the rule holds, else
p. The others decide token by token, `v(x) = q(x) [x in T] + p(x) sum_{y not in T} q(y)`
with T the tokens that are left to the small model. The rules read the laws that they
are given: a temperature in `warp` above the pool leaves them as they are, one below
changes them.

Shapes: B rows, T tokens, V vocabulary.

Source: arXiv 2405.19261, whose equations are named; its authors' notebook has the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from collab_jax.law import log_probs
from collab_jax.pool import Pool, check_members


def total_variation(p: jax.Array, q: jax.Array) -> jax.Array:
    """`d(p, q) = 1/2 sum_v |p(v) - q(v)|`: a draft of q is rejected this often.

    Args:
      p: `[..., V]` probabilities.
      q: `[..., V]` probabilities.

    >>> total_variation(jnp.array([0.5, 0.5]), jnp.array([0.8, 0.2])).item()
    0.3
    """
    return 0.5 * jnp.abs(p - q).sum(-1)


def chow(alpha) -> Pool:
    """The small model's law where it is sure: q where `max q >= 1 - alpha`, else p.

    Args:
      alpha: in [0, 1]; 1 is the small model.

    Raises:
      ValueError: for a number outside of it.

    Source: arXiv 2405.19261, equation 2.

    >>> p, q = jnp.log(jnp.array([[[[0.9, 0.1]]], [[[0.6, 0.4]]]]))
    >>> [jax.nn.softmax(chow(a)([p, q]))[0, 0, 0].round(3).item() for a in (0.3, 0.5)]
    [0.9, 0.6]
    """
    check_share(alpha)
    return _place_by_place(lambda p, q: q.max(-1) >= 1 - alpha)


def difference(alpha) -> Pool:
    """q where it is nearly as sure as p: where `max q >= max p - alpha`, else p.

    Args:
      alpha: probability that may be lost; 0 asks for the likelier of both best tokens.

    Source: arXiv 2405.19261, equation 5.

    >>> p, q = jnp.log(jnp.array([[[[0.9, 0.1]]], [[[0.6, 0.4]]]]))
    >>> probs = [jax.nn.softmax(difference(a)([p, q]))[0, 0, 0] for a in (0.2, 0.4)]
    >>> [p.round(3).item() for p in probs]
    [0.9, 0.6]
    """
    return _place_by_place(lambda p, q: q.max(-1) >= p.max(-1) - alpha)


def optimal(alpha) -> Pool:
    """As `difference`, less where a draft would be rejected: `max p - alpha d(p, q)`.

    With d the total variation. A draft of q is never rejected where v is q.

    Args:
      alpha: cost of a rejection; 0 asks for the likelier of both best tokens.

    Source: arXiv 2405.19261, equation 10, SpecCascade [OPT].

    >>> p, q = jnp.log(jnp.array([[[[0.9, 0.1]]], [[[0.6, 0.4]]]]))
    >>> [jax.nn.softmax(optimal(a)([p, q]))[0, 0, 0].item() for a in (0.5, 2.0)]
    [0.9, 0.6]
    """

    def rule(p, q):
        return q.max(-1) >= p.max(-1) - alpha * total_variation(p, q)

    return _place_by_place(rule)


def token_v1(alpha) -> Pool:
    """T: tokens that the small model finds nearly as likely as the large one its best.

    `q(x) >= max p - alpha`

    Args:
      alpha: probability that may be lost.

    Source: arXiv 2405.19261, equation 13, SpecCascade [TokenV1].

    >>> p, q = jnp.log(jnp.array([[[[0.6, 0.3, 0.1]]], [[[0.5, 0.25, 0.25]]]]))
    >>> jnp.exp(token_v1(0.2)([p, q]))[0, 0].round(3).tolist()
    [0.8, 0.15, 0.05]
    """
    return _token_by_token(lambda p, q: q >= p.max(-1, keepdims=True) - alpha)


def token_v2(alpha) -> Pool:
    """T: tokens that the large model finds nearly as likely as its best.

    `p(x) >= max p - alpha`

    Args:
      alpha: probability that may be lost.

    Source: arXiv 2405.19261, equation 14, SpecCascade [TokenV2].

    >>> p, q = jnp.log(jnp.array([[[[0.6, 0.3, 0.1]]], [[[0.5, 0.25, 0.25]]]]))
    >>> jnp.exp(token_v2(0.35)([p, q]))[0, 0].round(3).tolist()
    [0.65, 0.325, 0.025]
    """
    return _token_by_token(lambda p, q: p >= p.max(-1, keepdims=True) - alpha)


def token_v3(alpha) -> Pool:
    """T: tokens with a share of the probability of the large model's best.

    `p(x) >= (1 - alpha) max p`

    Args:
      alpha: in [0, 1]; 0 leaves only the large model's best token to the small one, 1
        is the small model.

    Raises:
      ValueError: for a number outside of it.

    Source: arXiv 2405.19261, equation 15, SpecCascade [TokenV3].

    >>> p, q = jnp.log(jnp.array([[[[0.6, 0.3, 0.1]]], [[[0.5, 0.25, 0.25]]]]))
    >>> jnp.exp(token_v3(0.5)([p, q]))[0, 0].round(3).tolist()
    [0.65, 0.325, 0.025]
    """
    check_share(alpha)
    return _token_by_token(lambda p, q: p >= (1 - alpha) * p.max(-1, keepdims=True))


def check_share(alpha: Any) -> None:
    """Refuses a known number outside of [0, 1].

    Args:
      alpha: a number, or a tracer, which is not known.

    Raises:
      ValueError: naming it.

    >>> check_share(0.5)
    """
    if not isinstance(alpha, jax.core.Tracer) and not 0 <= float(alpha) <= 1:
        raise ValueError(f"alpha = {alpha} was given, a number in [0, 1] is expected")


Rule = Callable[[jax.Array, jax.Array], jax.Array]


def _place_by_place(rule: Rule) -> Pool:
    def pool(members):
        large, small = _two(members)
        kept = rule(jnp.exp(large), jnp.exp(small))
        return jnp.where(kept[..., None], small, large)

    return pool


def _token_by_token(rule: Rule) -> Pool:
    def pool(members):
        large, small = _two(members)
        p, q = jnp.exp(large), jnp.exp(small)
        kept = rule(p, q)
        rest = jnp.where(kept, 0.0, q).sum(-1, keepdims=True)
        return jnp.log(jnp.where(kept, q, 0.0) + p * rest)

    return pool


def _two(members):
    check_members(members, (1, 1))
    large, small = members
    return log_probs(large), log_probs(small)
