"""Targets of which the draft is a component: its outputs and its state are shared.

An ensemble of a large and a small model, a contrast of both, a proxy-tuned model whose
expert drafts: the draft has read every token already, so the target need not. Build the
target's LM as ever, with `component(vocab)` in the place of the member that drafts and
`Drafted()` in the place of its parameters; any pool and any warp may stand above it.
`reuse` makes a target of it, which puts the draft's outputs there.

What is shared are the member's own logits. If the draft's law is a warped one, wrap the
member in `remembered` below the warp.

Shapes: B rows, T tokens of a call, N tokens of a draft, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.cooperate.efficient.target import Target, on_lm
from collab_jax.lm import LM, Out


class Drafted(NamedTuple):
    """The parameters of a `component`: what the draft found, put there by `reuse`."""

    logits: Any = None  # [B, 1 + N, V]; None where no output is read


class Remembered(NamedTuple):
    """Features that carry the logits of a member through the warps above it."""

    logits: jax.Array  # [B, T, V]
    features: Any


def component(vocab: int) -> LM:
    """A member without a state, whose logits are its parameters.

    Args:
      vocab: V.

    >>> lm = component(2)
    >>> z = jnp.array([[[1.0, 2.0]]])
    >>> lm.extend(Drafted(z), lm.init(Drafted(), 1, 8), jnp.array([[0]]))[0].logits
    Array([[[1., 2.]]], dtype=float32)
    """

    def read(params, tokens):
        if params.logits is None:  # prefill: the outputs are not read
            return Out(jnp.zeros((*tokens.shape, vocab)))
        found = params.logits.shape
        if found != (*tokens.shape, vocab):
            raise ValueError(
                f"the draft's logits of shape {found} were handed to a component over "
                f"{vocab} tokens, for [B, T] = {tokens.shape} tokens of this call"
            )
        return Out(params.logits)

    return LM(
        init=lambda params, batch, capacity: (),
        extend=lambda params, state, tokens: (read(params, tokens), state),
        rewind=lambda state, count: state,
        take=lambda state, rows: state,
        branch=lambda params, state, tokens, parents: (read(params, tokens), state),
        prune=lambda state, path, count: state,
    )


def remembered(lm: LM) -> LM:
    """The same LM; its features carry its logits, so that a warp above keeps them.

    Args:
      lm: the member that the draft and the target share.

    >>> from collab_jax import warp
    >>> from collab_jax.models import table
    >>> lm = warp.warp(remembered(table.language_model(1)), warp.greedy())
    >>> params = table.init(jax.random.key(0), 3, 1)
    >>> out, _ = lm.extend(params, lm.init(params, 1, 2), jnp.array([[1]]))
    >>> bool((out.features.logits[0, 0] == params[1]).all())
    True
    """

    def keep(result):
        out, state = result
        return Out(out.logits, Remembered(out.logits, out.features)), state

    def extend(params, state, tokens):
        return keep(lm.extend(params, state, tokens))

    def branch(params, state, tokens, parents):
        return keep(lm.branch(params, state, tokens, parents))

    return lm._replace(extend=extend, branch=branch)


def reuse(lm: LM, chunk: int | None = None) -> Target:
    """A target in which the draft's own outputs take part: `v_i = f(p_i, q_i)`.

    The draft has to hand over its outputs at all N tokens and at the pending one:
    `draft_lm(..., whole=True)`. They are its logits, or those of the `remembered`
    members below its warps; the first of these fills the first `Drafted()` in the
    parameters, and so on.

    Args:
      lm: any LM with `component(vocab)` among its members; its parameters have
        `Drafted()` in their places.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Raises:
      ValueError: when first called, if the draft has no outputs, or their number does
        not fit.

    Source: collaborative decoding via speculation, arXiv 2502.01662.

    >>> from collab_jax import combine, pool
    >>> from collab_jax.cooperate.efficient.draft_model import draft_lm
    >>> from collab_jax.cooperate.efficient.speculate import speculate
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 5, 1)
    >>> both = combine.product([lm, component(5)], pool.mixture(0.7, 0.3))
    >>> decoder = speculate(reuse(both), draft_lm(lm, 3, whole=True), 8)
    >>> result = run(decoder, ((params, Drafted()), params), *pad([[1, 2]]),
    ...     jax.random.key(0))
    >>> result.length.tolist(), result.info.calls.tolist()
    ([10], [2])
    """
    plain = on_lm(lm, chunk)

    def score(params, state, draft: Draft, pending):
        return plain.score(_filled(params, draft), state, draft, pending)

    return plain._replace(score=score)


def _filled(params, draft: Draft):
    if draft.out is None:
        raise ValueError(
            "the target reuses the draft's outputs, and the draft has none: propose "
            "with draft_lm(..., whole=True)"
        )
    found = _all(draft.out, Remembered)
    logits = [one.logits for one in found] or [draft.out.logits]
    places = len(_all(params, Drafted))
    if places != len(logits):
        raise ValueError(
            f"the draft hands over the logits of {len(logits)} members, and the "
            f"target's parameters have {places} places Drafted(): one each is expected"
        )
    given = iter(logits)

    def fill(leaf):
        return Drafted(next(given)) if isinstance(leaf, Drafted) else leaf

    return jax.tree.map(fill, params, is_leaf=lambda leaf: isinstance(leaf, Drafted))


def _all(tree, kind) -> list:
    """The nodes of a kind, in the tree's order."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]
