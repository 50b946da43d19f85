"""Byte by byte: every member's law of the next byte, whatever its tokens are.

The probability that a member's text begins with some bytes is a sum over the ways to
cut them into tokens, of which the last may reach beyond them. A way is a hypothesis: a
history of whole tokens, and the bytes of a token that is not whole yet. The next byte
splits it in two where a token ends with that byte: the token is taken, or a longer one
goes on. Members keep their H likeliest hypotheses, each a row of the cache.

Shapes: B rows, N members, H hypotheses, U tokens of a member, M symbols of the longest,
S = 257 symbols.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.beam import largest, move
from collab_jax.decode import append
from collab_jax.decoder import Decoder, DecodeState, sequences
from collab_jax.ensemble.vocabulary.symbols import END, SYMBOLS, Symbols, check_start
from collab_jax.lm import LM
from collab_jax.pool import Pool, mixture


class Hypotheses(NamedTuple):
    """How a member may have cut the text; -inf for what cannot be."""

    score: jax.Array  # [B, H] log-prob of the whole tokens
    law: jax.Array  # [B, H, U] of the token that is not whole; -inf: disagrees
    begun: jax.Array  # [B, H] int32, symbols of that token that stand already


class BytewiseState(NamedTuple):
    """What the strategy must keep."""

    hypotheses: tuple[Hypotheses, ...]  # of each member
    prompt_length: jax.Array  # [B] int32, 1


class Info(NamedTuple):
    """What may be thrown away."""

    calls: jax.Array  # [B] int32, of each member while the row was unfinished
    logprob: jax.Array  # [B, L] of each symbol in the law that it was drawn from
    entropy: jax.Array  # [B, L] of that law, nats


Choose = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def best(logits: jax.Array, key: jax.Array, position: jax.Array) -> jax.Array:
    """The likeliest symbol, for `bytewise(choose=best)`.

    >>> best(jnp.array([[0.0, 1.0]]), None, None).tolist()
    [1]
    """
    del key, position
    return law.best(logits)


def bytewise(
    members: Sequence[LM],
    tables: Sequence[Symbols],
    max_new_symbols: int,
    pool: Pool | None = None,
    *,
    hypotheses: int = 5,
    choose: Choose = law.draw,
) -> Decoder:
    """Draws a text byte by byte from the pooled laws of members with any tokens.

        p_n(s c) / p_n(s),   p_n(s) = sum over cuts of s of prod_t p_n(u_t | u_<t)

    with the last token of a cut reaching to the end of s or beyond. With H large enough
    that nothing is dropped this is exact. Tokens that write the same are taken as the
    likeliest of them, with the mass of all. A byte that none of a member's hypotheses
    allows is impossible for it, and so is all that follows: with a `mixture` the others
    go on without it.

    Each member has its prompt: it is `combine.prefixed`, or a translator with its
    source. The prompt of the decoder is one start token a row, of any value. The prompt
    should end where a token does.

    Args:
      members: N LMs, each over its own vocabulary.
      tables: N, what their tokens write.
      max_new_symbols: a row ends after so many.
      pool: of N laws `[B, 1, S]`; the mean unless given.
      hypotheses: H; 1 commits to the likelier of the cuts at every byte, as CharED does
        to one token.
      choose: `law.draw` or `best`.

    Returns:
      A decoder whose parameters are the tuple of the members', and whose tokens are
      symbols, the end included, behind the start; see `symbols.text`.

    Raises:
      ValueError: for numbers below 1, or tables that do not fit the members; when it
        starts, for a prompt of several tokens.

    Source: CharED, arXiv 2407.11009; the exact law of bytes: arXiv 2506.14123. The
    hypotheses are cuts of any kind, not those alone that a tokenizer makes.

    >>> from collab_jax.combine import prefixed
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.ensemble.vocabulary.symbols import symbols, text
    >>> from collab_jax.models import table
    >>> tables = symbols([b"a", b"ab", b""], [2]), symbols([b"b", b"a", b""], [2])
    >>> laws = [[.2, .7, .1], [.5, .3, .2]], [[.6, .2, .2], [.3, .4, .3]]
    >>> params = [jnp.log(jnp.array([*law, law[0], law[0]])) for law in laws]
    >>> params = [(p, *pad([[2]])) for p in params]  # own prompts
    >>> decoder = bytewise([prefixed(table.language_model(1))] * 2, tables, 2,
    ...     choose=best)
    >>> found = run(decoder, params, *pad([[0]]), jax.random.key(0))
    >>> text(found.tokens[0, 1 : found.length[0]]), jnp.exp(found.scores).tolist()
    (b'ab', [0.2964])
    """
    members, tables = tuple(members), tuple(tables)
    count = len(members)
    pooled = mixture() if pool is None else pool
    if not members or len(tables) != count:
        raise ValueError(
            f"{count} members and {len(tables)} tables: one each is expected, for at "
            "least one member"
        )
    for name, value in (
        ("max_new_symbols", max_new_symbols),
        ("hypotheses", hypotheses),
    ):
        if value < 1:
            raise ValueError(f"{name} = {value}, at least 1 is expected")

    def init(params, prompt, prompt_length, key):
        prompt = check_start(prompt)
        batch = len(prompt)
        one = jnp.ones(batch, jnp.int32)
        states, found = [], []
        for lm, own, table in zip(members, params, tables, strict=True):
            state = lm.init(own, batch, max_new_symbols + 2)
            out, state = lm.extend(own, state, prompt)
            rows = jnp.repeat(jnp.arange(batch), hypotheses)
            states.append(lm.take(state, rows))
            first = jnp.arange(hypotheses) == 0
            score = jnp.where(first, 0.0, -jnp.inf)
            laws = _written(out.logits[:, 0], table)
            shape = batch, hypotheses, laws.shape[-1]
            found.append(
                Hypotheses(
                    jnp.broadcast_to(score, shape[:2]),
                    jnp.broadcast_to(laws[:, None], shape),
                    jnp.zeros(shape[:2], jnp.int32),
                )
            )
        tokens = jnp.pad(prompt, ((0, 0), (0, max_new_symbols)))
        measured = jnp.zeros(tokens.shape, jnp.float32)
        return DecodeState(
            lm=tuple(states),
            tokens=tokens,
            length=one,
            done=one < 0,
            key=law.row_keys(key, batch),
            own=BytewiseState(tuple(found), one),
            info=Info(jnp.zeros_like(one), measured, measured),
        )

    def step(params, state):
        own, live = state.own, ~state.done
        rows = jnp.arange(live.shape[0])
        laws = [
            _symbol_law(each, table)
            for each, table in zip(own.hypotheses, tables, strict=True)
        ]
        logits = pooled([one[:, None] for one in laws])[:, 0]
        symbol = choose(logits, state.key, state.length)
        logprob = law.log_probs(logits)[rows, symbol]
        states, found = [], []
        for n, lm in enumerate(members):
            inner, after = _advance(
                lm, params[n], state.lm[n], own.hypotheses[n], tables[n], symbol, live
            )
            states.append(inner)
            found.append(after)
        info = Info(
            state.info.calls + live,
            append(state.info.logprob, state.length, logprob, live),
            append(state.info.entropy, state.length, law.entropy(logits), live),
        )
        length = state.length + live
        ended = (symbol == END) | (length > max_new_symbols) | ~jnp.isfinite(logprob)
        return DecodeState(
            lm=tuple(states),
            tokens=append(state.tokens, state.length, symbol, live),
            length=length,
            done=state.done | ended,
            key=state.key,
            own=own._replace(hypotheses=tuple(found)),
            info=info,
        )

    return Decoder(init, step, sequences)


def _symbol_law(found: Hypotheses, table: Symbols) -> jax.Array:
    """Log-probs of the next symbol, `[B, S]`; all -inf where no hypothesis is left."""
    at = jnp.minimum(found.begun, table.spelling.shape[1] - 1)
    symbol = table.spelling.T[at]  # [B, H, U]
    joint = found.score[:, :, None] + found.law
    batch = joint.shape[0]
    top = joint.max((1, 2), keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share = jnp.exp(joint - top).reshape(batch, -1)
    zeros = jnp.zeros((batch, SYMBOLS), share.dtype)
    rows = jnp.arange(batch)[:, None]
    mass = zeros.at[rows, symbol.reshape(batch, -1)].add(share)
    empty = mass == 0.0
    return law.log_probs(jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, mass))))


def _advance(lm, params, state, found: Hypotheses, table: Symbols, symbol, live):
    """The member's state and hypotheses behind one more symbol."""
    batch, count, vocab = found.law.shape
    at = jnp.minimum(found.begun, table.spelling.shape[1] - 1)
    agrees = table.spelling.T[at] == symbol[:, None, None]
    agrees &= table.size > found.begun[:, :, None]
    laws = jnp.where(agrees, found.law, -jnp.inf)
    whole = table.size == found.begun[:, :, None] + 1
    ends = jnp.where(whole, laws, -jnp.inf)
    rest = jnp.where(whole, -jnp.inf, laws)
    mass = [found.score + _total(part) for part in (rest, ends)]  # [B, H] each
    scores, chosen = largest(jnp.concatenate(mass, axis=1), count)
    parent, taken = chosen % count, chosen >= count
    rows = jnp.arange(batch)[:, None]
    token = ends.argmax(-1)[rows, parent]
    # what is done, and what goes on with its token, reads nothing
    idle = ~live[:, None] | ~taken | jnp.isneginf(scores)
    parent = jnp.where(live[:, None], parent, jnp.arange(count))
    state = move(lm, state, parent) if count > 1 else state
    out, state = lm.extend(params, state, token.reshape(-1, 1).astype(jnp.int32))
    state = lm.rewind(state, idle.reshape(-1).astype(jnp.int32))
    fresh = _written(out.logits[:, 0], table).reshape(batch, count, vocab)
    after = Hypotheses(
        jnp.where(taken, scores, found.score[rows, parent]),
        jnp.where(taken[..., None], fresh, rest[rows, parent]),
        jnp.where(taken, 0, found.begun[rows, parent] + 1),
    )
    gone = jnp.isneginf(scores)
    after = after._replace(score=jnp.where(gone, -jnp.inf, after.score))
    return state, jax.tree.map(
        lambda old, new: jnp.where(live.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
        found,
        after,
    )


def _written(logits: jax.Array, table: Symbols) -> jax.Array:
    """The law of the tokens that write something."""
    return law.log_probs(jnp.where(table.size > 0, logits, -jnp.inf))


def _total(log_p: jax.Array) -> jax.Array:
    """`log sum exp` over tokens; -inf where there is none."""
    top = log_p.max(-1)
    level = jnp.where(jnp.isneginf(top), 0.0, top)
    total = jnp.exp(log_p - level[..., None]).sum(-1)
    none = total == 0.0
    return jnp.where(none, -jnp.inf, level + jnp.log(jnp.where(none, 1.0, total)))
