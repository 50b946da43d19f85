"""Greedy verification: the tokens that greedy decoding would have taken.

Shapes: B rows, N nodes of a draft, V vocabulary.
"""

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient import tree
from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.cooperate.efficient.verify import (
    Verifier,
    chain,
    check_draft,
    offered,
)
from collab_jax.lm import Out


def greedy() -> Verifier:
    """Keeps drafted tokens as long as they are the likeliest of the target.

    In a tree it goes down where a child is the likeliest token.

    The text is that of `decode.greedy(target)`, whatever the draft and however it was
    drawn, up to ties within rounding; and as there, log-probs are those of the target's
    own law. (Any lossless verifier of a target warped by `warp.greedy` gives the same
    text, in a law in which every token has probability 1.)

    Source: blockwise parallel decoding with exact match, arXiv 1811.03115.

    >>> logits = jnp.array([[[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 2.0]]])
    >>> draft = Draft(jnp.array([[1, 2]]), jnp.array([2]))
    >>> verified = greedy().verify(None, None, Out(logits), draft)
    >>> verified.tokens.tolist(), verified.accepted.tolist()
    ([[1, 0, 0]], [1])
    """

    def verify(key, length, out: Out, draft: Draft):
        check_draft(out.logits, draft)
        tokens = law.best(out.logits)
        place = _place(draft, tokens)
        own = jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0]
        if draft.parents is None:
            return chain(draft, out, place, own)
        return tree.kept(draft, out, place, own)

    def outcomes(logits, draft):
        check_draft(logits, draft)
        tokens = law.best(logits)
        here = jnp.arange(logits.shape[1]) == _place(draft, tokens)[:, None]
        return jax.nn.one_hot(tokens, logits.shape[-1]) * here[:, :, None]

    return Verifier(verify, outcomes)


def _place(draft: Draft, tokens: jax.Array) -> jax.Array:
    """Where the kept tokens end; of a chain, their number."""
    if draft.parents is not None:
        return tree.follow(draft, tokens)
    same = (tokens[:, :-1] == draft.tokens) & offered(draft)
    return jnp.cumprod(same, axis=1).sum(-1, dtype=jnp.int32)
