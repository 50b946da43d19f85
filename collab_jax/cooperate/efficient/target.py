"""The law that the text is to follow: `Target`, and targets made of LMs.

Shapes: B rows, N tokens of a draft, D tokens of a path, V vocabulary, P longest prompt.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.lm import LM, Out, Params, State, padded, prefill


class Target(NamedTuple):
    """What scores a draft: an LM, or a law in which the draft's own outputs take part.

    Before a round the state has consumed `length - 1` tokens of every row.
    """

    # (params, prompt [B, P], prompt_length [B], room) -> state that has consumed all
    # but the last token of each prompt; the text may become P + room tokens long
    init: Callable[[Params, jax.Array, jax.Array, int], State]
    # (params, state, draft, pending [B]) -> (out, state): outputs behind the pending
    # token and behind every node, [B, 1 + N, ...]
    score: Callable[[Params, State, Draft, jax.Array], tuple[Out, State]]
    # (state, count [B]) -> state: after a chain, forgets the last count[b] of the
    # 1 + N tokens
    rewind: Callable[[State, jax.Array], State]
    # (state, path [B, D + 1], count [B]) -> state: after a tree, keeps the first
    # count[b] nodes of the path, where node 0 is the pending token
    prune: Callable[[State, jax.Array, jax.Array], State]


def on_lm(lm: LM, chunk: int = 128) -> Target:
    """The laws of any LM as the target: `v_i = p(. | x_<i)`.

    Args:
      lm: any LM, warps and combinators included; it is extended by 1 + N tokens a
        round, or branched if the draft is a tree.
      chunk: prompt tokens consumed by one call.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 3, 1)
    >>> target = on_lm(lm)
    >>> state = target.init(params, jnp.array([[0, 2]]), jnp.array([2]), 4)
    >>> draft = Draft(jnp.array([[1, 1]]), jnp.array([2]))
    >>> out, state = target.score(params, state, draft, jnp.array([2]))
    >>> bool((out.logits[0] == params[jnp.array([2, 1, 1])]).all())
    True
    """

    def init(params, prompt, prompt_length, room):
        batch, width = prompt.shape
        capacity = max(width + room, padded(width - 1, chunk))
        state = lm.init(params, batch, capacity)
        return prefill(lm, params, state, prompt[:, :-1], prompt_length - 1, chunk)

    def score(params, state, draft, pending):
        tokens = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
        if draft.parents is None:
            return lm.extend(params, state, tokens)
        parents = jnp.pad(draft.parents + 1, ((0, 0), (1, 0)), constant_values=-1)
        return lm.branch(params, state, tokens, parents)

    return Target(init, score, lm.rewind, lm.prune)
