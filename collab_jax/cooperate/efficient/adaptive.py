"""Adaptive n-grams: a small language model of counts, learnt from the row itself.

Every row counts its own n-grams of all orders, first of the prompt and then of what was
accepted; the longest context that has been seen says what comes next. The counts are
hash tables on the device, and depend on the text alone, in whatever portions it came:
a run that is resumed drafts what it would have drafted.

Shapes: B rows, L slots of the text, K longest draft, M = order - 1 longest context, S
cells of a table, W tokens that are counted at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.draft import Draft, Proposer, check_size
from collab_jax.cooperate.efficient.ngram import check_order


class Tables(NamedTuple):
    """What `adaptive` has counted."""

    grams: (
        jax.Array
    )  # [B, M, S] int32, counts of n-grams of 2 .. M + 1 tokens, by their hash
    # [B, M, S] int32, by the hash of the context: 0, or count * S + place of the most
    # frequent next token, the latest of equals
    best: jax.Array
    seen: jax.Array  # [B] int32, tokens of the text that have been counted


def hashes(tokens: jax.Array, order: int) -> jax.Array:
    """Hashes of the last 1, 2, .. tokens, read backwards.

    Args:
      tokens: `[..., T]` int32.
      order: the longest n-gram.

    Returns:
      `[order, ..., T]` uint32; entry [n - 1, .., t] of the n tokens up to t, where the
      tokens before the first are zeros.

    >>> h = hashes(jnp.array([3, 7, 9, 7, 9]), 3)
    >>> [(h[n, 2] == h[n, 4]).tolist() for n in range(3)]
    [True, True, False]
    """
    width = tokens.shape[-1]
    value = jnp.full(tokens.shape, 0x811C9DC5, jnp.uint32)
    found = []
    for i in range(order):
        pad = [(0, 0)] * (tokens.ndim - 1) + [(i, 0)]
        token = jnp.pad(tokens, pad)[..., :width].astype(jnp.uint32)
        value = (value ^ token) * jnp.uint32(0x9E3779B1)
        value ^= value >> 15
        value *= jnp.uint32(0x85EBCA6B)
        value ^= value >> 13
        found.append(value)
    return jnp.stack(found)


def adaptive(length: int, order: int = 5, slots: int = 8192) -> Proposer:
    """Drafts the most frequent next token, context after context.

    With `c_n` the counts of the row's own text,

        x_i = argmax_v c_n(x_i-n .. x_i-1, v),   n the longest context that was seen,

    from `order - 1` tokens down to one; of equal counts the latest. A draft ends where
    even the last token is new.

    An n-gram whose cell is taken by a more frequent one is lost, which shortens drafts
    and changes no text; a wrong cell is never read, because the context is compared.

    Args:
      length: K, the longest draft.
      order: tokens of the longest n-gram, at least 2.
      slots: S, cells of each table, a power of two. A row of `(order - 1) * 8 * slots`
        bytes; the text has to be shorter than this.

    Returns:
      A proposer of one-hot chains; its parameters are `()`.

    Raises:
      ValueError: for a length below 1, an order below 2, or slots that are not a power
        of two; when first called, for a text that may outgrow the table.

    Source: arXiv 2404.08698.

    >>> proposer = adaptive(3, order=3, slots=64)
    >>> text, end = jnp.array([[1, 2, 3, 2, 4, 2, 3, 1, 0, 0]]), jnp.array([8])
    >>> state = proposer.init((), text, end, 2)
    >>> draft, state = proposer.propose((), state, text, end, None)
    >>> draft.tokens.tolist(), draft.count.tolist()
    ([[2, 3, 1]], [3])
    """
    size = check_size("length", length)
    depth = check_order("order", order, least=2) - 1
    bits = check_slots(slots)
    most = (1 << (31 - bits)) - 1
    table = jnp.arange(depth)[:, None]

    def cells(tokens, order):
        return (hashes(tokens, order) & (slots - 1)).astype(jnp.int32)

    def count_in(state, tokens, length, width):
        """Counts the n-grams that end in the next tokens, at most `width` of them."""
        place = state.seen[:, None] + jnp.arange(-depth, width)  # [B, M + W]
        text = _read(tokens, place)
        cell = jnp.swapaxes(cells(text, depth + 1), 0, 1)  # [B, M + 1, M + W]
        place = place[:, None, depth:]
        valid = (place < length[:, None, None]) & (place > table)  # [B, M, W]
        rows = jnp.arange(tokens.shape[0])[:, None, None]
        gram, context = cell[:, 1:, depth:], cell[:, :-1, depth - 1 : -1]
        gram, context = (jnp.where(valid, z, slots) for z in (gram, context))
        found = state.grams.at[rows, table, gram].get(mode="clip") + 1 + earlier(gram)
        found = jnp.minimum(found, most) << bits | place
        return Tables(
            state.grams.at[rows, table, gram].add(1, mode="drop"),
            state.best.at[rows, table, context].max(found, mode="drop"),
            jnp.minimum(state.seen + width, length),
        )

    def follow(state, tokens, recent):
        """The next token behind the last M tokens of the draft: (token, known)."""
        rows = jnp.arange(tokens.shape[0])[:, None]
        cell = cells(recent, depth)[:, :, -1].T  # [B, M]
        packed = state.best[rows, table[:, 0], cell]
        place = packed & (slots - 1)
        before = _read(tokens, place[:, :, None] - 1 - table[:, 0])  # [B, M, M]
        same = before == jnp.flip(recent, 1)[:, None, :]
        known = (packed > 0) & (same | (table < table.T)).all(-1)
        longest = depth - 1 - jnp.argmax(jnp.flip(known, 1), axis=1)
        place = jnp.take_along_axis(place, longest[:, None], axis=1)
        return _read(tokens, place)[:, 0], known.any(1)

    def init(params, prompt, prompt_length, room):
        del params
        batch, width = prompt.shape
        if width + room > slots:
            raise ValueError(
                f"a table of {slots} cells for a text of up to {width + room} tokens: "
                f"give slots={1 << (width + room - 1).bit_length()} or more"
            )
        empty = jnp.zeros((batch, depth, slots), jnp.int32)
        state = Tables(empty, empty, jnp.zeros(batch, jnp.int32))
        return count_in(state, prompt, prompt_length, width)

    def propose(params, state, tokens, length, key):
        del params, key
        state = count_in(state, tokens, length, size + 1)
        recent = _read(tokens, length[:, None] + jnp.arange(-depth, 0))

        def step(carry, _):
            recent, going = carry
            token, known = follow(state, tokens, recent)
            going &= known
            recent = jnp.concatenate([recent[:, 1:], token[:, None]], axis=1)
            return (recent, going), (token, going)

        begin = recent, jnp.ones(tokens.shape[0], bool)
        _, (drafted, going) = jax.lax.scan(step, begin, None, length=size)
        return Draft(drafted.T, going.sum(0, dtype=jnp.int32)), state

    return Proposer(init, propose, lambda params, state, verified: state, size, size)


def earlier(values: jax.Array) -> jax.Array:
    """How often each value stands before itself, along the last axis.

    Args:
      values: `[..., T]` int32.

    >>> earlier(jnp.array([5, 7, 5, 5, 7])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = jnp.argsort(values, axis=-1, stable=True)
    ranked = jnp.take_along_axis(values, order, axis=-1)
    index = jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape)
    new = jnp.diff(ranked, axis=-1, prepend=ranked[..., :1] - 1) != 0
    run = jax.lax.cummax(jnp.where(new, index, 0), axis=values.ndim - 1)
    return jnp.put_along_axis(index, order, index - run, axis=-1, inplace=False)


def check_slots(slots: object) -> int:
    """The number of bits of a table's address.

    Args:
      slots: cells of the table.

    Raises:
      ValueError: for anything but a power of two from 16 to 2^24.

    >>> check_slots(8192)
    13
    """
    if (
        not isinstance(slots, int)
        or slots.bit_count() != 1
        or not 4 <= (bits := slots.bit_length() - 1) <= 24
    ):
        raise ValueError(
            f"slots = {slots!r}: a power of two from 16 to 2**24 is expected, e.g. 8192"
        )
    return bits


def _read(tokens: jax.Array, place: jax.Array) -> jax.Array:
    """`tokens[b, place[b, ..]]`, and -1 before the text."""
    rows = jnp.arange(tokens.shape[0]).reshape(-1, *[1] * (place.ndim - 1))
    found = tokens[rows, jnp.clip(place, 0, tokens.shape[1] - 1)]
    return jnp.where(place < 0, -1, found).astype(jnp.int32)
