"""Agreement: members with vocabularies of their own write one text, beam by beam.

A beam has a history of tokens for each member. Their texts agree: each is the beginning
of the longest. Members whose text is behind it write on, each with tokens that agree
with it; when none is behind, all do, with tokens that agree with each other.

Texts are strings of symbols (`symbols`), so that an end agrees with an end alone.

Shapes: B rows, K beams, N members, C candidates of a step, L symbols of a text, U
tokens of a member, M symbols of the longest, k likeliest tokens of a member.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law, slots
from collab_jax.beam import best_of, largest, move
from collab_jax.decoder import Decoder, DecodeState, Sequences
from collab_jax.ensemble.vocabulary.symbols import END, Symbols, check_start
from collab_jax.lm import LM
from collab_jax.pool import mixture

COMBINATIONS = 1 << 16  # of tokens that are compared for one beam


class Texts(NamedTuple):
    """K texts a row, best first; a score of -inf marks an empty place."""

    score: jax.Array  # [B, K] weighted sum of log-probs; of ended texts, penalised
    total: jax.Array  # [B, K] the sum alone
    length: jax.Array  # [B, K] int32, symbols
    symbols: jax.Array  # [B, K, L] int32; behind `length` anything
    reach: jax.Array  # [B, K, N] int32, symbols that each member has written
    last: jax.Array  # [B, K, N] int32, each member's last token, not yet consumed


class AgreementState(NamedTuple):
    """What the search must keep."""

    running: Texts
    ended: Texts


class Info(NamedTuple):
    """What may be thrown away."""

    calls: jax.Array  # [B] int32, of each member while the row was unfinished
    texts: Texts  # all K that ended, best first


def agreement(
    members: Sequence[LM],
    tables: Sequence[Symbols],
    max_new_symbols: int,
    beams: int = 4,
    *,
    weights: Sequence[float | jax.Array] = (),
    top: int = 16,
    length_penalty=0.0,
) -> Decoder:
    """Beam search for the text that the members like best together.

        score = sum_n w[n] log p_n(tokens of member n)

    A step takes the k likeliest tokens of each member that writes, among those that
    agree with the text, and of their combinations those that agree. The best C = 2 K of
    all beams are kept: those in which all members wrote an end are ended, if they are
    among the first K, and the best K others run on, as in `beam.search`. A member that
    waits adds nothing to the score meanwhile.

    Each member has its prompt: it is `combine.prefixed`, or a translator with its
    source. The prompt of the decoder is one start token a row, of any value.

    Args:
      members: N LMs, each over its own vocabulary.
      tables: N, what their tokens write.
      max_new_symbols: a text is cut there.
      beams: K.
      weights: one number >= 0 a member; none for equal weights.
      top: k; with less than U, no combination may agree, and the beam dies.
      length_penalty: ended texts are ranked by `score / symbols ** length_penalty`.

    Returns:
      A decoder whose parameters are the tuple of the members', and whose tokens are
      symbols, the end included, behind the start; see `symbols.text`.

    Raises:
      ValueError: for numbers below 1, tables or weights that do not fit the members, or
        too many combinations; when it starts, for a prompt of several tokens.

    Source: arXiv 2502.21265, whose search has no bound k.

    >>> from collab_jax.combine import prefixed
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.ensemble.vocabulary.symbols import symbols, text
    >>> from collab_jax.models import table
    >>> tables = symbols([b"a", b"ab", b""], [2]), symbols([b"b", b"a", b""], [2])
    >>> laws = [[.2, .7, .1], [.6, .3, .1]], [[.6, .2, .2], [.3, .6, .1]]
    >>> params = [jnp.log(jnp.array([*law, law[0], law[0]])) for law in laws]
    >>> params = [(p, *pad([[2]])) for p in params]  # own prompts
    >>> decoder = agreement([prefixed(table.language_model(1))] * 2, tables, 4, 2)
    >>> found = run(decoder, params, *pad([[0]]), jax.random.key(0))
    >>> text(found.tokens[0, 1 : found.length[0]])
    b'abaa'
    """
    members, tables = tuple(members), tuple(tables)
    count = len(members)
    share = tuple(weights) or (1.0 / max(count, 1),) * count
    if not members or len(tables) != count or len(share) != count:
        raise ValueError(
            f"{count} members, {len(tables)} tables and {len(share)} weights: one each "
            "is expected, for at least one member"
        )
    numbers = {"max_new_symbols": max_new_symbols, "beams": beams, "top": top}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} = {value}, at least 1 is expected")
    ranks = [min(top, table.size.shape[0]) for table in tables]
    combinations = math.prod(ranks)
    if combinations > COMBINATIONS:
        raise ValueError(
            f"top = {top} of {count} members makes {combinations} combinations a beam, "
            f"more than {COMBINATIONS}: give a smaller one"
        )
    mixture(*weights)  # refuses negative ones
    penalty = jnp.asarray(length_penalty, jnp.float32)

    def penalised(total, length):
        return total / jnp.maximum(length, 1).astype(jnp.float32) ** penalty

    def init(params, prompt, prompt_length, key):
        del prompt_length
        prompt = check_start(prompt)
        batch = len(prompt)
        capacity = max_new_symbols + 2  # a token writes a symbol at least
        states = []
        for lm, own in zip(members, params, strict=True):
            state = lm.init(own, batch, capacity)
            states.append(lm.take(state, jnp.repeat(jnp.arange(batch), beams)))
        none = jnp.full((batch, beams), -jnp.inf)
        zeros = jnp.zeros((batch, beams), jnp.int32)
        each = jnp.zeros((batch, beams, count), jnp.int32)
        blank = jnp.zeros((batch, beams, max_new_symbols), jnp.int32)
        ended = Texts(none, none, zeros, blank, each, each)
        first = none.at[:, 0].set(0.0)
        start = jnp.broadcast_to(prompt[:, :, None], each.shape)
        running = ended._replace(score=first, total=first, last=start)
        return DecodeState(
            lm=tuple(states),
            tokens=jnp.pad(prompt, ((0, 0), (0, max_new_symbols))),
            length=jnp.ones(batch, jnp.int32),
            done=zeros[:, 0] > 0,
            key=law.row_keys(key, batch),
            own=AgreementState(running, ended),
            info=zeros[:, 0],
        )

    def step(params, state):
        running, ended = state.own
        done = state.done
        batch = done.shape[0]
        logits, read = [], []
        for n, (lm, own) in enumerate(zip(members, params, strict=True)):
            token = running.last[:, :, n].reshape(-1, 1)
            out, inner = lm.extend(own, state.lm[n], token)
            logits.append(out.logits[:, 0].reshape(batch, beams, -1))
            read.append(inner)
        invalid = sum(jnp.isnan(z).any(-1) for z in logits) > 0
        invalid &= ~jnp.isneginf(running.score)
        grown, parent, wrote = _grow(running, logits, tables, share, ranks, beams)

        last = slots.last(grown.symbols, grown.length, 0)
        over = (grown.reach == grown.length[:, :, None]).all(-1) & (last == END)
        over |= grown.length >= max_new_symbols
        ranked = penalised(grown.total, grown.length)
        dead = jnp.isneginf(grown.score)
        ends = over & ~dead & (jnp.arange(over.shape[1]) < beams)
        final = grown._replace(score=jnp.where(ends, ranked, -jnp.inf))
        new_ended = best_of(ended, final, beams)
        going = grown._replace(score=jnp.where(over, -jnp.inf, grown.score))
        _, place = jax.lax.top_k(going.score, beams)
        new_running, parent, wrote = slots.select((going, parent, wrote), place)

        broken = invalid.any(-1)
        score = jnp.where(broken[:, None], jnp.nan, new_ended.score)
        new_ended = new_ended._replace(score=score)

        def keep(old, new):
            return jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        running = jax.tree.map(keep, running, new_running)
        ended = jax.tree.map(keep, ended, new_ended)
        parent = jnp.where(done[:, None], jnp.arange(beams), parent)
        wrote &= ~done[:, None, None]
        states = []
        for n, (lm, inner) in enumerate(zip(members, read, strict=True)):
            inner = move(lm, inner, parent) if beams > 1 else inner
            waits = (~wrote[:, :, n]).reshape(-1)
            states.append(lm.rewind(inner, waits.astype(jnp.int32)))
        calls = state.info + ~done
        # scores only fall: a text that runs cannot overtake K that ended
        reach = jnp.where(penalty > 0, max_new_symbols, running.length)
        hope = penalised(running.total, reach)
        hope = jnp.where(jnp.isneginf(running.score), -jnp.inf, hope).max(-1)
        done |= ~(hope > ended.score[:, -1])
        return DecodeState(
            lm=tuple(states),
            tokens=slots.write(
                state.tokens, ended.symbols[:, 0], jnp.ones(batch, jnp.int32)
            ),
            length=1 + jnp.where(done, ended.length[:, 0], 0),
            done=done,
            key=state.key,
            own=AgreementState(running, ended),
            info=calls,
        )

    def finish(state):
        ended = state.own.ended
        score, total = ended.score[:, 0], ended.total[:, 0]
        return Sequences(
            state.tokens,
            state.length,
            jnp.ones_like(state.length),
            jnp.where(jnp.isfinite(score), total, score),
            Info(state.info, ended),
        )

    return Decoder(init, step, finish)


def _grow(running, logits, tables, share, ranks, beams):
    """The best C continuations, their parents `[B, C]`, and who wrote `[B, C, N]`."""
    batch = running.score.shape[0]
    lag = running.length[:, :, None] - running.reach
    behind = lag > 0
    writes = behind | ~behind.any(-1, keepdims=True)
    options = [
        _options(running, n, z, tables[n], share[n], ranks[n], writes[:, :, n])
        for n, z in enumerate(logits)
    ]
    count = len(options)

    def axis(n, values):
        """An array `[B, K, k, ...]` along its own axis of the combinations."""
        shape = [1] * count
        shape[n] = ranks[n]
        return values.reshape(batch, beams, *shape, *values.shape[3:])

    total = sum(axis(n, o.score) for n, o in enumerate(options))
    fits = jnp.ones((), bool)
    for a, b in itertools.combinations(range(count), 2):
        one, two = (
            (axis(n, options[n].beyond), axis(n, options[n].size)) for n in (a, b)
        )
        width = min(one[0].shape[-1], two[0].shape[-1])
        same = one[0][..., :width] == two[0][..., :width]
        least = jnp.minimum(one[1], two[1])[..., None]
        fits &= (same | (jnp.arange(width) >= least)).all(-1)
    total = jnp.where(fits, total, -jnp.inf)
    scored = running.score.reshape(batch, beams, *(1,) * count) + total
    flat = scored.reshape(batch, -1)
    score, index = largest(flat, min(2 * beams, flat.shape[1]))
    each = flat.shape[1] // beams
    parent, index = index // each, index % each
    which = jnp.unravel_index(index, tuple(ranks))
    rows = jnp.arange(batch)[:, None]
    old = slots.select(running, parent)
    reach, last, wrote, beyond, sizes = [], [], [], [], []
    for n, option in enumerate(options):
        at = rows, parent, which[n]
        moved = writes[rows, parent, n]
        wrote.append(moved)
        last.append(jnp.where(moved, option.token[at], old.last[:, :, n]))
        reach.append(old.reach[:, :, n] + jnp.where(moved, option.wrote[at], 0))
        beyond.append(_wide(option.beyond[at], running.symbols.shape[-1]))
        sizes.append(option.size[at])
    sizes = jnp.stack(sizes)  # [N, B, C]
    longest = sizes.argmax(0)
    new = jnp.take_along_axis(jnp.stack(beyond), longest[None, :, :, None], 0)[0]
    place = jnp.arange(new.shape[-1]) - old.length[:, :, None]
    shifted = jnp.take_along_axis(new, jnp.clip(place, 0, new.shape[-1] - 1), 2)
    length = jnp.minimum(old.length + sizes.max(0), new.shape[-1])
    grown = Texts(
        score,
        score,
        length,
        jnp.where(place >= 0, shifted, old.symbols),
        jnp.stack(reach, -1),
        jnp.stack(last, -1),
    )
    return grown, parent, jnp.stack(wrote, -1)


class _Options(NamedTuple):
    """The k likeliest tokens of a member at each beam; one of nothing if it waits."""

    score: jax.Array  # [B, K, k], weighted; -inf where there is none
    token: jax.Array  # [B, K, k]
    wrote: jax.Array  # [B, K, k] its symbols
    beyond: jax.Array  # [B, K, k, M] those beyond the text
    size: jax.Array  # [B, K, k] how many


def _options(running, n, logits, table: Symbols, weight, rank, writes) -> _Options:
    spelling, size = table
    width = spelling.shape[1]
    reach = running.reach[:, :, n]
    lag = running.length - reach
    at = jnp.minimum(
        reach[:, :, None] + jnp.arange(width), running.symbols.shape[2] - 1
    )
    rest = jnp.take_along_axis(running.symbols, at, axis=2)  # [B, K, M]
    # a symbol is right that is the text's, or beyond it, or beyond the token
    right = spelling == rest[:, :, None, :]
    right |= jnp.arange(width) >= lag[:, :, None, None]
    right |= jnp.arange(width) >= size[:, None]
    allowed = right.all(-1) & (size > 0)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)  # `step` ends such rows
    absent = jnp.isneginf(logits) | ~allowed
    log_p = law.log_probs(logits)
    # a weight of 0 makes nothing of -inf
    scored = jnp.where(absent, -jnp.inf, weight * jnp.where(absent, 0.0, log_p))
    score, token = jax.lax.top_k(scored, rank)
    alone = jnp.where(jnp.arange(rank) == 0, 0.0, -jnp.inf)
    score = jnp.where(writes[..., None], score, alone)
    wrote = jnp.where(writes[..., None], size[token], 0)
    over = jnp.minimum(lag[:, :, None, None] + jnp.arange(width), width - 1)
    beyond = jnp.take_along_axis(
        spelling[token], jnp.broadcast_to(over, (*token.shape, width)), axis=3
    )
    left = jnp.maximum(wrote - lag[:, :, None], 0)
    return _Options(score, token, wrote, beyond, left)


def _wide(symbols, width):
    """`[..., M]` as `[..., L]`, cut or filled up."""
    short = max(0, width - symbols.shape[-1])
    padding = ((0, 0),) * (symbols.ndim - 1) + ((0, short),)
    return jnp.pad(symbols, padding)[..., :width]
