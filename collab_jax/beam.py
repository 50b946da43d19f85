"""Beam search: the K likeliest continuations found so far, moved by `LM.take`.

The rows of the LM are `B * K`: row b has its beams in rows `b * K .. b * K + K - 1`.
Running beams grow by one token a step; beams that ended stand apart, ranked by their
penalised score, and push each other out. The rules are those of transformers 5, applied
to every row by itself, so that a row's tokens do not depend on its batch.

Shapes: B rows, K beams, C candidates of a step, N new tokens at most, P longest prompt,
L = P + N, V vocabulary.
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law, slots
from collab_jax.decode import start
from collab_jax.decoder import Decoder, DecodeState, Sequences
from collab_jax.lm import LM, State
from collab_jax.stop import Stop


class EarlyStopping(enum.Enum):
    """When a row of K ended beams is done; the values are those of transformers."""

    LIKELY = False  # the best running beam would lose if it ended now
    FULL = True  # at once
    NEVER = "never"  # the best running beam loses at every length it can still reach


class Beams(NamedTuple):
    """K continuations a row, best first; a score of -inf marks an empty place."""

    score: jax.Array  # [B, K] sum of log-probs; of ended beams, penalised
    length: jax.Array  # [B, K] int32, new tokens
    tokens: jax.Array  # [B, K, N] int32; behind `length` anything
    logprob: jax.Array  # [B, K, N] of each token, 0 behind `length`
    entropy: jax.Array  # [B, K, N] of the law of each token, 0 behind `length`
    stop: jax.Array  # [B, K] int32, state of the stop automaton


class BeamState(NamedTuple):
    """What the search must keep."""

    running: Beams  # the LM's rows have consumed all of them but their last tokens
    ended: Beams
    prompt_length: jax.Array  # [B] int32
    last: jax.Array  # [B] int32, last token of the prompt


class Info(NamedTuple):
    """What may be thrown away: measurements of a run, and the beams that lost."""

    calls: jax.Array  # [B] int32, calls of the LM while the row was unfinished
    logprob: jax.Array  # [B, L] log-prob of each new token of the best beam
    entropy: jax.Array  # [B, L] entropy of the law of that token, nats
    beams: Beams  # all K that ended, best first


def largest(
    scores: jax.Array, count: int, block: int = 256
) -> tuple[jax.Array, jax.Array]:
    """The largest numbers and where they are; the first of equals comes first.

    They lie in the `count` blocks whose maxima are largest, so one pass that takes
    maxima is all the work on the whole array.

    Args:
      scores: `[B, M]`, without NaN.
      count: how many, at most M.
      block: numbers to a block.

    Returns:
      Values and indices, `[B, count]`, in falling order.

    >>> values, index = largest(jnp.array([[1.0, 3.0, 2.0, 3.0]]), 3, block=2)
    >>> values.tolist(), index.tolist()
    ([[3.0, 3.0, 2.0]], [[1, 3, 2]])
    """
    batch, width = scores.shape
    blocks = -(-width // block)
    if blocks <= count:
        return jax.lax.top_k(scores, count)
    short = blocks * block - width
    cut = jnp.pad(scores, ((0, 0), (0, short)), constant_values=-jnp.inf)
    cut = cut.reshape(batch, blocks, block)
    chosen = jnp.sort(jax.lax.top_k(cut.max(-1), count)[1], axis=-1)
    index = chosen[:, :, None] * block + jnp.arange(block)  # [B, count, block]
    kept = jnp.take_along_axis(cut, chosen[:, :, None], axis=1)
    values, place = jax.lax.top_k(kept.reshape(batch, -1), count)
    index = jnp.take_along_axis(index.reshape(batch, -1), place, axis=1)
    return values, jnp.minimum(index, width - 1)  # padding is only reached as -inf


def best_of(first: Any, second: Any, count: int) -> Any:
    """The best `count` beams of two sets; among equals those of the first go first.

    Args:
      first: a NamedTuple of `[B, K, ...]` with a `score`.
      second: another of that kind.
      count: at most as many as there are.

    >>> class Two(NamedTuple):
    ...     score: jax.Array
    >>> best_of(Two(jnp.array([[1.0]])), Two(jnp.array([[3.0, 2.0]])), 2).score.tolist()
    [[3.0, 2.0]]
    """
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
    return slots.select(both, jax.lax.top_k(both.score, count)[1])


def _penalised(score: jax.Array, length: jax.Array, length_penalty) -> jax.Array:
    """`score / length ** length_penalty`; -inf stays -inf."""
    scaled = score / length.astype(jnp.float32) ** length_penalty
    return jnp.where(jnp.isneginf(score), -jnp.inf, scaled)


def search(
    lm: LM,
    max_new_tokens: int,
    beams: int = 4,
    *,
    length_penalty=1.0,
    early_stopping: EarlyStopping | bool = False,
    eos: Sequence[int] = (),
    stop: Stop | None = None,
    measure: Callable[[jax.Array], jax.Array] = law.log_probs,
    chunk: int | None = None,
) -> Decoder:
    """Beam search for the continuation of the best penalised log-probability.

    `score(y) = sum_t log p(y_t | x, y_<t) / |y| ** length_penalty`, |y| new tokens.

    A step extends every running beam and ranks its continuations. Of the best `C = K *
    max(2, 1 + len(eos))`, those that end and are among the first K become ended beams
    if their score is among the K best that ended; the best K that do not end run on.
    Equal scores are ranked by beam, then by token id, and an earlier end before a later
    one. With one beam and no `eos` or `stop` this is `decode.greedy`.

    The log-probs are those of `lm`, warps included. A beam whose law forbids every
    token dies. `Sequences.scores` is the plain sum of the best beam's log-probs;
    `info.beams` has all K beams and their penalised scores. In `stream` the tokens of a
    row come together, when it is done.

    Args:
      lm: any LM; its rows are B * K.
      max_new_tokens: a beam ends after so many new tokens.
      beams: K.
      length_penalty: above 0 it favours long texts, below 0 short ones; may be a
        tracer.
      early_stopping: when a row with K ended beams is done: False as soon as its best
        running beam would lose if it ended now, True at once, `EarlyStopping.NEVER`
        when that beam loses at any length it can reach (its log-probability cannot
        rise).
      eos: a beam ends with any of these tokens, which it keeps.
      stop: a beam ends with the token that completes a stop string, which it keeps.
      measure: from logits `[B, V]` to what a beam sums in the place of log-probs, e.g.
        the identity, where scores are not a law (contrastive decoding). -inf forbids.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Raises:
      ValueError: for max_new_tokens or beams < 1, a length penalty that is not finite,
        or another value of `early_stopping`.

    Source: Graves, arXiv 1211.3711; length penalty as in arXiv 1609.08144, in the form
    of transformers.

    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import table
    >>> lm = table.language_model(1)
    >>> params = jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9], [0.6, 0.4]]))
    >>> prompt, length = pad([[0]])
    >>> best = run(search(lm, 2, 2), params, prompt, length, jax.random.key(0))
    >>> best.tokens.tolist(), jnp.exp(best.scores).tolist()
    ([[0, 1, 1]], [0.45])
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("beams", beams)):
        if value < 1:
            raise ValueError(f"{name} = {value}, at least 1 is expected")
    traced = isinstance(length_penalty, jax.core.Tracer)
    if not traced and not math.isfinite(length_penalty):
        raise ValueError(
            f"length_penalty = {length_penalty}, a finite number is expected"
        )
    try:
        rule = EarlyStopping(early_stopping)
    except ValueError:
        raise ValueError(
            f"early_stopping = {early_stopping!r}: False, True or EarlyStopping.NEVER "
            "is expected"
        ) from None
    ends = jnp.asarray(tuple(eos), jnp.int32)
    wanted = beams * max(2, 1 + len(ends))

    def init(params, prompt, prompt_length, key):
        batch = prompt.shape[0]
        rows = jnp.arange(batch)
        prompt_length = prompt_length.astype(jnp.int32)
        inner, tokens = start(lm, params, prompt, prompt_length, max_new_tokens, chunk)
        inner = lm.take(inner, jnp.repeat(rows, beams))
        whole = jnp.zeros((batch, beams, max_new_tokens), jnp.float32)
        zeros = jnp.zeros((batch, beams), jnp.int32)
        none = jnp.full((batch, beams), -jnp.inf)
        ended = Beams(none, zeros, whole.astype(jnp.int32), whole, whole, zeros)
        running = ended._replace(score=none.at[:, 0].set(0.0))  # K equal beams: one
        return DecodeState(
            lm=inner,
            tokens=tokens,
            length=prompt_length,
            done=rows < 0,
            key=law.row_keys(key, batch),
            own=BeamState(
                running, ended, prompt_length, tokens[rows, prompt_length - 1]
            ),
            info=jnp.zeros(batch, jnp.int32),
        )

    def grow(running, log_p) -> tuple[Beams, jax.Array]:
        """The best C continuations of the running beams, and their parents [B, C]."""
        batch, _, vocab = log_p.shape
        alive = ~jnp.isneginf(running.score)[:, :, None]
        total = jnp.where(alive, running.score[:, :, None] + log_p, -jnp.inf)
        count = min(wanted, beams * vocab)
        score, index = largest(total.reshape(batch, -1), count)
        parent, token = index // vocab, index % vocab
        rows = jnp.arange(batch)[:, None]
        old = slots.select(running, parent)
        return Beams(
            score,
            old.length + 1,
            slots.put(old.tokens, token, old.length),
            slots.put(old.logprob, log_p[rows, parent, token], old.length),
            slots.put(old.entropy, law.entropy(log_p)[rows, parent], old.length),
            old.stop if stop is None else stop.advance(old.stop, token),
        ), parent

    def ends_here(grown) -> jax.Array:
        """Which candidates cannot run on, [B, C]."""
        ended = (slots.last(grown.tokens, grown.length, 0)[:, :, None] == ends).any(-1)
        ended |= grown.length >= max_new_tokens
        return ended if stop is None else ended | stop.accept[grown.stop]

    def settled(running, ended) -> jax.Array:
        """Which rows are done, [B]: no running beam is worth another step."""
        reach = running.length[:, 0]
        if rule is EarlyStopping.NEVER:
            reach = jnp.where(jnp.asarray(length_penalty) > 0, max_new_tokens, reach)
        hope = _penalised(running.score[:, 0], reach, length_penalty)
        worst = ended.score[:, -1]  # -inf until K beams have ended
        done = ~(hope > worst)
        return done | ~jnp.isneginf(worst) if rule is EarlyStopping.FULL else done

    def step(params, state):
        own, done = state.own, state.done
        batch = done.shape[0]
        token = slots.last(own.running.tokens, own.running.length, own.last[:, None])
        out, inner = lm.extend(params, state.lm, token.reshape(-1, 1))
        inner = lm.rewind(inner, jnp.repeat(done.astype(jnp.int32), beams))
        log_p = measure(out.logits[:, 0]).reshape(batch, beams, -1)
        invalid = jnp.isnan(log_p)
        grown, parent = grow(own.running, jnp.where(invalid, -jnp.inf, log_p))

        over = ends_here(grown)
        score = _penalised(grown.score, grown.length, length_penalty)
        first = jnp.arange(over.shape[1]) < beams
        final = grown._replace(score=jnp.where(over & first, score, -jnp.inf))
        ended = best_of(own.ended, final, beams)
        score = jnp.where(over, -jnp.inf, grown.score)
        score, place = jax.lax.top_k(score, beams)
        running = slots.select(grown, place)._replace(score=score)
        parent = jnp.take_along_axis(parent, place, axis=1)

        broken = (invalid.any(-1) & ~jnp.isneginf(own.running.score)).any(-1)
        score = jnp.where(broken[:, None], jnp.nan, ended.score)
        ended = ended._replace(score=score)
        running, ended = jax.tree.map(
            lambda old, new: jnp.where(
                done.reshape(-1, *(1,) * (new.ndim - 1)), old, new
            ),
            (own.running, own.ended),
            (running, ended),
        )
        parent = jnp.where(done[:, None], jnp.arange(beams), parent)
        if beams > 1:
            inner = move(lm, inner, parent)
        calls = state.info + ~done
        done |= settled(running, ended)
        return DecodeState(
            lm=inner,
            tokens=slots.write(state.tokens, ended.tokens[:, 0], own.prompt_length),
            length=own.prompt_length + jnp.where(done, ended.length[:, 0], 0),
            done=done,
            key=state.key,
            own=own._replace(running=running, ended=ended),
            info=calls,
        )

    def finish(state):
        own = state.own
        score, zeros = own.ended.score[:, 0], jnp.zeros(state.tokens.shape)
        total = own.ended.logprob[:, 0].sum(-1)
        info = Info(
            state.info,
            slots.write(zeros, own.ended.logprob[:, 0], own.prompt_length),
            slots.write(zeros, own.ended.entropy[:, 0], own.prompt_length),
            own.ended,
        )
        return Sequences(
            state.tokens,
            state.length,
            own.prompt_length,
            jnp.where(jnp.isfinite(score), total, score),
            info,
        )

    return Decoder(init, step, finish)


def move(lm: LM, state: State, parent: jax.Array) -> State:
    """Gathers the rows of the parents; no copy where all of them stay.

    A loop of no or one trip: XLA on CPU copies the whole cache through a `cond` whose
    first branch is the identity, though nothing moves.

    Args:
      lm: any LM.
      state: of B * K rows.
      parent: `[B, K]`, the beam of the same row that each continues.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.zeros((4, 3))
    >>> _, state = lm.extend(params, lm.init(params, 2, 4), jnp.array([[1], [2]]))
    >>> move(lm, state, jnp.array([[1, 1]])).tokens[:, 0].tolist()
    [2, 2]
    """
    batch, beams = parent.shape
    rows = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)

    def gather(carry):
        return jnp.zeros((), bool), lm.take(carry[1], rows)

    moved = (parent != jnp.arange(beams)).any()
    return jax.lax.while_loop(lambda carry: carry[0], gather, (moved, state))[1]
