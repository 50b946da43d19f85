"""A proposer of trees made of any LM.

The pending token is consumed by one call; then every level is one more `branch`, which
reads all nodes again that get children, those of the levels before included. So a tree
of D levels costs D calls, and `sum_d (D - d) n_d` tokens, n_d of the d-th level. That
is what the laws of an LM allow: a branch begins at the prefix, and `prune` keeps a
path. The other way, one row a node, would read each token once and copy the whole cache
for it. Leaves are not read at all, so the widest level is free.

Shapes: B rows, N nodes of the draft, D of its longest path, M nodes that are read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.growth import Growth
from collab_jax.lm import LM, Out, Params, State, read_prompt


class TreeState(NamedTuple):
    """State of `draft_tree`."""

    inner: State  # of the LM; has consumed length - 1 - lag tokens
    lag: jax.Array  # [B] int32, 0 or 1
    place: jax.Array  # [B, N] int32, which node of the last branch a node is, or -1


def draft_tree(lm: LM, growth: Growth, chunk: int | None = None) -> Proposer:
    """Proposes a tree of an LM's tokens.

    With `ranked` and `expanded` the tree is one-hot, and `tree.sampled` verifies it;
    the draft's temperature then only shapes the tree. With `drawn` it has a law, and
    `tree.recursive` verifies it; a target warped by temperature or top-p wants the same
    warps here.

    Args:
      lm: any LM over the target's vocabulary, warped or not.
      growth: `ranked(paths)`, `drawn(paths)` or `expanded(depth, width, nodes)`. (A
        chain reads every token several times here; `draft_lm` does not.)
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      A proposer; its parameters are the LM's.

    Source: arXiv 2305.09781 for trees of a draft model; `growth` has the others.

    >>> from collab_jax.cooperate.efficient.growth import ranked
    >>> from collab_jax.models import table
    >>> lm = table.language_model(1)
    >>> params = jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 2.0], [0] * 3])
    >>> proposer = draft_tree(lm, ranked([(0,), (1,), (0, 0), (1, 0)]))
    >>> tokens, length = jnp.array([[2, 0, 0]]), jnp.array([2])
    >>> state = proposer.init(params, tokens[:, :2], length, 6)
    >>> draft, state = proposer.propose(params, state, tokens, length, None)
    >>> draft.tokens.tolist(), draft.parents.tolist()
    ([[1, 2, 0, 2]], [[-1, -1, 0, 1]])
    """

    def init(params, prompt, prompt_length, room):
        batch = prompt.shape[0]
        room = room + growth.reads
        state = read_prompt(lm, params, prompt, prompt_length, room, chunk)
        place = jnp.full((batch, growth.size), -1, jnp.int32)
        return TreeState(state, jnp.zeros(batch, jnp.int32), place)

    def propose(params, state, tokens, length, key):
        def read(inner, nodes, parents, new):
            if nodes.shape[1] > new:  # there was a branch before
                nothing = jnp.zeros_like(length)
                inner = lm.prune(inner, nothing[:, None], nothing)
            out, inner = lm.branch(params, inner, nodes, parents)
            return out.logits[:, nodes.shape[1] - new :], inner

        out, inner = catch_up(lm, params, state.inner, state.lag, tokens, length)
        draft, place, inner = growth.grow(read, inner, out.logits, key, length)
        return draft, TreeState(inner, state.lag, place)

    def observe(params, state, verified):
        del params
        path = jnp.take_along_axis(state.place, verified.path, axis=1)
        new = verified.count - 1  # nodes that stay; -1 in a row that was done
        read = (path >= 0) & (jnp.arange(path.shape[1]) < new[:, None])
        kept = jnp.cumprod(read, axis=1).sum(-1, dtype=jnp.int32)
        inner = state.inner
        if growth.reads:
            inner = lm.prune(inner, jnp.maximum(path, 0), kept)
        inner = lm.rewind(inner, (new < 0).astype(jnp.int32))
        return TreeState(inner, jnp.maximum(new, 0) - kept, state.place)

    return Proposer(init, propose, observe, growth.size, growth.depth)


def catch_up(
    lm: LM,
    params: Params,
    state: State,
    lag: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
) -> tuple[Out, State]:
    """Consumes the pending token, and before it the one that the LM may lack.

    Args:
      lm: the draft.
      params: its parameters.
      state: has consumed `length - 1 - lag` tokens of every row.
      lag: `[B]` int32, 0 or 1.
      tokens: `[B, L]`, the text.
      length: `[B]`, of the text.

    Returns:
      The outputs behind the pending token `[B, ...]`, and the state that has consumed
      `length` tokens.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 3, 1)
    >>> state, zero = lm.init(params, 1, 4), jnp.array([0])
    >>> text, length = jnp.array([[2, 1]]), jnp.array([1])
    >>> out, state = catch_up(lm, params, state, zero, text, length)
    >>> out.logits.shape, state.length.tolist()
    ((1, 3), [1])
    """
    place = (length - 1 - lag)[:, None] + jnp.arange(2)
    place = jnp.minimum(place, tokens.shape[1] - 1)
    out, state = lm.extend(params, state, jnp.take_along_axis(tokens, place, axis=1))
    rows = jnp.arange(length.shape[0])
    return jax.tree.map(lambda x: x[rows, lag], out), lm.rewind(state, 1 - lag)
