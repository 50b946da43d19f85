"""Outputs behind small trees that hang below the tokens of a text.

Rewards of candidates, and likelihoods of texts that might follow, are read from a
cache that holds the text alone: one `branch` reads the new tokens and what hangs below
them, and only the tokens are kept.

Shapes: B rows, N tokens (or nodes) of this call, M nodes below each, G tokens whose
trees are read at a time, O outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.lm import LM

Read = Callable[[jax.Array], Any]  # outputs [B, G, M, O] -> any tree of [B, G, ...]


class Hanging(NamedTuple):
    """An LM that also reads what hangs below its tokens."""

    room: int  # slots that a state needs beside those of the LM
    # (params, state, tokens [B, N], below [B, N, M], read) -> (what is read, state)
    extend: Callable[..., tuple[Any, Any]]
    # (params, state, tokens [B, N], parents [B, N], below [B, N, M], read) -> the same
    branch: Callable[..., tuple[Any, Any]]


def hanging(lm: LM, shape: Sequence[int], group: int) -> Hanging:
    """Reads an LM's outputs in a tree of one shape below every token.

    A call of at most G tokens is one `branch`, of `N (1 + M)` nodes, which also makes
    the new state. A wider one reads its tokens plainly, and the trees of G tokens at a
    time from a copy of the state; where nobody looks at what is read there, as in a
    prefill, the copy and the trees are not computed at all.

    Args:
      lm: any LM.
      shape: the parent of each of the M nodes, an earlier node, or -1 for the token
        that the tree hangs from.
      group: G.

    Raises:
      ValueError: for a group below 1, or a parent that is not an earlier node.

    >>> from collab_jax.models import table
    >>> lm = table.language_model(1)
    >>> params = table.init(jax.random.key(0), 3, 1)
    >>> pairs = hanging(lm, (-1, 0), 1)  # two tokens, one after the other
    >>> state = lm.init(params, 1, 1 + pairs.room)
    >>> found, state = pairs.extend(params, state, jnp.array([[0]]),
    ...     jnp.array([[[1, 2]]]), lambda logits: logits)
    >>> bool((found[0, 0] == params[1:3]).all()), state.length.tolist()
    (True, [1])
    """
    if group < 1:
        raise ValueError(f"{group} tokens at a time: at least one is expected")
    wrong = [p for i, p in enumerate(shape) if not -1 <= p < i]
    if wrong:
        raise ValueError(f"parents {wrong} in {tuple(shape)}: -1 or an earlier node")
    size, inside = len(shape), np.asarray(shape, np.int32)

    def one_pass(params, state, tokens, parents, below, chosen, read):
        """The trees of some tokens, and the state after the branch."""
        batch, nodes = tokens.shape
        picked = below[:, chosen]  # [B, G, M]
        first = nodes + size * np.arange(len(chosen), dtype=np.int32)[:, None]
        up = jnp.where(inside < 0, chosen[:, None], first + inside)  # [G, M]
        up = jnp.broadcast_to(up.reshape(-1), (batch, up.size)).astype(parents.dtype)
        tokens = jnp.concatenate([tokens, picked.reshape(batch, -1)], axis=1)
        parents = jnp.concatenate([parents, up], axis=1)
        out, state = lm.branch(params, state, tokens, parents)
        found = out.logits[:, nodes:]
        return read(found.reshape(*picked.shape, found.shape[-1])), state

    def passes(params, state, tokens, parents, below, read):
        """The trees of all tokens, on a copy of the state."""
        batch, nodes = tokens.shape
        nothing = jnp.zeros(batch, jnp.int32)

        def some(state, start):
            chosen = jnp.minimum(start + jnp.arange(group), nodes - 1)
            found, state = one_pass(params, state, tokens, parents, below, chosen, read)
            return lm.prune(state, nothing[:, None], nothing), found

        def laid_out(leaf):  # [passes, B, G, ...] -> [B, N, ...]
            leaf = jnp.moveaxis(leaf, 0, 1)
            return leaf.reshape(batch, -1, *leaf.shape[3:])[:, :nodes]

        _, found = jax.lax.scan(some, state, jnp.arange(0, nodes, group))
        return jax.tree.map(laid_out, found)

    def extend(params, state, tokens, below, read):
        batch, nodes = tokens.shape
        chain = jnp.broadcast_to(jnp.arange(nodes) - 1, (batch, nodes))
        if nodes > group:
            found = passes(params, state, tokens, chain, below, read)
            return found, lm.extend(params, state, tokens)[1]
        every = jnp.arange(nodes)
        found, state = one_pass(params, state, tokens, chain, below, every, read)
        return found, lm.prune(state, chain + 1, jnp.full(batch, nodes, jnp.int32))

    def branch(params, state, tokens, parents, below, read):
        if tokens.shape[1] > group:
            found = passes(params, state, tokens, parents, below, read)
            return found, lm.branch(params, state, tokens, parents)[1]
        every = jnp.arange(tokens.shape[1])
        return one_pass(params, state, tokens, parents, below, every, read)

    return Hanging(group * size, extend, branch)
