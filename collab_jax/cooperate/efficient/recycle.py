"""Token recycling: what the target would have said is kept, and proposed again.

A call of the target computes a law behind every drafted token, and most of it is thrown
away. Here its best tokens are kept, one list for every token of the vocabulary: what
came next, the last time that this token stood anywhere. A draft follows the lists.

Shapes: B rows, V vocabulary, R tokens in a list, N nodes of a draft, D tokens of its
longest path, P longest prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient.draft import (
    Draft,
    Proposer,
    Verified,
    check_size,
)
from collab_jax.cooperate.efficient.topology import check_paths


class Lists(NamedTuple):
    """What `recycle` keeps."""

    # [B, V, R] int32, the last known next tokens of every token, the best first; -1
    # behind the known ones
    next: jax.Array
    pending: jax.Array  # [B] int32, what the last draft was a continuation of


def recycle(length: int, vocab: int) -> Proposer:
    """Follows the best next tokens: `x_i = next[x_i-1, 0]`, a chain.

    Args:
      length: K, the longest draft; it is shorter where nothing is known.
      vocab: V, of the target. A row of `4 * vocab` bytes.

    Returns:
      A proposer of one-hot chains; its parameters are `()`.

    Raises:
      ValueError: for a length or a vocabulary below 1; when first called, for another
        vocabulary than the target's.

    Source: arXiv 2408.08696.

    >>> proposer = recycle(3, vocab=10)
    >>> text, end = jnp.array([[4, 5, 6, 4]]), jnp.array([4])
    >>> state = proposer.init((), text, end, 2)
    >>> draft, state = proposer.propose((), state, text, end, None)
    >>> draft.tokens.tolist(), draft.count.tolist()
    ([[5, 6, 4]], [3])
    """
    size = check_size("length", length)
    proposer = recycle_tree([(0,) * (i + 1) for i in range(size)], vocab)

    def propose(*arguments):
        draft, state = proposer.propose(*arguments)
        return draft._replace(parents=None), state

    return proposer._replace(propose=propose)


def recycle_tree(paths: Sequence[Sequence[int]], vocab: int) -> Proposer:
    """A tree of the next tokens of the next tokens: children of x are `next[x]`.

    After every call, the list of each token that the target has read becomes its best
    next tokens there; where the target forbids all but a few (a greedy target all but
    one), they move to the front of the list. Of equal tokens the last one counts that
    was accepted, else the last one drafted. The lists begin with the pairs of the
    prompt.

    Nodes whose token is not known are left out, and the others keep their order. The
    lists are not a function of the text: a run that is resumed from its text alone
    begins with new ones, and follows the same law along another path.

    Args:
      paths: the ranks of the tokens from the root to each node, e.g. of
        `topology.grow(60)`; every path but the first token's comes behind its own
        beginning.
      vocab: V, of the target. A row of `4 * vocab * R` bytes, R one more than the
        largest rank.

    Returns:
      A proposer of one-hot trees; its parameters are `()`.

    Raises:
      ValueError: for no paths, one that has no beginning or stands twice, or a
        vocabulary that is too small; when first called, for another vocabulary than the
        target's.

    Source: arXiv 2408.08696.

    >>> proposer = recycle_tree([(0,), (1,), (0, 0)], vocab=10)
    >>> text, end = jnp.array([[4, 5, 6, 4]]), jnp.array([4])
    >>> state = proposer.init((), text, end, 2)
    >>> draft, state = proposer.propose((), state, text, end, None)
    >>> draft.tokens[0, :2].tolist(), draft.parents[0, :2].tolist(), draft.count[0]
    ([5, 6], [-1, 0], Array(2, dtype=int32))
    """
    parents, ranks = check_paths(paths)
    if not isinstance(vocab, int) or vocab <= max(ranks):
        raise ValueError(
            f"vocab = {vocab!r} for lists of {max(ranks) + 1} tokens: the target's "
            "number of tokens is expected"
        )
    size, width, depth = len(paths), max(ranks) + 1, max(map(len, paths))

    def init(params, prompt, prompt_length, room):
        del params, room
        batch, length = prompt.shape
        rows = jnp.arange(batch)[:, None]
        place = jnp.arange(length)
        pair = place < prompt_length[:, None] - 1
        latest = jnp.full((batch, vocab), -1, jnp.int32)
        latest = latest.at[rows, jnp.where(pair, prompt, vocab)].max(place, mode="drop")
        follow = jnp.take_along_axis(prompt, jnp.minimum(latest + 1, length - 1), 1)
        first = jnp.where(latest < 0, -1, follow).astype(jnp.int32)
        rest = ((0, 0), (0, 0), (0, width - 1))
        lists = jnp.pad(first[:, :, None], rest, constant_values=-1)
        return Lists(lists, jnp.zeros(batch, jnp.int32))

    def propose(params, state, tokens, length, key):
        del params, key
        rows = jnp.arange(length.shape[0])
        pending = tokens[rows, length - 1].astype(jnp.int32)
        nodes = [pending]
        for parent, rank in zip(parents, ranks, strict=True):
            above = nodes[parent + 1]
            found = state.next[rows, jnp.maximum(above, 0), rank]
            nodes.append(jnp.where(above < 0, -1, found))
        found = jnp.stack(nodes[1:], axis=1)
        above = jnp.broadcast_to(jnp.asarray(parents, jnp.int32), found.shape)
        draft = known_first(found, above, found >= 0)
        return draft, state._replace(pending=pending)

    def observe(params, state, verified):
        del params
        logits = verified.out.logits
        if logits.shape[-1] != vocab:
            raise ValueError(
                f"token recycling over {vocab} tokens for a target over "
                f"{logits.shape[-1]}: give recycle the target's number of tokens"
            )
        rows = jnp.arange(logits.shape[0])[:, None]
        read = jnp.concatenate([state.pending[:, None], verified.draft.tokens], axis=1)
        wanted = last_of_equals(read, priority(verified))
        best, new = jax.lax.top_k(law.log_probs(logits), width)
        new = jnp.where(jnp.isfinite(best), new, -1)
        merged = to_front(new, state.next[rows, read])
        place = jnp.where(wanted, read, vocab)
        return state._replace(next=state.next.at[rows, place].set(merged, mode="drop"))

    return Proposer(init, propose, observe, size, depth)


def known_first(tokens: jax.Array, parents: jax.Array, known: jax.Array) -> Draft:
    """A tree without the nodes that are not known; the others keep their order.

    Args:
      tokens: `[B, N]` int32.
      parents: `[B, N]` int32, smaller than the node's own index; -1 for a root.
      known: `[B, N]` bool; the parent of a known node is known.

    Returns:
      A one-hot tree of `known.sum(1)` nodes.

    >>> known = jnp.array([[False, True, False, True]])
    >>> tokens, parents = jnp.array([[6, 7, 8, 9]]), jnp.array([[-1, -1, 0, 1]])
    >>> draft = known_first(tokens, parents, known)
    >>> draft.tokens[0, :2].tolist(), draft.parents[0, :2].tolist(), draft.count[0]
    ([7, 9], [-1, 0], Array(2, dtype=int32))
    """
    order = jnp.argsort(~known, axis=1, stable=True)
    place = jnp.pad(jnp.argsort(order, axis=1), ((0, 0), (1, 0)), constant_values=-1)
    above = jnp.take_along_axis(parents, order, axis=1) + 1
    return Draft(
        jnp.maximum(jnp.take_along_axis(tokens, order, axis=1), 0),
        known.sum(1, dtype=jnp.int32),
        None,
        jnp.take_along_axis(place, above, axis=1).astype(jnp.int32),
    )


def priority(verified: Verified) -> jax.Array:
    """Which of the tokens that the target has read tells most about the text to come.

    Args:
      verified: of this round.

    Returns:
      `[B, 1 + N]` int32: -1 for nodes that were not proposed, then the rejected ones,
      then the pending token and the accepted ones; the later the higher.

    >>> from collab_jax.lm import Out
    >>> draft = Draft(jnp.array([[7, 8, 9]]), jnp.array([2]))
    >>> found = Verified(jnp.array([[7, 5]]), jnp.array([2]), jnp.array([1]),
    ...     jnp.array([[0, 0, 0]]), draft, Out(()))
    >>> priority(found).tolist()
    [[4, 5, 2, -1]]
    """
    draft = verified.draft
    nodes = draft.tokens.shape[1]
    index = jnp.arange(1, nodes + 1)
    place = jnp.where(index <= draft.count[:, None], index, -1)
    kept = jnp.arange(verified.path.shape[1]) < verified.accepted[:, None]  # [B, D]
    on_path = (verified.path[:, :, None] + 1 == index) & kept[:, :, None]
    place = jnp.where(on_path.any(1), index + nodes + 1, place)
    place = jnp.pad(place, ((0, 0), (1, 0)), constant_values=nodes + 1)
    return jnp.where(verified.count[:, None] > 0, place, -1).astype(jnp.int32)


def last_of_equals(tokens: jax.Array, place: jax.Array) -> jax.Array:
    """Whether a token is the one of its kind with the highest place, 0 or more.

    Args:
      tokens: `[B, T]`.
      place: `[B, T]`, all different where it is not negative.

    >>> last_of_equals(jnp.array([[5, 6, 5]]), jnp.array([[9, -1, 3]])).tolist()
    [[True, False, False]]
    """
    equal = tokens[:, :, None] == tokens[:, None, :]
    beaten = (equal & (place[:, None, :] > place[:, :, None])).any(-1)
    return (place >= 0) & ~beaten


def to_front(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new tokens, then the old ones, each once, and as many as fit; -1 is no token.

    Args:
      new: `[..., R]` int32, without repetition but for -1.
      old: `[..., R]` int32, likewise.

    >>> to_front(jnp.array([7, -1, -1]), jnp.array([5, 7, 6])).tolist()
    [7, 5, 6]
    """
    width = new.shape[-1]
    both = jnp.concatenate([new, old], axis=-1)
    again = (old[..., :, None] == new[..., None, :]).any(-1)
    gone = (both < 0) | jnp.concatenate([jnp.zeros_like(again), again], axis=-1)
    order = jnp.argsort(gone, axis=-1, stable=True)[..., :width]
    kept = jnp.where(gone, -1, both)
    return jnp.take_along_axis(kept, order, axis=-1)
