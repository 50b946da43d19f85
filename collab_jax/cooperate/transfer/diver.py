"""DIVER: where a text could go on in several ways, the one that fits its source best.

At a place of divergence, where several tokens are nearly as likely as the best, every
one of them is followed greedily until the text could diverge again. Of these spans the
one is written that is likeliest together with the source that the text is about: by its
log-prob and by its pointwise mutual information with the source,

    argmax_s log p(s | x, y) + PMI(x; s | y),   PMI = log q(x | y, s) - log q(x | y),

whose last term is the same for all spans. q reads what was written alone, and is then
made to say the source (`future.followed`).

Shapes: B rows, K spans, C = K lanes of a row, R = B * C, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.cascade import check_share
from collab_jax.cooperate.transfer.chunk_search import valued
from collab_jax.cooperate.transfer.future import followed, total
from collab_jax.cooperate.transfer.span_search import (
    Grader,
    Growth,
    Span,
    span_search,
)
from collab_jax.decoder import Decoder
from collab_jax.law import best, log_probs
from collab_jax.lm import LM, Params, State


def diverging(ratio, farthest: bool = False) -> Growth:
    """Spans between places of divergence: lane k begins with the k-th likeliest token.

    A token takes part where `p >= ratio * max p`. From then on the lanes are greedy.
    The spans of a row are equally long, unless one ends the text: as far as the first
    lane that meets a place of divergence, or as far as the last.

    Args:
      ratio: in [0, 1]; 1 never diverges.
      farthest: whether the last lane decides.

    Raises:
      ValueError: for a ratio out of range.

    Source: arXiv 2406.02120, DIVER_L and DIVER_R.

    >>> law = jnp.log(jnp.array([[[0.5, 0.4, 0.1]]] * 2).reshape(1, 2, 3))
    >>> token, valid = diverging(0.5).choose(0, law, None, None)
    >>> token.tolist(), valid.tolist()
    ([[0, 1]], [[True, True]])
    >>> none = jnp.zeros((1, 2), bool)
    >>> diverging(0.9).halt(1, law, none, ~none)[1].tolist()
    [[False, False]]
    """
    check_share(ratio)

    def likely(logits: jax.Array) -> jax.Array:
        log_p = log_probs(logits)
        top = log_p.max(-1, keepdims=True)
        least = top + jnp.log(jnp.asarray(ratio, log_p.dtype))
        return (log_p >= least) & ~jnp.isneginf(log_p)

    def halt(
        i: jax.Array, logits: jax.Array, met: jax.Array, live: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        diverges = likely(logits).sum(-1) > 1
        met |= live & diverges & (i > 0)
        over = (met | ~live).all(1) if farthest else met.any(1)
        over = jnp.broadcast_to(over[:, None], met.shape)
        return met, over & (i > 0)

    def choose(
        i: jax.Array, logits: jax.Array, key: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del key, position
        lanes, vocab = logits.shape[1:]
        if lanes > vocab:
            raise ValueError(f"{lanes} spans over a vocabulary of {vocab} tokens")
        _, first = jax.lax.top_k(logits[:, 0], lanes)  # all lanes stand at one place
        taking_part = jnp.take_along_axis(likely(logits[:, 0]), first, axis=1)
        # a law of NaN or without any token shows itself through the first lane
        taking_part |= jnp.arange(lanes) == 0
        likeliest = best(logits)
        token = jnp.where(i == 0, first, likeliest).astype(jnp.int32)
        return token, taking_part | (i > 0)

    return Growth(halt, choose)


def informed(judge: LM, size: int, strength=1.0, chunk: int | None = None) -> Grader:
    """Grades a span by its log-prob and by what it says of the source.

    `log p(s | x, y) + w log q(x | y, s)`

    Args:
      judge: q, an LM over the base's tokens.
      size: tokens of the longest source, with the separator that it begins with.
      strength: w; 1 in the paper, 0 is the likeliest span.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      A grader with the parameters of `future.followed`.

    >>> from collab_jax.models import table
    >>> own = jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]))
    >>> params = own, jnp.array([[[1, 1]]]), jnp.array([[2]])
    >>> grader = informed(table.language_model(1), 2)
    >>> state = grader.init(params, jnp.array([[0]]), jnp.array([1]), 4)
    >>> span = Span(jnp.array([[0, 1]]), jnp.array([[-1.0]]), jnp.array([1]))
    >>> grader.grade(params, state, jnp.zeros(1), span)[0].round(4).tolist()
    [-1.1054]
    """
    source = valued(followed(judge, 1, size, total), chunk=chunk)

    def grade(
        params: Params, state: State, before: jax.Array, span: Span
    ) -> tuple[jax.Array, State]:
        said, state = source.grade(params, state, before, span)
        return span.logprob.sum(1) + strength * said, state

    return source._replace(grade=grade)


def diver(
    lm: LM,
    judge: LM,
    source: int,
    max_new_tokens: int,
    *,
    ratio=0.5,
    spans: int = 4,
    size: int = 8,
    farthest: bool = False,
    strength=1.0,
    chunk: int | None = None,
    **rest: Any,
) -> Decoder:
    """Greedy decoding that at places of divergence weighs whole spans by the source.

    The base is to have its prompt for its own (`combine.prefixed`), so that the shared
    text is what was written and the judge has to say the source from that.

    The source is read once for every span of every step.

    Args:
      lm: the base.
      judge: what the source is read from, the same model or a smaller one.
      source: tokens of the longest source, with its separator.
      max_new_tokens: a row ends after so many new tokens.
      ratio: share of the best token's probability that makes a candidate; 1 is greedy
        decoding. The paper's is not known to us.
      spans: K, candidates at most.
      size: tokens of a span at most.
      farthest: whether the spans go to the last place of divergence that one of them
        meets, and not to the first.
      strength: of the mutual information; 0 takes the likeliest span.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.
      **rest: of `span_search`: eos, stop.

    Returns:
      A decoder whose parameters are (the base's, (the judge's, sources `[B, 1, Q]` with
      a separator in front, lengths `[B, 1]`)).

    Raises:
      ValueError: for numbers out of range.

    Source: arXiv 2406.02120.

    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import table
    >>> one = table.language_model(1)
    >>> base = jnp.log(jnp.array([[0.0, 0.5, 0.4, 0.1]] * 5))
    >>> says_3 = jnp.zeros((5, 4)).at[2, 3].set(4.0)  # behind a 2
    >>> params = base, (says_3, jnp.array([[[2, 3]]]), jnp.array([[2]]))
    >>> greedy = run(diver(one, one, 2, 3, ratio=1), params, *pad([[0]]),
    ...     jax.random.key(0))
    >>> greedy.tokens.tolist()
    [[0, 1, 1, 1]]
    """
    return span_search(
        lm,
        informed(judge, source, strength, chunk),
        diverging(ratio, farthest),
        max_new_tokens,
        beams=1,
        lanes=spans,
        size=size,
        chunk=chunk,
        **rest,
    )
