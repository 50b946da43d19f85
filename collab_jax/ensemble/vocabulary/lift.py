"""Lifts: a law over a member's tokens becomes one over the tokens of the text.

A lift is a function from logits `[..., U]` to logits `[..., V]`, so that `warp` makes
an LM of it: `warp(spelled(lm, bridge), carry(home, V))`. The maps are arrays of
integers; they may be tracers.

Shapes: U tokens of the member, V of the text; `...` any leading axes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from collab_jax.law import log_probs

Lift = Callable[[jax.Array], jax.Array]


def carry(home: jax.Array, vocab: int) -> Lift:
    """Every token takes its mass home: `p[v] = sum_{u: home[u] = v} softmax(z)[u]`.

    What has no home is dropped: the law is then not normalised, and a pool such as
    `mixture` renormalises it.

    Args:
      home: `[U]` int32, the token of the text that a member's token stands for; -1 for
        none. Several may stand for one.
      vocab: V.

    Raises:
      ValueError: when called with logits of another vocabulary.

    Source: the vocabulary map of GaC, arXiv 2406.12585.

    >>> z = jnp.log(jnp.array([0.5, 0.2, 0.2, 0.1]))
    >>> jnp.exp(carry(jnp.array([2, 0, 2, -1]), 3)(z)).tolist()
    [0.2, 0.0, 0.7]
    """

    def lift(logits):
        _check(logits, home.shape[0])
        log_p = log_probs(logits)
        at = jnp.where(home < 0, vocab, home)  # beyond the end: dropped
        nothing = jnp.full((*logits.shape[:-1], vocab), -jnp.inf, log_p.dtype)
        top = nothing.at[..., at].max(jax.lax.stop_gradient(log_p), mode="drop")
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        # relative to the likeliest of each home, so that none is lost by rounding
        share = jnp.exp(log_p - jnp.where(home < 0, 0.0, top[..., home]))
        total = jnp.zeros_like(top).at[..., at].add(share, mode="drop")
        empty = total == 0.0
        return jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1.0, total)))

    return lift


def borrow(index: jax.Array, vocab: int) -> Lift:
    """Every token of the text has the logit of a member's token: `z'[v] = z[index[v]]`.

    Several may ask for the same one, which is then counted for each.

    Args:
      index: `[V]` int32, a token of the member for each of the text; -1 for none, which
        forbids it.
      vocab: U.

    Raises:
      ValueError: when called with logits of another vocabulary.

    Source: how PackLLM maps logits, arXiv 2404.11531.

    >>> borrow(jnp.array([1, 1, -1]), 2)(jnp.array([0.5, 2.0])).tolist()
    [2.0, 2.0, -inf]
    """

    def lift(logits):
        _check(logits, vocab)
        return jnp.where(index < 0, -jnp.inf, logits[..., jnp.maximum(index, 0)])

    return lift


def _check(logits: jax.Array, known: int) -> None:
    if logits.shape[-1] != known:
        raise ValueError(
            f"logits over {logits.shape[-1]} tokens for a map from {known}: make the "
            "map for this model, with as many tokens as it has logits"
        )
