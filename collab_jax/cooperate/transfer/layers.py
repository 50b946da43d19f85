"""Contrast of a model with its own early layers: what it learns on the way up counts.

`layered` makes members of the layers: the head reads the hidden states of the taps, as
it reads the last ones. The last norm stands before the last ones only, as in the code
of these methods. One run of the model gives all members.

Shapes: B rows, T tokens, V vocabulary, J early layers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.distill import jensen_shannon
from collab_jax.law import log_probs
from collab_jax.lm import LM, Backbone, Features, Out, Params, language_model
from collab_jax.order import among_largest
from collab_jax.pool import Pool, check_members, linear, plausible


def layered(backbone: Backbone, taps: Sequence[str], pool: Pool) -> LM:
    """A model whose layers are the members: first the last layer, then the taps.

    `logits = pool([unembed(hidden), unembed(tap_1), .. unembed(tap_J)])`

    Args:
      backbone: built with these taps.
      taps: "hidden.i", the output of layer i; J of them.
      pool: of the 1 + J laws: `dola()`, `sled()`, or any other.

    Returns:
      An LM with the parameters of the model.

    Raises:
      ValueError: without taps; when first called, for a tap that the backbone lacks.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> taps = ("hidden.0", "hidden.1")
    >>> lm = layered(transformer.transformer(config, taps), taps, dola())
    >>> params = transformer.init(jax.random.key(0), config)
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[1, 2, 3]]))
    >>> out.logits.shape
    (1, 3, 10)
    """
    taps = tuple(taps)
    if not taps:
        raise ValueError("layered without taps: at least one early layer is expected")
    lm = language_model(backbone)

    def members(params: Params, out: Out) -> list[jax.Array]:
        seen: Features = out.features
        missing = [tap for tap in taps if tap not in seen.taps]
        if missing:
            raise ValueError(
                f"the backbone has no taps {missing}, it has {list(seen.taps)}: build "
                f"it with transformer(config, taps={taps})"
            )
        early = [backbone.unembed(params, seen.taps[tap]) for tap in taps]
        return [out.logits, *early]

    def pooled(call: Any) -> Any:
        def run(params: Params, *arguments: Any) -> tuple[Out, Any]:
            out, state = call(params, *arguments)
            return Out(pool(members(params, out)), out.features), state

        return run

    return lm._replace(extend=pooled(lm.extend), branch=pooled(lm.branch))


def most_distant(pool: Pool) -> Pool:
    """A pool of the first member and of that other one whose law differs most from it.

    `pool([z_0, z_m])` with `m = argmax_j JSD(p_0, p_j)`, found at every place of every
    row.

    Args:
      pool: of two members.

    Raises:
      ValueError: when first called, without two members.

    Source: the dynamic premature layer of arXiv 2309.03883, equation 2.

    >>> laws = jnp.log(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]))
    >>> jax.nn.softmax(most_distant(linear(0, 1))(laws)).tolist()
    [0.1, 0.9]
    """
    divergence = jensen_shannon()

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        check_members(members, None)
        if len(members) < 2:
            raise ValueError("one member: another one to contrast it with is expected")
        last, early = members[0], jnp.stack(members[1:])
        distance = divergence(log_probs(last)[None], log_probs(early))  # [J, B, T]
        chosen = jnp.argmax(distance, axis=0)[None, ..., None]
        return pool([last, jnp.take_along_axis(early, chosen, axis=0)[0]])

    return pooled


def dola(alpha=0.1) -> Pool:
    """DoLa of (last layer, early layers): the last law less that of a premature layer.

    `log p(v) = log p_N(v) - log p_M(v)` where `p_N(v) >= alpha max p_N`, else -inf,
    with M the early layer that differs most.

    Args:
      alpha: plausibility, in [0, 1]; 0.1 in the paper.

    Raises:
      ValueError: for an alpha out of range.

    Source: arXiv 2309.03883; it adds a repetition penalty of 1.2 (`warp`).

    >>> laws = jnp.log(jnp.array([[0.5, 0.45, 0.05], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1]]))
    >>> jax.nn.softmax(dola(0.2)(laws)).tolist()  # 0.5 / 0.8 to 0.45 / 0.1
    [0.122, 0.878, 0.0]
    """
    return plausible(alpha, most_distant(linear(1, -1)))


def sled(rate=2.0, k=10) -> Pool:
    """SLED of (last layer, early layers): one step of the last law's own evolution.

    From every early layer j to the last one the logits went by `z_N - z_j`. Had token v
    been the truth, they should have gone by `e_v - p_j`. What both have in common,
    `m_j(v) = max(0, cos(z_N - z_j, e_v - p_j))`, is evidence for v, and over the k
    likeliest tokens `q(v) = sum_j m_j(v) ** 2 / sum_j,u m_j(u) ** 2` is the latent law.
    The last logits take one step of gradient descent towards it: `z = z_N - rate * (p_N
    - q)`. Other tokens are forbidden; without any evidence the law stays as it is.

    The lengths of the logits matter here, so no member is normalised first.

    Args:
      rate: of the step; 0 is the last law over its k likeliest tokens.
      k: tokens that evidence is looked for, at least 1; ties are all kept.

    Raises:
      ValueError: when first called, without two members.

    Source: arXiv 2411.02433, algorithm 1.

    >>> last, early = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
    >>> sled(1.0, 2)([last, early]).tolist()  # away from 0.665 and 0.245, to 1 and 0
    [2.3348, 0.7553, -inf]
    """

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        check_members(members, None)
        if len(members) < 2:
            raise ValueError("one member: an early layer to start from is expected")
        last = members[0]
        kept = among_largest(last, k) & ~jnp.isneginf(last)
        evidence = jnp.zeros_like(last)
        for early in members[1:]:
            cosine = _agreement(last, early)
            evidence += jnp.where(kept, jnp.maximum(cosine, 0.0), 0.0) ** 2
        total = evidence.sum(-1, keepdims=True)
        none = total == 0.0
        latent = evidence / jnp.where(none, 1.0, total)
        step = jnp.where(none, 0.0, rate * (jnp.exp(log_probs(last)) - latent))
        return jnp.where(kept, last - step, -jnp.inf)

    return pooled


def _agreement(last: jax.Array, early: jax.Array) -> jax.Array:
    """`cos(z_N - z_j, e_v - p_j)` for every token v, `[..., V]`; 0 where undefined."""
    absent = jnp.isneginf(last) | jnp.isneginf(early)
    went = jnp.where(absent, 0.0, last) - jnp.where(absent, 0.0, early)
    p = jnp.exp(log_probs(early))
    dot = went - (went * p).sum(-1, keepdims=True)
    length = (went**2).sum(-1, keepdims=True)
    square = length * ((p**2).sum(-1, keepdims=True) - 2 * p + 1)
    none = square <= 0.0
    return jnp.where(none, 0.0, dot / jnp.sqrt(jnp.where(none, 1.0, square)))
