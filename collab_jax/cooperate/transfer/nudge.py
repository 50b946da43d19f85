"""Nudging: a small aligned model speaks where a large base model is not sure.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from collab_jax.law import log_probs
from collab_jax.pool import Pool, check_members


def nudging(gamma) -> Pool:
    """Nudging of (base, small aligned model), token by token.

    The base's law where `max p_0 >= gamma`, else the small model's: the rule of Chow's
    cascade (`efficient.cascade.chow`), with the large model asked first.

    The decision is made anew at every token; `nudge_words` lets the small model finish
    its word, as the paper does.

    Args:
      gamma: probability in [0, 1] below which the base is nudged; 0 is the base.

    Raises:
      ValueError: for a number outside of it; when first called, without two members.

    Source: arXiv 2410.09300.

    >>> base = jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4]]]))
    >>> small = jnp.log(jnp.array([[[0.2, 0.8], [0.2, 0.8]]]))
    >>> jax.nn.softmax(nudging(0.7)([base, small]))[0].tolist()
    [[0.9, 0.1], [0.2, 0.8]]
    """
    if not isinstance(gamma, jax.core.Tracer) and not 0 <= float(gamma) <= 1:
        raise ValueError(f"gamma = {gamma} was given, a number in [0, 1] is expected")

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        check_members(members, (1, 1))
        base, small = map(log_probs, members)
        unsure = jnp.exp(base.max(-1, keepdims=True)) < gamma  # a NaN stays the base's
        return jnp.where(unsure, small, base)

    return pooled
