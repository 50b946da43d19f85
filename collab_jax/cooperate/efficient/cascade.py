"""Speculative cascades: pools that keep the small model's law where it is good enough.

A cascade asks the large model only where the small one is weak. As a law over tokens it
is a pool of (large, small), so it composes like any other; as a target whose draft is
the small model (`reuse`) it costs no more than speculation does. p is the large model's
law, q the small one's, and d their total variation.

Shapes: B rows, T tokens, V vocabulary.
"""

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


def defer(alpha) -> Pool:
    """The large model's law where the small one is too unsure: p or q, token by token.

    `v = p if max q < max p - alpha d(p, q), else q`. A draft of q is never rejected
    where v is q.

    Args:
      alpha: cost of a rejection; 0 asks for the likelier of both best tokens.

    Source: arXiv 2405.19261, SpecCascade [OPT].

    >>> p, q = jnp.log(jnp.array([[[[0.9, 0.1]]], [[[0.6, 0.4]]]]))
    >>> [jax.nn.softmax(defer(a)([p, q]))[0, 0, 0].item() for a in (0.5, 2.0)]
    [0.9, 0.6]
    """

    def pool(members):
        large, small = _two(members)
        p, q = jnp.exp(large), jnp.exp(small)
        distance = total_variation(p, q)
        asked = q.max(-1) < p.max(-1) - alpha * distance
        return jnp.where(asked[..., None], large, small)

    return pool


def defer_tokens(alpha) -> Pool:
    """The small model's law on the tokens that the large one finds nearly as good.

    `v(x) = q(x) [x in T] + p(x) sum_{y not in T} q(y)`, where T holds the tokens with
    `p(x) >= (1 - alpha) max p`.

    Args:
      alpha: in [0, 1]; 0 leaves only the large model's best token to the small one, 1
        is the small model.

    Source: arXiv 2405.19261, SpecCascade [TokenV3].

    >>> p, q = jnp.log(jnp.array([[[[0.6, 0.3, 0.1]]], [[[0.5, 0.25, 0.25]]]]))
    >>> jnp.exp(defer_tokens(0.5)([p, q]))[0, 0].round(3).tolist()
    [0.65, 0.325, 0.025]
    """
    if not isinstance(alpha, jax.core.Tracer) and not 0 <= float(alpha) <= 1:
        raise ValueError(f"alpha = {alpha} was given, a number in [0, 1] is expected")

    def pool(members):
        large, small = _two(members)
        p, q = jnp.exp(large), jnp.exp(small)
        trusted = p >= (1 - alpha) * p.max(-1, keepdims=True)
        rest = jnp.where(trusted, 0.0, q).sum(-1, keepdims=True)
        return jnp.log(jnp.where(trusted, q, 0.0) + p * rest)

    return pool


def _two(members):
    check_members(members, (1, 1))
    large, small = members
    return log_probs(large), log_probs(small)
