"""Speculative decoding: a target, a proposer and a verifier as one `Decoder`.

A round drafts, scores and verifies all rows at once. Every row keeps its own number of
tokens, is cut where it ends, and its states go back by what it did not keep; there is
no realignment, and no row waits for another.

Shapes: B rows, P longest prompt, L = P + new tokens, N tokens of a draft, D of its
longest path, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law, slots
from collab_jax.cooperate.efficient.draft import Draft, Proposer, along, check_size
from collab_jax.cooperate.efficient.target import Target
from collab_jax.cooperate.efficient.verify import Verifier, block, round_key
from collab_jax.decoder import Decoder, DecodeState, sequences
from collab_jax.lm import State
from collab_jax.stop import Stop


class Info(NamedTuple):
    """What may be thrown away: measurements of a run.

    Tokens per call of the target are `(length - prompt_length) / calls`.
    """

    calls: jax.Array  # [B] int32, calls of the target while the row was unfinished
    drafted: jax.Array  # [B] int32, tokens (nodes) drafted
    accepted: jax.Array  # [B] int32, of these, accepted, also behind the row's end
    # [B, D] int32, rounds in which an i-th token was drafted and all before it stayed
    tried: jax.Array
    taken: jax.Array  # [B, D] int32, of these, rounds in which it stayed as well
    logprob: jax.Array  # [B, L] of each new token in the target's law
    entropy: jax.Array  # [B, L] of that law, nats


class SpeculativeState(NamedTuple):
    """What `speculate` must keep."""

    proposer: State
    prompt_length: jax.Array  # [B] int32
    stop: jax.Array  # [B] int32, state of the stop automaton


def speculate(
    target: Target,
    proposer: Proposer,
    max_new_tokens: int,
    *,
    verifier: Verifier | None = None,
    eos: Sequence[int] = (),
    stop: Stop | None = None,
) -> Decoder:
    """Text in the target's law, several tokens a call.

    Each round appends 1 to D + 1 tokens to every row. With a lossless verifier the text
    follows `sample(target)` whatever is proposed; with a greedy warp on the target it
    is `greedy(target)`, up to ties within rounding.

    Parameters are the pair of the target's and the proposer's. A row's tokens depend on
    its parameters, prompt and key, not on its batch; a run resumed between two rounds
    goes on as it would have.

    Args:
      target: what the text follows, e.g. `on_lm(lm)`.
      proposer: what drafts, e.g. `draft_lm(small, 4)`.
      max_new_tokens: a row ends after so many new tokens.
      verifier: how both are coupled; block verification unless given.
      eos: a row ends with any of these tokens, which it keeps.
      stop: a row ends with the token that completes a stop string, which it keeps.

    Raises:
      ValueError: for max_new_tokens < 1 or an empty draft; when first called, for
        vocabularies that differ, or a tree that meets a verifier of chains.

    Source: arXiv 2211.17192; arXiv 2302.01318.

    >>> from collab_jax.cooperate.efficient.draft_model import draft_lm
    >>> from collab_jax.cooperate.efficient.target import on_lm
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 5, 1)
    >>> decoder = speculate(on_lm(lm), draft_lm(lm, 3), 8)
    >>> prompt, length = pad([[1, 2], [3]])
    >>> result = run(decoder, (params, params), prompt, length, jax.random.key(7))
    >>> result.length.tolist(), result.info.calls.tolist()
    ([10, 9], [2, 2])
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}, at least 1 is expected")
    size = check_size("size of the proposer's drafts", proposer.size)
    depth = check_size("depth of the proposer's drafts", proposer.depth)
    verifier = block() if verifier is None else verifier
    ends = jnp.asarray(tuple(eos), jnp.int32)
    index = jnp.arange(depth + 1)

    def init(params, prompt, prompt_length, key):
        params, own = _pair(params)
        batch, _ = prompt.shape
        prompt_length = prompt_length.astype(jnp.int32)
        prompt = prompt.astype(jnp.int32)
        room = max_new_tokens + size + 1  # a done row is still scored, and goes back
        tokens = jnp.pad(prompt, ((0, 0), (0, max_new_tokens)))
        zeros, path = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, depth), jnp.int32)
        measured = jnp.zeros(tokens.shape, jnp.float32)
        return DecodeState(
            lm=target.init(params, prompt, prompt_length, room),
            tokens=tokens,
            length=prompt_length,
            done=zeros > 0,
            key=law.row_keys(key, batch),
            own=SpeculativeState(
                proposer.init(own, prompt, prompt_length, room), prompt_length, zeros
            ),
            info=Info(zeros, zeros, zeros, path, path, measured, measured),
        )

    def advance(at, tokens):
        """States of the stop automaton before and behind every token, [B, D + 2]."""
        states = [at]
        for i in range(depth + 1):
            states.append(
                at if stop is None else stop.advance(states[-1], tokens[:, i])
            )
        return jnp.stack(states, axis=1)

    def step(params, state):
        params, draft_params = _pair(params)
        own, length, live = state.own, state.length, ~state.done
        rows = jnp.arange(length.shape[0])
        drawn = state.key
        if not verifier.coupled:
            drawn = round_key(state.key, length, law.DRAFT)
        draft, drafter = proposer.propose(
            draft_params, own.proposer, state.tokens, length, drawn
        )
        draft = draft._replace(count=jnp.where(live, draft.count, 0))
        pending = state.tokens[rows, length - 1]
        out, inner = target.score(params, state.lm, draft, pending)
        verified = verifier.verify(state.key, length, out, draft)
        verified = verified._replace(  # no path is longer than the proposer says
            tokens=verified.tokens[:, : depth + 1], path=verified.path[:, :depth]
        )
        logits = out.logits
        if draft.parents is not None:
            logits = along(verified, logits)
        log_p = law.log_probs(logits)
        tokens = verified.tokens
        logprob = jnp.take_along_axis(log_p, tokens[:, :, None], axis=-1)[:, :, 0]
        stops = advance(own.stop, tokens)
        over = (tokens[:, :, None] == ends).any(-1)
        over |= ~jnp.isfinite(logprob)  # a dead or NaN law: the row cannot go on
        if stop is not None:
            over |= stop.accept[stops[:, 1:]]
        over |= index + 1 >= (own.prompt_length + max_new_tokens - length)[:, None]
        # the first token that ends the row, or the verifier's own
        last = jnp.minimum(jnp.argmax(over, axis=1), verified.accepted)
        last = jnp.where(over.any(1), last, verified.accepted)
        count = jnp.where(live, last + 1, 0)
        verified = verified._replace(count=count)

        kept = index < count[:, None]
        if draft.parents is None:
            inner = target.rewind(inner, 1 + size - count)
        else:
            path = jnp.pad(verified.path + 1, ((0, 0), (1, 0)))
            inner = target.prune(inner, path, count)
        measure = law.entropy(logits)
        deep = index[1:] <= _longest(draft)[:, None]  # 0 in rows that are done
        info = state.info
        return DecodeState(
            lm=inner,
            tokens=slots.write(state.tokens, jnp.where(kept, tokens, 0), length),
            length=length + count,
            done=state.done | (over & kept).any(1),
            key=state.key,
            own=SpeculativeState(
                proposer.observe(draft_params, drafter, verified),
                own.prompt_length,
                jnp.take_along_axis(stops, count[:, None], axis=1)[:, 0],
            ),
            info=Info(
                info.calls + live,
                info.drafted + draft.count,
                info.accepted + jnp.where(live, verified.accepted, 0),
                info.tried + (deep & (index[:-1] <= verified.accepted[:, None])),
                info.taken + (deep & (index[1:] <= verified.accepted[:, None])),
                slots.write(info.logprob, jnp.where(kept, logprob, 0.0), length),
                slots.write(info.entropy, jnp.where(kept, measure, 0.0), length),
            ),
        )

    return Decoder(init, step, sequences)


def _pair(params):
    if not isinstance(params, tuple | list) or len(params) != 2:
        raise ValueError(
            f"speculate got parameters of type {type(params).__name__}: the pair "
            "(parameters of the target, parameters of the proposer) is expected; () "
            "for a proposer without any"
        )
    return params


def _longest(draft: Draft) -> jax.Array:
    """Tokens of the longest path of each row's draft, `[B]`."""
    if draft.parents is None:
        return draft.count
    nodes = jnp.arange(draft.tokens.shape[1]) < draft.count[:, None]
    return jnp.max(jnp.where(nodes, slots.depths(draft.parents) + 1, 0), axis=1)
