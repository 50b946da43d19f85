"""Ensembles whose other members are asked only where the first one is unsure.

The others keep their caches. While nobody asks them they fall behind; once asked, a
member first reads what it has missed, from a history of tokens, in one call of W tokens
that is masked row by row. That call also brings every other row as far as it gets.

Shapes: B rows, T tokens of this call, N members, S slots, W tokens of a call that
catches up, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import slots
from collab_jax.decoder import Decoder
from collab_jax.ensemble.gates import Gate
from collab_jax.lm import LM, Out, State
from collab_jax.pool import Pool


class Memory(NamedTuple):
    """The last answer of the others in each row, for a row that asks it again."""

    place: jax.Array  # [B] int32, tokens before it; -1 for none
    token: jax.Array  # [B] int32, that it was an answer to
    logits: list[jax.Array]  # of each other, [B, V]


class OnDemandState(NamedTuple):
    """State of `on_demand`."""

    first: State  # of the member that is always asked; has consumed all tokens
    others: tuple  # of the others; have consumed `read` tokens
    tokens: jax.Array  # [B, S] int32
    length: jax.Array  # [B] int32
    read: jax.Array  # [B] int32, at most `length`
    asked: jax.Array  # [B, S] bool, where the others took part in the law
    calls: jax.Array  # [2] int32, of the first and of each other, all rows together
    memory: Memory


class Answer(NamedTuple):
    """Features of `on_demand`."""

    asked: jax.Array  # [B, T] bool, where the others took part in the law
    first: Any  # features of the first member


def on_demand(members: Sequence[LM], gate: Gate, pool: Pool, width: int = 16) -> LM:
    """An ensemble that asks all its members only where the first one is unsure.

        logits = pool([z_0, ..., z_{N-1}])   where gate(out_0), else z_0

    The law at a place depends on the text before it alone: when a member was last asked
    decides what it has to read, never what it says. A member that differs in its
    vocabulary is brought to the text's first, e.g. by `warp(spelled(lm, bridge), ...)`.

    A call of more than W tokens, such as those of a long prompt, is read by all members
    at once, and no logits are computed for it unless they are asked for. Every other
    call asks the others if the gate opens in any row. A row that is done reads its last
    token again and again while its batch runs: the answer to it is remembered, as long
    as calls are of one token. Its loop must not be vmapped (`stacked`).

    Args:
      members: N LMs of one vocabulary; the first is asked at every token.
      gate: where the others are asked, e.g. `gates.confidence(0.5)`.
      pool: of all N members, the first one first; `lambda zs: zs[1]` lets the second
        decide.
      width: W. A round of speculation, 1 + K tokens, should not be wider.

    Returns:
      An LM whose parameters are the tuple of the members'; its features are an
      `Answer`.

    Raises:
      ValueError: for fewer than two members, or a width below 1; when a state is made,
        for other parameters than a tuple of N.

    Source: thresholded ensembles as in GaC, arXiv 2406.12585; Co-LLM, arXiv 2403.03870.

    >>> from collab_jax import pool
    >>> from collab_jax.ensemble import gates
    >>> from collab_jax.models import table
    >>> lm = on_demand([table.language_model(0)] * 2, gates.confidence(0.7),
    ...     pool.mixture(0.5, 0.5))
    >>> params = jnp.log(jnp.array([[0.6, 0.4]])), jnp.log(jnp.array([[0.2, 0.8]]))
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[0]]))
    >>> jnp.exp(out.logits[0, 0]).round(3).tolist(), out.features.asked.tolist()
    ([0.4, 0.6], [[True]])
    """
    members = tuple(members)
    if len(members) < 2:
        raise ValueError(
            f"{len(members)} members: the one that is always asked and at least one "
            "other are expected"
        )
    if width < 1:
        raise ValueError(f"width = {width}: at least 1 token is expected")
    lead, rest = members[0], members[1:]

    def each(verb: str, *columns) -> list:
        rows = zip(rest, *columns, strict=True)
        return [getattr(lm, verb)(*arguments) for lm, *arguments in rows]

    def same(value) -> tuple:
        return (value,) * len(rest)

    def extended(params, others, tokens):
        """(logits of each, states) after some tokens."""
        found = each("extend", params[1:], others, same(tokens))
        return [out.logits for out, _ in found], tuple(state for _, state in found)

    def joined(out: Out, asked, logits) -> Out:
        whole = pool([out.logits, *logits])
        law = jnp.where(asked[..., None], whole, out.logits)
        return Out(law, Answer(asked, out.features))

    def init(params, batch, capacity):
        if not isinstance(params, tuple | list) or len(params) != len(members):
            raise ValueError(
                f"on_demand of {len(members)} members got parameters of type "
                f"{type(params).__name__}: a tuple of {len(members)} trees is expected"
            )
        room = capacity + min(capacity, width)  # a call that catches up may overlap
        zeros = jnp.zeros(batch, jnp.int32)
        others = tuple(each("init", params[1:], same(batch), same(room)))
        like = jax.eval_shape(extended, params, others, zeros[:, None])[0]
        blank = [jnp.zeros((batch, z.shape[-1]), z.dtype) for z in like]
        return OnDemandState(
            lead.init(params[0], batch, capacity),
            others,
            jnp.zeros((batch, capacity), jnp.int32),
            zeros,
            zeros,
            jnp.zeros((batch, capacity), bool),
            jnp.zeros(2, jnp.int32),
            Memory(zeros - 1, zeros, blank),
        )

    def catch_up(params, state, tokens, until, wanted, places):
        """The others read until `wanted[b]`, and no further than `until[b]`.

        Returns:
          Their states, tokens read `[B]`, their logits at the places `[B, P]` that they
          came to, and the number of calls.
        """
        last = tokens.shape[1] - 1

        def piece(read):
            at = jnp.minimum(slots.positions(read, width), last)
            return jnp.take_along_axis(tokens, at, axis=1)

        def more(carry):
            return (carry[1] < wanted).any()

        def turn(carry):
            others, read, logits, calls = carry
            new, others = extended(params, others, piece(read))
            taken = jnp.clip(until - read, 0, width)
            others = tuple(each("rewind", others, same(width - taken)))
            at = places - read[:, None]
            here = (at >= 0) & (at < taken[:, None])
            at = jnp.clip(at, 0, width - 1)[..., None]
            logits = [
                jnp.where(here[..., None], jnp.take_along_axis(z, at, axis=1), old)
                for old, z in zip(logits, new, strict=True)
            ]
            return others, read + taken, logits, calls + 1

        logits = [
            jnp.zeros((*places.shape, z.shape[-1]), z.dtype)
            for z in state.memory.logits
        ]
        start = state.others, state.read, logits, jnp.int32(0)
        return jax.lax.while_loop(more, turn, start)

    def extend(params, state, tokens):
        count = tokens.shape[1]
        out, first = lead.extend(params[0], state.first, tokens)
        asked = gate(out)
        history = slots.write(state.tokens, tokens, state.length)
        place = slots.positions(state.length, count)
        length, memory = state.length + count, state.memory
        if count > width:
            nowhere = place[:, :0]
            others, _, _, calls = catch_up(
                params, state, history, state.length, state.length, nowhere
            )
            logits, others = extended(params, others, tokens)
            read, calls, noted = length, calls + 1, jnp.ones_like(asked)
        else:
            known = jnp.zeros_like(asked[:, :1])
            if count == 1:
                known = (place == memory.place[:, None]) & (
                    tokens == memory.token[:, None]
                )
            wanted = jnp.where(asked & ~known, place + 1, 0).max(-1)
            others, read, logits, calls = catch_up(
                params, state, history, length, wanted, place
            )
            if count == 1:
                logits, memory = _remembered(
                    memory, logits, asked, known, place, tokens
                )
            noted = asked
        noted = slots.write(state.asked, noted, state.length)
        calls = state.calls + jnp.stack([jnp.int32(1), calls])
        after = OnDemandState(
            first, others, history, length, read, noted, calls, memory
        )
        return joined(out, asked, logits), after

    def rewind(state, count):
        length = state.length - count
        read = jnp.minimum(state.read, length)
        place = jnp.where(state.memory.place > length, -1, state.memory.place)
        return state._replace(
            first=lead.rewind(state.first, count),
            others=tuple(each("rewind", state.others, same(state.read - read))),
            length=length,
            read=read,
            memory=state.memory._replace(place=place),
        )

    def take(state, rows):
        return OnDemandState(
            lead.take(state.first, rows),
            tuple(each("take", state.others, same(rows))),
            state.tokens[rows],
            state.length[rows],
            state.read[rows],
            state.asked[rows],
            state.calls,
            jax.tree.map(lambda leaf: leaf[rows], state.memory),
        )

    def branch(params, state, tokens, parents):
        out, first = lead.branch(params[0], state.first, tokens, parents)
        asked = gate(out)
        history = slots.write(state.tokens, tokens, state.length)
        wanted = jnp.where(asked.any(-1), state.length, 0)
        others, read, _, calls = catch_up(
            params, state, history, state.length, wanted, parents[:, :0]
        )
        # their trees are read and forgotten: what is kept of a tree, they read later
        none = jnp.zeros(parents.shape[:1], jnp.int32)

        def turn(carry):
            _, others, _ = carry
            columns = params[1:], others, same(tokens), same(parents)
            found = each("branch", *columns)
            branched = [state for _, state in found]
            others = each("prune", branched, same(none[:, None]), same(none))
            logits = [out.logits for out, _ in found]
            return jnp.zeros((), bool), tuple(others), logits

        blank = [
            jnp.zeros((*tokens.shape, z.shape[-1]), z.dtype)
            for z in state.memory.logits
        ]
        # a loop of one turn or none: a branch of the program would copy the caches
        _, others, logits = jax.lax.while_loop(
            lambda carry: carry[0], turn, (asked.any(), others, blank)
        )
        calls = state.calls + jnp.stack([jnp.int32(1), calls + asked.any()])
        noted = slots.write(state.asked, asked, state.length)
        after = state._replace(
            first=first,
            others=others,
            tokens=history,
            read=read,
            asked=noted,
            calls=calls,
        )
        return joined(out, asked, logits), after

    def prune(state, path, count):
        return state._replace(
            first=lead.prune(state.first, path, count),
            tokens=slots.compact(state.tokens, state.length, path),
            length=state.length + count,
            asked=slots.compact(state.asked, state.length, path),
        )

    return LM(init, extend, rewind, take, branch, prune)


def _remembered(memory, logits, asked, known, place, tokens):
    """The others' logits `[B, 1, V]`, and the memory with those that are new."""
    logits = [
        jnp.where(known[..., None], old[:, None], z)
        for old, z in zip(memory.logits, logits, strict=True)
    ]
    new = asked & ~known  # [B, 1]

    def last(old, now):
        return jnp.where(new, now, old[:, None])[:, 0]

    kept = [
        jnp.where(new, z[:, 0], old)
        for old, z in zip(memory.logits, logits, strict=True)
    ]
    place, token = last(memory.place, place), last(memory.token, tokens)
    return logits, Memory(place, token, kept)


class Counted(NamedTuple):
    """Info of `counted`."""

    info: Any  # of the strategy
    # [R] int32, new tokens in whose law the others took part; R rows of the LM: B, or
    # under beam search B * K, for the beams that were running at the end
    asked: jax.Array
    calls: jax.Array  # [2] int32, behind the prompt: of the first, of each other member


class _Counting(NamedTuple):
    info: Any
    calls: jax.Array


def counted(decoder: Decoder) -> Decoder:
    """A strategy that reports how often the members of its `on_demand` were asked.

    Calls are those of the whole batch, whatever their width: an ensemble that asks
    always has as many of the others as of the first. Tokens that were read and taken
    back (rejected drafts, lost beams) count as calls, and not as asked.

    Args:
      decoder: any strategy that holds one `on_demand`, in its target or its draft.

    Returns:
      A decoder whose `Sequences.info` is a `Counted`.

    Raises:
      ValueError: when it starts, for none or several.

    >>> from collab_jax import decode, pool
    >>> from collab_jax.ensemble import gates
    >>> from collab_jax.models import table
    >>> lm = on_demand([table.language_model(1)] * 2, gates.confidence(0.6),
    ...     pool.mixture(0.5, 0.5))
    >>> params = jnp.array([[2.0, 0.0], [0.0, 0.1], [0.0, 0.0]]), jnp.zeros((3, 2))
    >>> decoder = counted(decode.greedy(lm, 4))
    >>> found = decode.run(decoder, params, *decode.pad([[1]]), jax.random.key(0))
    >>> found.tokens.tolist(), found.info.asked.tolist(), found.info.calls.tolist()
    ([[1, 1, 1, 1, 1]], [4], [4, 4])
    """

    def init(params, prompt, prompt_length, key):
        state = decoder.init(params, prompt, prompt_length, key)
        return state._replace(info=_Counting(state.info, _only(state).calls))

    def inner(state):
        return state._replace(info=state.info.info)

    def step(params, state):
        after = decoder.step(params, inner(state))
        return after._replace(info=state.info._replace(info=after.info))

    def finish(state):
        result = decoder.finish(inner(state))
        found = _only(state)
        place = jnp.arange(found.asked.shape[1])
        times = found.length.shape[0] // result.prompt_length.shape[0]
        begin = jnp.repeat(result.prompt_length - 1, times)
        new = (place >= begin[:, None]) & (place < found.length[:, None])
        asked = (found.asked & new).sum(-1, dtype=jnp.int32)
        calls = found.calls - state.info.calls
        return result._replace(info=Counted(result.info, asked, calls))

    return Decoder(init, step, finish)


def _only(state) -> OnDemandState:
    def here(node):
        return isinstance(node, OnDemandState)

    found = [node for node in jax.tree.leaves(state, is_leaf=here) if here(node)]
    if len(found) != 1:
        raise ValueError(
            f"a strategy with {len(found)} ensembles of `on_demand` cannot be counted: "
            "exactly one is expected"
        )
    return found[0]
