"""When a proposer stops drafting: adapted stopping rules.

A rule may read everything up to and including the token just drafted, and that token
stays. So given that a token was drafted, it still follows the draft's law, and every
lossless verifier remains lossless.

Shapes: B rows, K longest draft, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient.draft import Verified
from collab_jax.lm import Out


class Stopping(NamedTuple):
    """A stopping rule, with a memory of its own in every row."""

    init: Callable[[Any, int], Any]  # (params, batch) -> state
    # (params, state, i, out, token [B]) -> (state, stop [B]): i + 1 tokens have been
    # drafted, the last of them from out, `[B, ...]` of the draft's LM. The state of a
    # row that has stopped must no longer change what it does
    step: Callable[[Any, Any, jax.Array, Out, jax.Array], tuple[Any, jax.Array]]
    observe: Callable[[Any, Any, Verified], Any]  # (params, state, verified) -> state


def confidence(threshold) -> Stopping:
    """Stops behind a token that the draft gave less than this probability.

    Its parameters are `()`. The unlikely token is kept.

    Args:
      threshold: probability; 0 never stops, 1 stops behind every uncertain token.

    Source: assisted generation in transformers, `assistant_confidence_threshold`, 0.4.

    >>> rule = confidence(0.4)
    >>> out = Out(jnp.log(jnp.array([[0.7, 0.3], [0.7, 0.3]])))
    >>> rule.step((), rule.init((), 2), 0, out, jnp.array([0, 1]))[1].tolist()
    [False, True]
    """

    def step(params, state, i, out, token):
        del params, i
        log_q = jnp.take_along_axis(law.log_probs(out.logits), token[:, None], -1)
        return state, jnp.exp(log_q[:, 0]) < threshold

    return Stopping(lambda params, batch: (), step, lambda params, state, _: state)


def schedule(start: int, longest: int, more: int = 2, less: int = 1) -> Stopping:
    """A draft grows by `more` when all of it was accepted, and else shrinks by `less`.

    Its parameters are `()`; every row has a length of its own, at least 1.

    Args:
      start: tokens of the first draft.
      longest: tokens of the longest draft.
      more: tokens added.
      less: tokens taken away.

    Source: assisted generation in transformers, the heuristic schedule.

    >>> rule = schedule(3, 8)
    >>> rule.step((), rule.init((), 1), 2, None, jnp.array([0]))[1].tolist()
    [True]
    """

    def init(params, batch):
        del params
        return jnp.full(batch, min(start, longest), jnp.int32)

    def step(params, state, i, out, token):
        del params, out, token
        return state, i + 1 >= state

    def observe(params, state, verified):
        del params
        whole = verified.accepted >= verified.draft.count
        new = jnp.clip(state + jnp.where(whole, more, -less), 1, longest)
        return jnp.where(verified.count > 0, new, state)

    return Stopping(init, step, observe)
