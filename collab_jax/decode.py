"""Plain decoding: sampling and greedy, and the door to the loops of `decoder`.

Shapes: B rows, P longest prompt, L = P + new tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law, slots
from collab_jax.decoder import (
    Decoder,
    DecodeState,
    Sequences,
    check_finite,
    check_prompt,
    compile,
    pad,
    run,
    sequences,
    stream,
    streaming,
)
from collab_jax.lm import LM, Params, State, read_prompt
from collab_jax.stop import Stop

__all__ = [
    "DecodeState",
    "Decoder",
    "Info",
    "PlainState",
    "Sequences",
    "append",
    "check_finite",
    "check_prompt",
    "compile",
    "greedy",
    "pad",
    "run",
    "sample",
    "start",
    "stream",
    "streaming",
]


class Info(NamedTuple):
    """What may be thrown away: measurements of a run."""

    calls: jax.Array  # [B] int32, calls of the LM while the row was unfinished
    logprob: jax.Array  # [B, L] log-prob of each new token in the law it was drawn from
    entropy: jax.Array  # [B, L] entropy of that law, nats


class PlainState(NamedTuple):
    """What `sample` must keep."""

    prompt_length: jax.Array  # [B] int32
    stop: jax.Array  # [B] int32, state of the stop automaton


def start(
    lm: LM,
    params: Params,
    prompt: jax.Array,
    prompt_length: jax.Array,
    room: int,
    chunk: int | None,
) -> tuple[State, jax.Array]:
    """An LM that has consumed all but the last token of each prompt, and its buffer.

    Args:
      lm: any LM.
      params: its parameters.
      prompt: `[B, P]`, right-padded.
      prompt_length: `[B]`, at least 1.
      room: slots wanted behind the longest prompt (new tokens and widest call).
      chunk: see `lm.prefill`.

    Returns:
      The state, and the tokens `[B, P + room]`.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 3, 1)
    >>> state, tokens = start(lm, params, jnp.array([[1, 2]]), jnp.array([2]), 3, 8)
    >>> state.length.tolist(), tokens.shape
    ([1], (1, 5))
    """
    state = read_prompt(lm, params, prompt, prompt_length, room, chunk)
    return state, jnp.pad(prompt.astype(jnp.int32), ((0, 0), (0, room)))


def append(
    tokens: jax.Array, length: jax.Array, token: jax.Array, where: jax.Array
) -> jax.Array:
    """Writes one token behind each row where wanted.

    Args:
      tokens: `[B, L]`.
      length: `[B]`.
      token: `[B]`.
      where: `[B]` bool.

    >>> append(jnp.zeros((2, 2), int), jnp.array([1, 1]), jnp.array([5, 6]),
    ...        jnp.array([True, False])).tolist()
    [[0, 5], [0, 0]]
    """
    slot = jnp.where(where, length, tokens.shape[1])  # out of the buffer: dropped
    return slots.write(tokens, token[:, None], slot)


def sample(
    lm: LM,
    max_new_tokens: int,
    *,
    eos: Sequence[int] = (),
    stop: Stop | None = None,
    chunk: int | None = None,
) -> Decoder:
    """Ancestral sampling: `x_t ~ p(. | x_<t)`, by the Gumbel-max rule.

    Temperature and the like are warps of the LM: `sample(warp(lm, temperature(0.7)),
    64)`.

    Args:
      lm: any LM.
      max_new_tokens: a row ends after so many new tokens.
      eos: a row ends with any of these tokens, which it keeps.
      stop: a row ends with the token that completes a stop string, which it keeps.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Raises:
      ValueError: for max_new_tokens < 1.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 5, 1)
    >>> prompt, length = pad([[1, 2], [3]])
    >>> key = jax.random.key(7)
    >>> result = run(sample(lm, 4), params, prompt, length, key)
    >>> result.length.tolist()
    [6, 5]
    """
    return _plain(lm, max_new_tokens, eos, stop, chunk, law.draw)


def greedy(
    lm: LM,
    max_new_tokens: int,
    *,
    eos: Sequence[int] = (),
    stop: Stop | None = None,
    chunk: int | None = None,
) -> Decoder:
    """The likeliest token each time, `x_t = argmax p(. | x_<t)`; the first of equals.

    The tokens of `sample(warp(lm, warp.greedy()), ...)` without its random numbers;
    `info` and scores are those of the LM's own law.

    Args:
      lm: any LM.
      max_new_tokens: a row ends after so many new tokens.
      eos: a row ends with any of these tokens, which it keeps.
      stop: a row ends with the token that completes a stop string, which it keeps.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Raises:
      ValueError: for max_new_tokens < 1.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.eye(4, 3)
    >>> prompt, length = pad([[1]])
    >>> run(greedy(lm, 2), params, prompt, length, jax.random.key(0)).tokens.tolist()
    [[1, 1, 1]]
    """

    def best(logits, key, position):
        del key, position
        return law.best(logits)

    return _plain(lm, max_new_tokens, eos, stop, chunk, best)


def _plain(lm, max_new_tokens, eos, stop, chunk, choose) -> Decoder:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}, at least 1 is expected")
    ends = jnp.asarray(tuple(eos), jnp.int32)

    def init(params, prompt, prompt_length, key):
        batch = prompt.shape[0]
        state, tokens = start(lm, params, prompt, prompt_length, max_new_tokens, chunk)
        zeros = jnp.zeros(batch, jnp.int32)
        measured = jnp.zeros(tokens.shape, jnp.float32)
        return DecodeState(
            lm=state,
            tokens=tokens,
            length=prompt_length.astype(jnp.int32),
            done=zeros > 0,
            key=law.row_keys(key, batch),
            own=PlainState(prompt_length.astype(jnp.int32), zeros),
            info=Info(zeros, measured, measured),
        )

    def step(params, state):
        last = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, 1)[:, 0]
        out, inner = lm.extend(params, state.lm, last[:, None])
        inner = lm.rewind(inner, state.done.astype(jnp.int32))
        logits = out.logits[:, 0]
        token = choose(logits, state.key, state.length)
        live = ~state.done
        logprob = jnp.take_along_axis(law.log_probs(logits), token[:, None], 1)[:, 0]
        own, info = state.own, state.info
        info = Info(
            info.calls + live,
            append(info.logprob, state.length, logprob, live),
            append(info.entropy, state.length, law.entropy(logits), live),
        )
        length = state.length + live
        ended = (token[:, None] == ends).any(-1)
        ended |= length - own.prompt_length >= max_new_tokens
        ended |= ~jnp.isfinite(logprob)  # a dead or NaN law: the row cannot go on
        if stop is not None:
            own = own._replace(
                stop=jnp.where(live, stop.advance(own.stop, token), own.stop)
            )
            ended |= stop.accept[own.stop]
        tokens = append(state.tokens, state.length, token, live)
        done = state.done | ended
        return DecodeState(inner, tokens, length, done, state.key, own, info)

    return Decoder(init, step, sequences)
