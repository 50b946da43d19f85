"""Decoding strategies as values, and the loops that run them.

A decoder is three pure functions; `run` is one while loop on the device, `stream` the
same step from Python. Seen from outside, a decoder's LM has always consumed all but the
last token of each row, and every row advances alone.

Randomness: keys are per row, and a draw is keyed by (row key, position, stream), so a
row's tokens depend on its parameters, prompt and key, not on its batch, and a run can
be resumed anywhere.

Shapes: B rows, P longest prompt, L = P + new tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import tree
from collab_jax.lm import Params, State

_NO_PARAMETER = (
    "no parameter is NaN; if a member is translated, this row may need more of its "
    "tokens than there is room for: give translate a larger ratio"
)


class DecodeState(NamedTuple):
    """What must survive from step to step."""

    lm: State  # has consumed length - 1 tokens of every row
    tokens: jax.Array  # [B, L] int32
    length: jax.Array  # [B] int32
    done: jax.Array  # [B] bool
    key: jax.Array  # [B] row keys
    own: Any  # of the strategy
    info: Any


class Sequences(NamedTuple):
    """The result of a decoder."""

    tokens: jax.Array  # [B, L] int32, prompt and new tokens; behind `length` anything
    length: jax.Array  # [B] int32
    prompt_length: jax.Array  # [B] int32
    scores: jax.Array  # [B] sum of the log-probs of the new tokens, nats
    info: Any


class Decoder(NamedTuple):
    """A decoding strategy."""

    # (params, prompt [B, P], prompt_length [B], key [B]) -> DecodeState
    init: Callable[[Params, jax.Array, jax.Array, jax.Array], DecodeState]
    # (params, state) -> state: every unfinished row appends some tokens
    step: Callable[[Params, DecodeState], DecodeState]
    # state -> Sequences
    finish: Callable[[DecodeState], Sequences]


def sequences(state: DecodeState) -> Sequences:
    """The result of a strategy that appends tokens and takes none back.

    Args:
      state: `own` has a `prompt_length` `[B]`, and `info` a `logprob` `[B, L]`.

    >>> from types import SimpleNamespace
    >>> one = jnp.ones((1, 2))
    >>> own, info = SimpleNamespace(prompt_length=1), SimpleNamespace(logprob=one)
    >>> state = DecodeState((), one, jnp.array([2]), jnp.array([True]), None, own, info)
    >>> sequences(state).scores.tolist()
    [2.0]
    """
    return Sequences(
        state.tokens,
        state.length,
        state.own.prompt_length,
        state.info.logprob.sum(-1),
        state.info,
    )


def run(
    decoder: Decoder,
    params: Params,
    prompt: jax.Array,
    prompt_length: jax.Array,
    key: jax.Array,
) -> Sequences:
    """Decodes until every row is done, as one while loop on the device.

    Called by itself it compiles anew every time; `compile` keeps the program.

    Args:
      decoder: the strategy.
      params: parameters of its LM.
      prompt: `[B, P]` int32, right-padded; see `pad`.
      prompt_length: `[B]` int32, at least 1.
      key: one typed key, or `[B]` of them; the same keys give the same tokens.

    Raises:
      ValueError: outside of jit, for a prompt that cannot be decoded.
      FloatingPointError: outside of jit, when a law became NaN or forbade every token.

    >>> from collab_jax.decode import greedy, sample
    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 5, 1)
    >>> prompt, length = pad([[1, 2, 0], [3]])
    >>> run(greedy(lm, 2), params, prompt, length, jax.random.key(0)).length.tolist()
    [5, 3]
    """
    eager = not isinstance(prompt_length, jax.core.Tracer)
    if eager:
        check_prompt(prompt, prompt_length)

    def loop(params, prompt, prompt_length, key):
        state = decoder.init(params, prompt, prompt_length, key)
        state = jax.lax.while_loop(
            lambda state: ~state.done.all(),
            lambda state: decoder.step(params, state),
            state,
        )
        return decoder.finish(state)

    if not eager:
        return loop(params, prompt, prompt_length, key)
    result = jax.jit(loop)(params, prompt, prompt_length, key)
    check_finite(result, params)
    return result


def compile(make_decoder: Callable[[Any], Decoder]) -> Callable[..., Sequences]:
    """One program for every value of the knobs, and every prompt of a shape.

    `jax.jit(lambda knobs, params, prompt, length, key: run(make_decoder(knobs), ...))`.

    Args:
      make_decoder: from the knobs (any pytree of numbers or arrays) to a decoder.

    Returns:
      A jitted function of (knobs, params, prompt, prompt_length, key).

    >>> from collab_jax import warp
    >>> from collab_jax.decode import sample
    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 5, 1)
    >>> decode = compile(lambda t: sample(warp.warp(lm, warp.temperature(t)), 3))
    >>> prompt, length = pad([[1, 2, 0], [3]])
    >>> decode(0.7, params, prompt, length, jax.random.key(0)).length.tolist()
    [6, 4]
    """

    def program(knobs, params, prompt, prompt_length, key):
        return run(make_decoder(knobs), params, prompt, prompt_length, key)

    return jax.jit(program)


def streaming(make_decoder: Callable[[Any], Decoder]) -> Callable[..., Iterator]:
    """Like `compile`, for a loop in Python that yields the new tokens of every step.

    Args:
      make_decoder: from the knobs to a decoder.

    Returns:
      A function of (knobs, params, prompt, prompt_length, key) that returns an iterator
      of lists: for each of the B rows the list of its new token ids.

    >>> from collab_jax.decode import greedy, sample
    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.eye(4, 3)
    >>> decode = streaming(lambda _: greedy(lm, 2))
    >>> prompt, length = pad([[1], [2]])
    >>> list(decode(None, params, prompt, length, jax.random.key(0)))
    [[[1], [2]], [[1], [2]]]
    """

    def initial(knobs, *arguments):
        return make_decoder(knobs).init(*arguments)

    def advance(knobs, params, state):
        return make_decoder(knobs).step(params, state)

    begin, advance = jax.jit(initial), jax.jit(advance, donate_argnums=2)

    def stream(knobs, params, prompt, prompt_length, key):
        check_prompt(prompt, prompt_length)
        state = begin(knobs, params, prompt, prompt_length, key)
        before = np.asarray(state.length)
        done = np.asarray(state.done)
        while not done.all():
            state = advance(knobs, params, state)
            after, done = np.asarray(state.length), np.asarray(state.done)
            tokens = np.asarray(state.tokens)
            yield [
                row[a:b].tolist()
                for row, a, b in zip(tokens, before, after, strict=True)
            ]
            before = after

    return stream


def stream(
    decoder: Decoder, params: Params, prompt: jax.Array, prompt_length: jax.Array, key
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of every row, step by step; the tokens of `run`.

    Args:
      decoder: the strategy.
      params: parameters of its LM.
      prompt: `[B, P]` int32, right-padded.
      prompt_length: `[B]` int32, at least 1.
      key: one typed key, or `[B]` of them.

    >>> from collab_jax.decode import greedy, sample
    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.eye(4, 3)
    >>> prompt, length = pad([[1]])
    >>> list(stream(greedy(lm, 2), params, prompt, length, jax.random.key(0)))
    [[[1]], [[1]]]
    """
    decode = streaming(lambda _: decoder)
    return decode(None, params, prompt, prompt_length, key)


def pad(
    prompts: Sequence[Sequence[int]], multiple: int = 1, pad_id: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Prompts of unequal length as one right-padded array.

    Args:
      prompts: token ids of each of the B rows, at least one a row.
      multiple: P is rounded up to a multiple of this, so that few programs are
      compiled. pad_id: any token of the vocabulary.

    Returns:
      `[B, P]` int32 tokens and `[B]` int32 lengths.

    Raises:
      ValueError: for no prompts, or an empty one.

    >>> tokens, length = pad([[1, 2, 3], [4]])
    >>> tokens.tolist(), length.tolist()
    ([[1, 2, 3], [4, 0, 0]], [3, 1])
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or not min(lengths):
        raise ValueError(
            f"prompts of {lengths} tokens: at least one prompt is expected, each of at "
            "least one token (the start-of-text token, where the text is empty)"
        )
    width = -(-max(lengths) // multiple) * multiple
    tokens = np.full((len(lengths), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def check_prompt(prompt: jax.Array, prompt_length: jax.Array) -> None:
    """Refuses prompts whose shapes or lengths make no sense.

    Raises:
      ValueError: naming what was found.

    >>> check_prompt(jnp.zeros((1, 4), int), jnp.array([4]))
    """
    if prompt.ndim != 2 or prompt_length.shape != prompt.shape[:1]:
        raise ValueError(
            f"prompt of shape {prompt.shape} and lengths of shape "
            f"{prompt_length.shape}: [B, P] and [B] are expected; decode.pad makes "
            "them of lists of token ids"
        )
    lengths = np.asarray(prompt_length)
    if lengths.min() < 1 or lengths.max() > prompt.shape[1]:
        raise ValueError(
            f"prompt lengths from {lengths.min()} to {lengths.max()}: 1 to "
            f"{prompt.shape[1]} tokens are expected, the width of the prompt array"
        )


def check_finite(result: Sequences, params: Params) -> None:
    """Refuses a run in which a law was NaN or forbade every token.

    Raises:
      FloatingPointError: naming the row, and the parameters that have a NaN.

    >>> from collab_jax.decode import greedy, sample
    >>> from collab_jax.models import table
    >>> prompt, length = pad([[1]])
    >>> lm, params = table.language_model(1), jnp.eye(4, 3)
    >>> result = run(greedy(lm, 2), params, prompt, length, jax.random.key(0))
    >>> check_finite(result, params)
    """
    scores = np.asarray(result.scores)
    if np.isneginf(scores).any():
        row = int(np.flatnonzero(np.isneginf(scores))[0])
        raise FloatingPointError(
            f"the next-token law forbids every token in row {row}, behind "
            f"{int(result.length[row]) - 1} tokens: loosen what forbids them"
        )
    if not np.isnan(scores).any():
        return
    found = [
        path or "the parameters"
        for path, leaf in zip(tree.paths(params), jax.tree.leaves(params), strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and bool(jnp.isnan(leaf).any())
    ]
    row = int(np.flatnonzero(np.isnan(scores))[0])
    where = f"NaN in {', '.join(found[:4])}" if found else _NO_PARAMETER
    raise FloatingPointError(f"the next-token law became NaN in row {row}: {where}")
