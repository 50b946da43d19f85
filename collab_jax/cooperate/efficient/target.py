"""The law that the text is to follow: `Target`, and targets made of LMs.

Shapes: B rows, N tokens of a draft, D tokens of a path, V vocabulary, P longest prompt.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.lm import LM, Out, Params, State, read_prompt


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


class Read(NamedTuple):
    """The state of a target that reads no more of a chain than it has to."""

    inner: State
    unread: jax.Array  # [] int32, of the 1 + N tokens of the last round


def on_lm(lm: LM, chunk: int | None = None, widths: Sequence[int] = ()) -> Target:
    """The laws of any LM as the target: `v_i = p(. | x_<i)`.

    A round is as wide as the longest draft can be, also when little was drafted. With
    `widths` it takes the narrowest that holds what the longest row drafted: on a CPU,
    where 11 tokens cost about three times as much as one, a round without a draft then
    costs one token. Each width is a program of its own inside the loop, and is compiled
    with it.

    Args:
      lm: any LM, warps and combinators included; it is extended by 1 + N tokens a
        round, or branched if the draft is a tree.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.
      widths: of a round of chains, in tokens with the pending one, beside 1 + N; e.g.
        `(1, 4)`. Those above 1 + N are left out.

    Raises:
      ValueError: for a width below 1.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 3, 1)
    >>> target = on_lm(lm)
    >>> state = target.init(params, jnp.array([[0, 2]]), jnp.array([2]), 4)
    >>> draft = Draft(jnp.array([[1, 1]]), jnp.array([2]))
    >>> out, state = target.score(params, state, draft, jnp.array([2]))
    >>> bool((out.logits[0] == params[jnp.array([2, 1, 1])]).all())
    True
    """

    for width in widths:
        if width < 1:
            raise ValueError(f"widths = {tuple(widths)}: numbers from 1 are expected")

    def init(params, prompt, prompt_length, room):
        return read_prompt(lm, params, prompt, prompt_length, room, chunk)

    def score(params, state, draft, pending):
        tokens = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
        if draft.parents is None:
            return lm.extend(params, state, tokens)
        parents = jnp.pad(draft.parents + 1, ((0, 0), (1, 0)), constant_values=-1)
        return lm.branch(params, state, tokens, parents)

    plain = Target(init, score, lm.rewind, lm.prune)
    return _narrowed(lm, plain, widths) if widths else plain


def _narrowed(lm: LM, plain: Target, widths: Sequence[int]) -> Target:
    """A target whose rounds have one of several widths."""

    def init(params, prompt, prompt_length, room):
        inner = plain.init(params, prompt, prompt_length, room)
        return Read(inner, jnp.int32(0))

    def score(params, state, draft, pending):
        if draft.parents is not None:
            out, inner = plain.score(params, state.inner, draft, pending)
            return out, Read(inner, jnp.int32(0))
        tokens = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
        whole = tokens.shape[1]
        sizes = sorted({size for size in widths if size < whole} | {whole})

        counts = jnp.asarray(sizes, jnp.int32)
        which = jnp.searchsorted(counts, 1 + draft.count.max())
        like = jax.eval_shape(lm.extend, params, state.inner, tokens)[0]
        out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        carry = out, state.inner
        for n, size in enumerate(sizes):

            def read(_, carry, size=size):
                out, inner = carry
                new, inner = lm.extend(params, inner, tokens[:, :size])
                return jax.tree.map(lambda x, y: x.at[:, :size].set(y), out, new), inner

            # a loop of one turn or none: a branch would copy the caches
            carry = jax.lax.fori_loop(0, (which == n).astype(jnp.int32), read, carry)
        out, inner = carry
        return out, Read(inner, whole - counts[which])

    def rewind(state, count):
        return Read(lm.rewind(state.inner, count - state.unread), jnp.int32(0))

    def prune(state, path, count):
        return Read(lm.prune(state.inner, path, count), jnp.int32(0))

    return Target(init, score, rewind, prune)
