"""Gates: where the first member of an ensemble is unsure, and the others are asked.

A gate reads the output of one member at each place alone, so that what is built on it
obeys the laws of an LM. Thresholds may be tracers. A NaN is never unsure: it stays the
first member's, and visible.

Shapes: B rows, T tokens of this call, V vocabulary, W width of the hidden states.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.lm import Out

Gate = Callable[[Out], jax.Array]  # of the first member -> [B, T] bool, True = ask


def _refuse(name: str, value: Any, high: float) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(value) <= high:
        raise ValueError(
            f"{name} = {value} was given, a number in [0, {high:g}] is expected"
        )


def confidence(least) -> Gate:
    """Asks where the best token is not likely enough: `max_v p(v) < least`.

    Args:
      least: probability in [0, 1]; 0 never asks.

    Raises:
      ValueError: for a number outside of it.

    Source: the thresholded ensemble of GaC, arXiv 2406.12585.

    >>> out = Out(jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4]]])))
    >>> confidence(0.7)(out).tolist()
    [[False, True]]
    """
    _refuse("least", least, 1)
    return lambda out: jnp.exp(law.log_probs(out.logits).max(-1)) < least


def entropy(most) -> Gate:
    """Asks where the law is spread: `-sum_v p(v) log p(v) > most`.

    Args:
      most: nats >= 0.

    Raises:
      ValueError: for a negative number.

    >>> out = Out(jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4]]])))
    >>> entropy(0.5)(out).tolist()
    [[False, True]]
    """
    _refuse("most", most, float("inf"))
    return lambda out: law.entropy(out.logits) > most


def margin(least) -> Gate:
    """Asks where the two best tokens are nearly alike: `p(1st) - p(2nd) < least`.

    Args:
      least: probability in [0, 1]; 0 never asks.

    Raises:
      ValueError: for a number outside of it; when called, for one token alone.

    >>> out = Out(jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4]]])))
    >>> margin(0.3)(out).tolist()
    [[False, True]]
    """
    _refuse("least", least, 1)

    def gate(out):
        if out.logits.shape[-1] < 2:
            raise ValueError("a vocabulary of 1 token has no second best")
        best = jnp.exp(jax.lax.top_k(law.log_probs(out.logits), 2)[0])
        return best[..., 0] - best[..., 1] < least

    return gate


def hidden(features: Any) -> jax.Array:
    """What `learned` reads unless told otherwise: the states that the head reads.

    >>> from collab_jax.lm import Features
    >>> hidden(Features(jnp.ones((1, 2, 3)))).shape
    (1, 2, 3)
    """
    return features.hidden


def learned(
    weights: jax.Array,
    threshold=0.5,
    key: Callable[[Any], jax.Array] = hidden,
) -> Gate:
    """Asks where a learned switch says so: `sigmoid(w . h) > threshold`.

    Args:
      weights: `[W]`, as `learned_gate.fit` gives.
      threshold: probability in [0, 1], usually tuned on a few texts; 1 never asks.
      key: from the first member's features to h, `[B, T, W]`.

    Raises:
      ValueError: for a threshold outside of it; when called, for weights of another
        width.

    Source: Co-LLM, arXiv 2403.03870.

    >>> from collab_jax.lm import Features
    >>> out = Out(jnp.zeros((1, 2, 5)), Features(jnp.array([[[1.0, 0.0], [0.0, 1.0]]])))
    >>> learned(jnp.array([-2.0, 2.0]))(out).tolist()
    [[False, True]]
    """
    _refuse("threshold", threshold, 1)

    def gate(out):
        states = key(out.features)
        if states.shape[-1:] != weights.shape:
            raise ValueError(
                f"weights of shape {weights.shape} for hidden states of width "
                f"{states.shape[-1]}: [{states.shape[-1]}] is expected"
            )
        states = states.astype(jnp.float32)
        return jax.nn.sigmoid(states @ weights.astype(jnp.float32)) > threshold

    return gate
