"""Search by chunks of drawn text: blockwise best-of-K, and weak-to-strong search.

A large model draws several continuations of L tokens, another model grades the texts,
and the best ones go on. The large model is only drawn from, so it may be any LM. How
the steps go is in `span_search`.

Shapes: B rows, R lanes, L tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from collab_jax.combine import product
from collab_jax.cooperate.transfer.reward import Judge, output
from collab_jax.cooperate.transfer.span_search import Grader, Span, drawn, span_search
from collab_jax.decode import start
from collab_jax.decoder import Decoder
from collab_jax.lm import LM, Params, State
from collab_jax.pool import linear


def _reader(
    lm: LM, chunk: int | None
) -> Callable[[Params, jax.Array, jax.Array, int], State]:
    """`Grader.init` of an LM that reads the text."""

    def init(params: Params, prompt: jax.Array, length: jax.Array, room: int) -> State:
        return start(lm, params, prompt, length, room, chunk)[0]

    return init


def valued(values: LM, judge: Judge = output(), chunk: int | None = None) -> Grader:
    """Grades a text by what a model of values says at its end.

    Args:
      values: any LM over the base's tokens; its outputs are read as numbers.
      judge: from the outputs to a number.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    >>> from collab_jax.models import table
    >>> params = jnp.array([[1.0, 0.0], [5.0, 0.0], [0.0, 0.0]])
    >>> grader = valued(table.language_model(1))
    >>> state = grader.init(params, jnp.array([[0]]), jnp.array([1]), 4)
    >>> span = Span(jnp.array([[0, 1, 1]]), jnp.zeros((1, 2)), jnp.array([1]))
    >>> grader.grade(params, state, jnp.zeros(1), span)[0].tolist()
    [5.0]
    """

    def grade(
        params: Params, state: State, before: jax.Array, span: Span
    ) -> tuple[jax.Array, State]:
        del before
        # what is said inside of the span is not read, and so not computed
        _, state = values.extend(params, state, span.tokens)
        state = values.rewind(state, span.tokens.shape[1] - span.grown)
        out, state = values.extend(params, state, span.last()[:, None])
        state = values.rewind(state, jnp.ones_like(span.grown))
        return judge(out.logits[:, 0]), state

    return Grader(_reader(values, chunk), grade, values.take)


def summed(scores: LM, chunk: int | None = None) -> Grader:
    """Grades a text by the sum of the scores of its new tokens.

    `g(y) = sum_t s(y_t | x, y_<t)`, with the logits of the LM as they are.

    Args:
      scores: an LM whose logits are scores of tokens, not normalised.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    >>> from collab_jax.models import table
    >>> params = jnp.array([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    >>> grader = summed(table.language_model(1))
    >>> state = grader.init(params, jnp.array([[0]]), jnp.array([1]), 4)
    >>> span = Span(jnp.array([[0, 1, 0]]), jnp.zeros((1, 2)), jnp.array([2]))
    >>> grader.grade(params, state, jnp.ones(1), span)[0].tolist()  # 1 + 2 + 3
    [6.0]
    """

    def grade(
        params: Params, state: State, before: jax.Array, span: Span
    ) -> tuple[jax.Array, State]:
        given, new = span.tokens[:, :-1], span.tokens[:, 1:]
        out, state = scores.extend(params, state, given)
        state = scores.rewind(state, new.shape[1] - span.grown)
        found = jnp.take_along_axis(out.logits, new[:, :, None], axis=2)[:, :, 0]
        counted = jnp.arange(new.shape[1]) < span.grown[:, None]
        return before + jnp.where(counted, found, 0.0).sum(1), state

    return Grader(_reader(scores, chunk), grade, scores.take)


def best_of_blocks(
    lm: LM,
    values: LM,
    max_new_tokens: int,
    samples: int,
    size: int,
    *,
    judge: Judge = output(),
    **rest: Any,
) -> Decoder:
    """Blockwise controlled decoding: of K drawn blocks, the one of the highest value.

    `y <- y ++ argmax_k V(x, y ++ z_k)` with K blocks z of L tokens from the base. One
    block of the whole length is best-of-K, one sample the base.

    Args:
      lm: the base, which the blocks are drawn from, warps included.
      values: a model of values, trained by `reward_training.fudge` or `q_learning`, or
        of rewards.
      max_new_tokens: a row ends after so many new tokens.
      samples: K.
      size: L.
      judge: from the outputs of `values` to a number.
      **rest: of `span_search`: eos, stop, chunk.

    Returns:
      A decoder whose parameters are (the base's, those of the model of values).

    Raises:
      ValueError: for numbers below 1.

    Source: arXiv 2310.17022, section 3.

    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import table
    >>> lm, flat = table.language_model(1), jnp.zeros((4, 3))
    >>> likes_2 = flat.at[2, 0].set(1.0)
    >>> best = best_of_blocks(lm, lm, 4, 16, 1)
    >>> run(best, (flat, likes_2), *pad([[0]]), jax.random.key(0)).tokens.tolist()
    [[0, 2, 2, 2, 2]]
    """
    return span_search(
        lm,
        valued(values, judge),
        drawn(),
        max_new_tokens,
        beams=1,
        lanes=samples,
        size=size,
        **rest,
    )


def weak_to_strong_search(
    lm: LM,
    tuned: LM,
    reference: LM,
    max_new_tokens: int,
    beams: int = 4,
    samples: int = 4,
    size: int = 10,
    **rest: Any,
) -> Decoder:
    """Weak-to-strong search: a small model's tuning chooses what a large one has drawn.

    `argmax_y log p_tuned(y | x) - log p_reference(y | x)`, by a search that keeps W
    beams, draws K chunks of L tokens behind each, and keeps the best W texts. Both
    small models read every token once. One beam is best-of-K by chunks.

    Args:
      lm: the large model; the code draws from `warp(lm, top_k(50))`.
      tuned: the small model after tuning, over the same tokens.
      reference: the small model before it.
      max_new_tokens: a beam ends after so many new tokens.
      beams: W; 4 in the code.
      samples: K; 4 in the code.
      size: L; 10 in the code, 30 in its examples.
      **rest: of `span_search`: eos, stop, chunk.

    Returns:
      A decoder whose parameters are (the large model's, (the tuned's, the
      reference's)).

    Raises:
      ValueError: for numbers below 1.

    Source: arXiv 2405.19262, chunk-level beam search.

    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import table
    >>> lm, flat = table.language_model(1), jnp.zeros((4, 3))
    >>> likes_2 = flat.at[:, 2].set(1.0)
    >>> search = weak_to_strong_search(lm, lm, lm, 4, 2, 8, 2)
    >>> params = flat, (likes_2, flat)
    >>> run(search, params, *pad([[0]]), jax.random.key(0)).tokens.tolist()
    [[0, 2, 2, 2, 2]]
    """
    return span_search(
        lm,
        summed(product([tuned, reference], linear(1, -1))),
        drawn(),
        max_new_tokens,
        beams=beams,
        lanes=samples,
        size=size,
        **rest,
    )
