"""Greedy decoding with a draft of any tokenizer: text is what both sides read.

The draft writes text in its own tokens; the text is cut anew into the target's tokens,
and these are kept as long as they are what the target would have taken. So the draft
reads and writes as it was trained to, and every token of the target can be proposed,
where `translate` knows those alone that both have. The price: tokens are cut on the
host, so **every round leaves the device twice** (the draft's tokens, and the
target's), it is for greedy decoding only, and it is no `Decoder`.

Shapes: B rows, K tokens of a draft, W target tokens of its text, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import law
from collab_jax.cooperate.efficient.draft import check_size
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.decoder import Sequences, check_finite, pad
from collab_jax.io.retokenize import Retokenizer
from collab_jax.lm import LM, Params, State, padded, piece, prefill


class Info(NamedTuple):
    """What may be thrown away: measurements of a run."""

    calls: np.ndarray  # [B] calls of the target while the row was unfinished
    drafted: np.ndarray  # [B] target tokens proposed
    accepted: np.ndarray  # [B] of these, accepted
    logprob: np.ndarray  # [B, L] of each new token in the target's law


class DraftState(NamedTuple):
    """The draft's state, and what the host must know of it."""

    state: State
    read: list[list[int]]  # of every row, the draft tokens that it has consumed
    capacity: int


def universal(
    target: LM,
    draft: LM,
    retokenizer: Retokenizer,
    length: int,
    max_new_tokens: int,
    *,
    width: int | None = None,
    eos: Sequence[int] = (),
    chunk: int | None = None,
) -> Callable[[tuple[Params, Params], Sequence[Sequence[int]]], Sequences]:
    """Speculative greedy decoding with a draft whose vocabulary is another one.

    The text is that of `decode.greedy(target)`, whatever the draft says, up to ties
    within rounding. Rows are ragged, and each accepts its own number of tokens.

    Args:
      target: any LM.
      draft: any LM over the other vocabulary.
      retokenizer: how text goes to and fro.
      length: K, tokens that the draft writes a round.
      max_new_tokens: a row ends after so many new tokens.
      width: W, the most target tokens of a draft; 2 K unless given.
      eos: a row ends with any of these tokens of the target, which it keeps.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      A function of (parameters of target and draft, prompts), B lists of target tokens,
      that returns `Sequences`. It compiles its steps once for every width of prompts.

    Raises:
      ValueError: for sizes below 1, or an empty prompt.
      FloatingPointError: where the target's law is NaN.

    Source: string-level exact match, arXiv 2502.05202; universal assisted generation in
    transformers.

    >>> from collab_jax.models import table
    >>> names, others = ["a", "b", "ab"], ["b", "a"]  # two vocabularies
    >>> def to_draft(ids):
    ...     return [others.index(c) for i in ids for c in names[i]]
    >>> def to_target(ids, drafted):
    ...     text = "".join(others[i] for i in drafted)
    ...     return [2] * text.count("ab")
    >>> always = jnp.zeros((4, 3)).at[:, 2].set(1.0)
    >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> decode = universal(table.language_model(1), table.language_model(1),
    ...     Retokenizer(to_draft, to_target), 4, 5)
    >>> result = decode((always, swap), [[2]])
    >>> result.tokens.tolist(), result.info.calls.tolist()
    ([[2, 2, 2, 2, 2, 2]], [2])
    """
    size = check_size("length", length)
    wide = 2 * size if width is None else check_size("width", width)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}, at least 1 is expected")
    room = max_new_tokens + wide + 1  # a done row is still scored, and goes back
    begin = jax.jit(on_lm(target, chunk).init, static_argnums=3)
    score = jax.jit(_scorer(target, eos, wide), donate_argnums=1)
    write = _writer(draft, size, chunk)

    def decode(params, prompts) -> Sequences:
        big, small = params
        tokens, prompt_length = pad(prompts)
        state = begin(big, tokens, prompt_length, room)
        texts = [[*map(int, prompt)] for prompt in prompts]
        logprob = np.zeros((len(texts), tokens.shape[1] + max_new_tokens), np.float32)
        left = np.full(len(texts), max_new_tokens)
        calls, drafted, accepted = np.zeros((3, len(texts)), np.int32)
        own = DraftState(None, [[] for _ in texts], 0)
        while left.any():
            written, own = write(small, own, [*map(retokenizer.to_draft, texts)])
            proposed = np.zeros((len(texts), wide), np.int32)
            count = np.zeros(len(texts), np.int32)
            for b in np.flatnonzero(left):
                ids = retokenizer.to_target(texts[b], written[b])[:wide]
                proposed[b, : len(ids)], count[b] = ids, len(ids)
            pending = np.array([text[-1] for text in texts], np.int32)
            new, state = score(big, state, pending, proposed, count, left)
            new = jax.device_get(new)
            calls += left > 0
            drafted += count
            accepted += np.where(left > 0, new.accepted, 0)
            for b, text in enumerate(texts):
                end = len(text) + new.count[b]
                logprob[b, len(text) : end] = new.logprob[b, : new.count[b]]
                text.extend(new.tokens[b, : new.count[b]].tolist())
            left = np.where(new.over, 0, left - new.count)
        found = np.zeros(logprob.shape, np.int32)
        for row, text in zip(found, texts, strict=True):
            row[: len(text)] = text
        result = Sequences(
            jnp.asarray(found),
            jnp.array([len(text) for text in texts], jnp.int32),
            prompt_length,
            jnp.asarray(logprob.sum(-1)),
            Info(calls, drafted, accepted, logprob),
        )
        check_finite(result, params)
        return result

    return decode


class New(NamedTuple):
    """What a round appends."""

    tokens: Any  # [B, W + 1]
    count: Any  # [B]
    accepted: Any  # [B], also behind the row's end
    over: Any  # [B] bool, whether the row has ended
    logprob: Any  # [B, W + 1]


def _scorer(lm: LM, eos: Sequence[int], width: int):
    """The target's round: reads the proposal, keeps its beginning, adds a token."""
    ends, index = jnp.asarray(tuple(eos), jnp.int32), jnp.arange(width + 1)

    def score(params, state, pending, proposed, count, left):
        read = jnp.concatenate([pending[:, None], proposed], axis=1)
        out, state = lm.extend(params, state, read)
        best = law.best(out.logits)
        same = (best[:, :-1] == proposed) & (index[:-1] < count[:, None])
        accepted = jnp.cumprod(same, axis=1).sum(-1, dtype=jnp.int32)
        log_p = law.log_probs(out.logits)
        logprob = jnp.take_along_axis(log_p, best[:, :, None], axis=-1)[:, :, 0]
        over = (best[:, :, None] == ends).any(-1) | ~jnp.isfinite(logprob)
        over |= index + 1 >= left[:, None]
        over &= index <= accepted[:, None]
        new = jnp.where(over.any(1), jnp.argmax(over, axis=1), accepted) + 1
        new = jnp.where(left > 0, new, 0).astype(jnp.int32)
        state = lm.rewind(state, 1 + width - new)
        return New(best, new, accepted, over.any(1), logprob), state

    return score


def _writer(lm: LM, size: int, chunk: int | None):
    """The draft's round: reads the texts as they are cut now, and writes K tokens."""

    def run(params, state, back, tokens, count, last):
        state = prefill(lm, params, lm.rewind(state, back), tokens, count, chunk)

        def step(carry, _):
            state, token = carry
            out, state = lm.extend(params, state, token[:, None])
            token = law.best(out.logits[:, 0])
            return (state, token), token

        (state, _), written = jax.lax.scan(step, (state, last), None, size)
        return written.T, state

    run = jax.jit(run, donate_argnums=1)

    def write(params, own: DraftState, texts):
        longest, part = max(map(len, texts)), piece(chunk, len(texts))
        need = longest + padded(longest, part) + part + size
        if need > own.capacity:  # begin again, with room for texts twice as long
            state = lm.init(params, len(texts), 2 * need)
            own = DraftState(state, [[] for _ in texts], 2 * need)
        kept = [_common(r, text[:-1]) for r, text in zip(own.read, texts, strict=True)]
        fresh = [text[k:-1] for text, k in zip(texts, kept, strict=True)]
        back = [len(r) - k for r, k in zip(own.read, kept, strict=True)]
        count = [*map(len, fresh)]
        tokens = np.zeros((len(texts), _bucket(max(count), part)), np.int32)
        for row, new in zip(tokens, fresh, strict=True):
            row[: len(new)] = new
        written, state = run(
            params,
            own.state,
            np.array(back, np.int32),
            tokens,
            np.array(count, np.int32),
            np.array([text[-1] for text in texts], np.int32),
        )
        written = np.asarray(written).tolist()
        read = [[*text, *new[:-1]] for text, new in zip(texts, written, strict=True)]
        return written, DraftState(state, read, own.capacity)

    return write


def _bucket(count: int, chunk: int) -> int:
    """Few widths, and so few programs: powers of two, and multiples of the chunk."""
    if count > chunk:
        return padded(count, chunk)
    return min(1 << max(count - 1, 0).bit_length(), chunk)


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the common beginning."""
    same = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        same += 1
    return same
