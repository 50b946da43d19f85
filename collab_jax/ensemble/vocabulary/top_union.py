"""UniTE: the mean of the members' laws over the union of their likeliest tokens.

Shapes: B rows, T tokens of this call, N members, K likeliest tokens of each, V tokens
of the text, U of a member.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from collab_jax.combine import product
from collab_jax.ensemble.vocabulary.union import check_bridges
from collab_jax.lm import LM
from collab_jax.pool import Pool, mixture
from collab_jax.translate import Bridge, spelled


def tops(bridges: Sequence[Bridge], *weights: float | jax.Array, top: int = 10) -> Pool:
    """The pool of UniTE, over members of unequal vocabularies.

    The candidates are the K likeliest tokens of every member, each once. A member gives
    a candidate the logit of its own token for it, and if it has none, of the first
    token of its spelling, and its law is the softmax over the candidates:

        s_n[c] = z_n[spelling_n[c, 0]],   p[c] = sum_n w[n] softmax(s_n)[c]

    Several candidates may begin with one token of a member; each has its logit. Every
    other token is forbidden. A member's -inf puts no token forward, and is probability
    0 for it.

    Args:
      bridges: N, from the tokens of the text to those of each member.
      *weights: one number >= 0 a member; none for equal weights.
      top: K.

    Raises:
      ValueError: for no candidates, bridges that do not fit each other, or negative
        weights; when called, for members that do not fit the bridges.

    Source: arXiv 2410.03777.

    >>> from collab_jax.translate import from_spellings
    >>> bridges = [from_spellings([[0], [1], [1]], 2, aliases=[2]),  # a, b, c in a, b
    ...            from_spellings([[0], [1], [2]], 3)]
    >>> z = jnp.log(jnp.array([0.8, 0.2])), jnp.log(jnp.array([0.2, 0.5, 0.3]))
    >>> jnp.exp(tops(bridges, top=1)(z)).round(3).tolist()  # a and b are candidates
    [0.543, 0.457, 0.0]
    """
    if top < 1:
        raise ValueError(f"top = {top}: at least one token of each member is expected")
    vocab = check_bridges(len(bridges), bridges)
    mean = mixture(*weights)

    def pool(members):
        check_bridges(len(members), bridges)
        chosen = []
        for z, bridge in zip(members, bridges, strict=True):
            if z.shape[-1] != (known := bridge.pivot.shape[0]):
                raise ValueError(
                    f"a member of {z.shape[-1]} tokens for a bridge to {known}: make "
                    "the bridge for this model, with as many rows as it has logits"
                )
            best, token = jax.lax.top_k(z, min(top, known))
            home = bridge.pivot[token]
            chosen.append(jnp.where(jnp.isneginf(best) | (home < 0), vocab, home))
        candidate = jnp.concatenate(chosen, axis=-1)  # [B, T, N K]; V = none
        candidate = jnp.where(_repeated(candidate), vocab, candidate)
        absent = candidate == vocab
        safe = jnp.where(absent, 0, candidate)
        scores = [
            jnp.where(
                absent,
                -jnp.inf,
                jnp.take_along_axis(z, bridge.spelling[safe, 0], axis=-1),
            )
            for z, bridge in zip(members, bridges, strict=True)
        ]
        law = mean(scores)
        nothing = jnp.full((*law.shape[:-1], vocab), -jnp.inf, law.dtype)
        return jnp.put_along_axis(
            nothing, candidate, law, axis=-1, inplace=False, mode="drop"
        )

    return pool


def _repeated(candidate: jax.Array) -> jax.Array:
    """Which candidates stand earlier in their row as well."""
    same = candidate[..., :, None] == candidate[..., None, :]
    return jnp.tril(same, -1).any(-1)


def top_union(
    members: Sequence[LM],
    bridges: Sequence[Bridge],
    *weights: float | jax.Array,
    top: int = 10,
    ratio: float = 2.0,
) -> LM:
    """An ensemble over the union of the members' likeliest tokens, see `tops`.

    Every member reads the text on its own cache, spelled in its tokens.

    Args:
      members: N LMs, each over its own vocabulary.
      bridges: N, from the tokens of the text to those of each member:
        `collab_jax.io.union.unite`.
      *weights: one number >= 0 a member; none for equal weights.
      top: K, likeliest tokens of each member.
      ratio: room of each member, see `translate.spelled`.

    Returns:
      An LM over the tokens of the text, whose parameters are the tuple of the members'.

    Raises:
      ValueError: as `tops` and `translate.spelled`.

    Source: arXiv 2410.03777.

    >>> from collab_jax.models import table
    >>> from collab_jax.translate import from_spellings
    >>> same = from_spellings([[0], [1], [2]], 3)
    >>> lm = top_union([table.language_model(0)] * 2, [same] * 2, top=1)
    >>> params = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.0, 2.0, 1.0]])
    >>> out, _ = lm.extend(params, lm.init(params, 1, 2), jnp.array([[2]]))
    >>> jnp.exp(out.logits[0, 0]).tolist()
    [0.0, 0.5, 0.5]
    """
    check_bridges(len(members), bridges)
    parts = zip(members, bridges, strict=True)
    return product(
        [spelled(lm, bridge, ratio) for lm, bridge in parts],
        tops(bridges, *weights, top=top),
    )
