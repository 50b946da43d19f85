"""Search over spans: several continuations grow, are graded, and the best go on.

A row has W beams. In each step every beam grows in K lanes by a span of up to L tokens,
a `Growth` says how, and a `Grader` reads the texts anew where they are new. The W best
lanes are the next beams. What the grader has read stays in its own cache, so a text is
graded for the price of its last span. A beam that has ended goes on as one lane that
does not grow.

The rows of both models are `B * W * K`, lane c of row b in row `b * W * K + c`.

Shapes: B rows, W beams, K lanes of a beam, C = W * K, R = B * C, L tokens of a span, N
new tokens at most, P longest prompt, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law, slots
from collab_jax.decode import start
from collab_jax.decoder import Decoder, DecodeState, Sequences
from collab_jax.lm import LM, Params, State
from collab_jax.stop import Stop


class Span(NamedTuple):
    """What the lanes have grown in a step."""

    tokens: jax.Array  # [R, 1 + L] int32, the token before and the new ones
    logprob: jax.Array  # [R, L] in the base's law, 0 behind `grown`
    grown: jax.Array  # [R] int32, new tokens

    def last(self) -> jax.Array:
        """The last token of each lane, `[R]`.

        >>> span = Span(jnp.array([[7, 8, 9, 0]]), jnp.zeros((1, 3)), jnp.array([2]))
        >>> span.last().tolist()
        [9]
        """
        return jnp.take_along_axis(self.tokens, self.grown[:, None], axis=1)[:, 0]


class Grader(NamedTuple):
    """What the beams are chosen by; larger is better, -inf drops a lane."""

    # (params, prompt [B, P], prompt_length [B], room) -> state of B rows that has read
    # all but the last token of each prompt; the text may become P + room tokens long
    init: Callable[[Params, jax.Array, jax.Array, int], State]
    # (params, state, grade before [R], span) -> (grade [R], state)
    grade: Callable[[Params, State, jax.Array, Span], tuple[jax.Array, State]]
    take: Callable[[State, jax.Array], State]


class Growth(NamedTuple):
    """How lanes grow, token by token; `i` counts the tokens of the span."""

    # (i, logits [B, C, V], met [B, C], live [B, C]) -> (met, halt [B, C]): is this
    # lane's span over before another token? `met` is what the growth keeps in a step
    halt: Callable[..., tuple[jax.Array, jax.Array]]
    # (i, logits [B, C, V], key [R], position [R]) -> (token [B, C], valid [B, C]): a
    # lane without a valid token is dropped
    choose: Callable[..., tuple[jax.Array, jax.Array]]


class Beams(NamedTuple):
    """W continuations a row, best first; a grade of -inf marks an empty place."""

    grade: jax.Array  # [B, W]
    length: jax.Array  # [B, W] int32, new tokens
    tokens: jax.Array  # [B, W, N] int32; 0 behind `length`
    logprob: jax.Array  # [B, W, N] in the base's law, 0 behind `length`
    entropy: jax.Array  # [B, W, N] of that law, 0 behind `length`
    ended: jax.Array  # [B, W] bool
    stop: jax.Array  # [B, W] int32, state of the stop automaton


class SpanState(NamedTuple):
    """What the search must keep."""

    beams: Beams
    prompt_length: jax.Array  # [B] int32
    last: jax.Array  # [B] int32, last token of the prompt
    broken: jax.Array  # [B] bool, a law or a grade was NaN


class Info(NamedTuple):
    """What may be thrown away: measurements of a run, and the beams that lost."""

    calls: jax.Array  # [B] int32, calls of the base while the row was unfinished
    logprob: jax.Array  # [B, P + N] of the new tokens of the best beam
    entropy: jax.Array  # [B, P + N] of the laws of those tokens, nats
    beams: Beams  # all W, best first


class Growing(NamedTuple):
    """The lanes while they grow."""

    i: jax.Array  # [] int32, tokens grown
    inner: State  # of the base
    lanes: Beams
    halted: jax.Array  # [B, C] bool
    met: jax.Array  # [B, C] bool, the growth's own
    void: jax.Array  # [B, C] bool, lanes that are dropped
    broken: jax.Array  # [B] bool
    calls: jax.Array  # [B] int32


def drawn() -> Growth:
    """Lanes that are sampled from the base, each with random numbers of its own.

    >>> token, valid = drawn().choose(0, jnp.array([[[0.0, -jnp.inf]]]),
    ...     law.row_keys(jax.random.key(0), 1), jnp.array([4]))
    >>> token.tolist(), valid.tolist()
    ([[0]], [[True]])
    """

    def choose(i, logits, key, position):
        del i
        batch, lanes, vocab = logits.shape
        token = law.draw(logits.reshape(-1, vocab), key, position)
        return token.reshape(batch, lanes), jnp.ones((batch, lanes), bool)

    return Growth(lambda i, logits, met, live: (met, jnp.zeros_like(met)), choose)


def span_search(
    lm: LM,
    grader: Grader,
    growth: Growth,
    max_new_tokens: int,
    *,
    beams: int,
    lanes: int,
    size: int,
    eos: Sequence[int] = (),
    stop: Stop | None = None,
    chunk: int | None = None,
) -> Decoder:
    """Grows every beam in several lanes by a span, and keeps the best lanes.

    Lane c of a row has the random numbers of the key `fold_in(row key, c)`. Equal
    grades are ranked by lane. With one beam, the tokens of a step are final, and
    `stream` yields them.

    Args:
      lm: the base, which writes; warps included.
      grader: what the lanes are chosen by.
      growth: how they grow.
      max_new_tokens: N.
      beams: W.
      lanes: K.
      size: L, tokens of a span at most.
      eos: a beam ends with any of these tokens, which it keeps.
      stop: a beam ends with the token that completes a stop string, which it keeps.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      A decoder whose parameters are (the base's, the grader's). `Sequences.scores` are
      sums of the base's log-probs, `info.beams` has the grades.

    Raises:
      ValueError: for a size below 1.

    >>> from collab_jax.cooperate.transfer.chunk_search import valued
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import table
    >>> one = table.language_model(1)
    >>> params = [table.init(jax.random.key(seed), 5, 1) for seed in range(2)]
    >>> search = span_search(one, valued(one), drawn(), 6, beams=1, lanes=3, size=2)
    >>> result = run(search, params, *pad([[1, 2], [3]]), jax.random.key(2))
    >>> result.length.tolist()
    [8, 7]
    """
    given = {
        "max_new_tokens": max_new_tokens, "beams": beams, "lanes": lanes, "size": size,
    }  # fmt: skip
    for name, number in given.items():
        if number < 1:
            raise ValueError(f"{name} = {number}, at least 1 is expected")
    ends = jnp.asarray(tuple(eos), jnp.int32)
    size = min(size, max_new_tokens)
    count = beams * lanes

    def init(params, prompt, prompt_length, key):
        batch = prompt.shape[0]
        rows = jnp.arange(batch)
        prompt_length = prompt_length.astype(jnp.int32)
        inner, tokens = start(
            lm, params[0], prompt, prompt_length, max_new_tokens, chunk
        )
        own = grader.init(params[1], prompt, prompt_length, max_new_tokens + size)
        copies = jnp.repeat(rows, count)
        zeros = jnp.zeros((batch, beams), jnp.int32)
        whole = jnp.zeros((batch, beams, max_new_tokens), jnp.float32)
        first = Beams(
            grade=jnp.zeros((batch, beams)),
            length=zeros,
            tokens=whole.astype(jnp.int32),
            logprob=whole,
            entropy=whole,
            ended=zeros > 0,
            stop=zeros,
        )
        last = tokens[rows, prompt_length - 1]
        return DecodeState(
            lm=(lm.take(inner, copies), grader.take(own, copies)),
            tokens=tokens,
            length=prompt_length,
            done=rows < 0,
            key=law.row_keys(key, batch),
            own=SpanState(first, prompt_length, last, rows < 0),
            info=jnp.zeros(batch, jnp.int32),
        )

    def grow(params, own: SpanState, inner, keys) -> Growing:
        """Every beam in its lanes, by up to L tokens."""
        wide = jax.tree.map(lambda leaf: jnp.repeat(leaf, lanes, axis=1), own.beams)
        no = wide.ended & False

        def live(g: Growing):
            return ~(g.lanes.ended | g.halted)

        def token(g: Growing) -> Growing:
            old = g.lanes
            batch = old.length.shape[0]
            last = slots.last(old.tokens, old.length, own.last[:, None])
            last = last.reshape(-1, 1)
            out, inner = lm.extend(params, g.inner, last)
            logits = out.logits[:, 0].reshape(batch, count, -1)
            met, halt = growth.halt(g.i, logits, g.met, live(g))
            position = (own.prompt_length[:, None] + old.length).reshape(-1)
            token, valid = growth.choose(g.i, logits, keys, position)
            asked = live(g) & ~halt
            grows = asked & valid
            inner = lm.rewind(inner, (~grows).reshape(-1).astype(jnp.int32))
            log_p = law.log_probs(logits)
            logprob = jnp.take_along_axis(log_p, token[:, :, None], axis=2)[:, :, 0]
            length = old.length + grows
            over = (token[:, :, None] == ends).any(-1) | (length >= max_new_tokens)
            automaton = old.stop
            if stop is not None:
                automaton = jnp.where(grows, stop.advance(old.stop, token), old.stop)
                over |= stop.accept[automaton]
            dead = ~jnp.isfinite(logprob)  # of -inf or NaN: the lane cannot go on
            new = Beams(
                old.grade,
                length,
                slots.put(old.tokens, token, old.length, grows),
                slots.put(old.logprob, logprob, old.length, grows),
                slots.put(old.entropy, law.entropy(logits), old.length, grows),
                old.ended | (grows & (over | dead)),
                automaton,
            )
            return Growing(
                g.i + 1,
                inner,
                new,
                g.halted | ~grows,
                met,
                g.void | (asked & (~valid | dead)),
                g.broken | (grows & jnp.isnan(logprob)).any(1),
                g.calls + live(g).any(1),
            )

        return jax.lax.while_loop(
            lambda g: (g.i < size) & live(g).any(),
            token,
            Growing(
                jnp.int32(0), inner, wide, no, no, no, own.broken, own.prompt_length * 0
            ),
        )

    def step(params, state):
        own, batch = state.own, state.done.shape[0]
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
            state.key, jnp.arange(count)
        ).reshape(-1)
        g = grow(params[0], own, state.lm[0], keys)
        before = jax.tree.map(lambda leaf: jnp.repeat(leaf, lanes, axis=1), own.beams)

        new = g.lanes.length - before.length  # [B, C]
        place = before.length[:, :, None] + jnp.arange(size)
        inside = jnp.arange(size) < new[:, :, None]
        place = jnp.minimum(place, max_new_tokens - 1)

        def of_span(leaf):
            leaf = jnp.take_along_axis(leaf, place, axis=2)
            return jnp.where(inside, leaf, 0).reshape(batch * count, size)

        last = slots.last(before.tokens, before.length, own.last[:, None])
        last = last.reshape(-1, 1)
        tokens = jnp.concatenate([last, of_span(g.lanes.tokens)], axis=1)
        span = Span(tokens, of_span(g.lanes.logprob), new.reshape(-1))
        grade, graded = grader.grade(
            params[1], state.lm[1], before.grade.reshape(-1), span
        )
        grade = jnp.where(new > 0, grade.reshape(batch, count), before.grade)
        broken = g.broken | (jnp.isnan(grade) & ~g.void).any(1)

        # a beam that had ended is one lane
        single = before.ended & (jnp.arange(count) % lanes > 0)
        grade = jnp.where(single | g.void | jnp.isnan(grade), -jnp.inf, grade)
        grade, chosen = jax.lax.top_k(grade, beams)
        best = slots.select(g.lanes, chosen)
        over = jnp.isneginf(grade) | broken[:, None]
        best = best._replace(grade=grade, ended=best.ended | over)
        rows = jnp.repeat(jnp.arange(batch)[:, None] * count + chosen, lanes, axis=1)
        rows = rows.reshape(-1)
        finished = best.ended.all(1)
        known = finished | (beams == 1)
        return DecodeState(
            lm=(lm.take(g.inner, rows), grader.take(graded, rows)),
            tokens=slots.write(state.tokens, best.tokens[:, 0], own.prompt_length),
            length=own.prompt_length + jnp.where(known, best.length[:, 0], 0),
            done=finished,
            key=state.key,
            own=own._replace(beams=best, broken=broken),
            info=state.info + g.calls,
        )

    def finish(state):
        own = state.own
        best = jax.tree.map(lambda leaf: leaf[:, 0], own.beams)
        zeros = jnp.zeros(state.tokens.shape)
        info = Info(
            state.info,
            slots.write(zeros, best.logprob, own.prompt_length),
            slots.write(zeros, best.entropy, own.prompt_length),
            own.beams,
        )
        scores = jnp.where(jnp.isneginf(best.grade), -jnp.inf, best.logprob.sum(-1))
        scores = jnp.where(own.broken, jnp.nan, scores)
        return Sequences(state.tokens, state.length, own.prompt_length, scores, info)

    return Decoder(init, step, finish)
