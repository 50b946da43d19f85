"""EVA: members whose output embeddings were aligned add what they say of the text.

Shapes: N members, U tokens of one, V of the text, K matches of a token, S likeliest
tokens of a member; `...` any leading axes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from collab_jax.combine import product
from collab_jax.ensemble.vocabulary.alignment import Alignment
from collab_jax.ensemble.vocabulary.lift import Lift
from collab_jax.ensemble.vocabulary.union import check_bridges
from collab_jax.law import best, log_probs
from collab_jax.lm import LM
from collab_jax.pool import Pool, mixture
from collab_jax.translate import Bridge, spelled


def likeliest(top: int = 320) -> Lift:
    """The law of the S likeliest tokens alone, of a member in the text's own tokens.

    Args:
      top: S.

    >>> jnp.exp(likeliest(2)(jnp.log(jnp.array([0.6, 0.3, 0.1])))).round(3).tolist()
    [0.667, 0.333, 0.0]
    """

    def lift(logits):
        best, _ = jax.lax.top_k(logits, min(top, logits.shape[-1]))
        few = logits < best[..., -1:]  # not for a NaN, which stays
        return log_probs(jnp.where(few, -jnp.inf, logits))

    return lift


def aligned(alignment: Alignment, vocab: int, top: int = 320) -> Lift:
    """Every token gives its mass to its matches, in proportion to their scores.

        q[v] = sum_{u, k: match[u, k] = v} score[u, k] softmax(z[S likeliest])[u]

    The scores do not add up to 1, so neither does the law: a member that speaks of
    tokens without matches says little.

    Args:
      alignment: of the member's tokens with the text's.
      vocab: V.
      top: S.

    Raises:
      ValueError: when called with logits of another vocabulary.

    Source: arXiv 2404.09492.

    >>> found = Alignment(jnp.array([[0, 1], [1, 0]]), jnp.array([[0.5, 0.25], [1, 0]]))
    >>> jnp.exp(aligned(found, 2)(jnp.log(jnp.array([0.8, 0.2])))).round(3).tolist()
    [0.4, 0.4]
    """

    def lift(logits):
        if logits.shape[-1] != (known := alignment.match.shape[0]):
            raise ValueError(
                f"logits over {logits.shape[-1]} tokens for an alignment of {known}: "
                "make it from the output embeddings of this model"
            )
        best, token = jax.lax.top_k(logits, min(top, known))
        share = jnp.exp(log_probs(best))[..., None] * alignment.score[token]
        at = alignment.match[token]
        lead = logits.shape[:-1]

        def one_row(at, share):
            return jnp.zeros(vocab, share.dtype).at[at].add(share)

        rows = jax.vmap(one_row)(
            at.reshape(-1, at.shape[-2] * at.shape[-1]),
            share.reshape(-1, at.shape[-2] * at.shape[-1]),
        ).reshape(*lead, vocab)
        empty = rows == 0.0
        return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, rows)))

    return lift


def added(
    lifts: Sequence[Lift], *weights: float | jax.Array, agree: int | None = None
) -> Pool:
    """The sum of what the members' lifts give: `p[v] = sum_n w[n] exp(lift_n(z_n))[v]`.

    Unlike in `pool.mixture` a member whose law lost mass on the way counts for less.

    Args:
      lifts: N, one for each member.
      *weights: one number >= 0 a member; none for equal weights.
      agree: leave out a member whose best token is none of the best `agree` of any
        other member, unless that leaves out all. None keeps every member.

    Raises:
      ValueError: for `agree` < 1 or negative weights; when called, for lifts or weights
        that do not fit the members.

    Source: arXiv 2404.09492.

    >>> z = jnp.log(jnp.array([0.6, 0.4, 0.0])), jnp.log(jnp.array([0.2, 0.7, 0.1]))
    >>> lifts = [likeliest()] * 2
    >>> jnp.exp(added(lifts)(z)).round(3).tolist()
    [0.4, 0.55, 0.05]
    >>> third = jnp.log(jnp.array([0.0, 0.1, 0.9]))
    >>> jnp.exp(added([*lifts, likeliest()], agree=2)([*z, third])).round(3).tolist()
    [0.4, 0.55, 0.05]
    """
    if agree is not None and agree < 1:
        raise ValueError(f"agree = {agree}: at least the best token is expected")
    mixture(*weights)  # refuses negative ones

    def pool(members):
        count = len(members)
        share = weights or (1.0 / count,) * count
        if len(lifts) != count or len(share) != count:
            raise ValueError(
                f"{len(lifts)} lifts and {len(share)} weights for {count} members: "
                "give one each"
            )
        pairs = zip(lifts, members, strict=True)
        laws = jnp.stack([jnp.exp(lift(z)) for lift, z in pairs])  # [N, ..., V]
        each = jnp.stack(
            [jnp.broadcast_to(jnp.asarray(w), (*laws.shape[1:-1], 1)) for w in share]
        )
        if agree is not None and count > 1:
            each = _agreeing(laws, each, agree)
        total = (each * laws).sum(0)
        empty = total == 0.0
        return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)))

    return pool


def _agreeing(laws: jax.Array, weights: jax.Array, agree: int) -> jax.Array:
    """The weights without members whose best token no other member has in mind."""
    count = laws.shape[0]
    first = best(laws)[..., None]  # [N, ..., 1]
    heard = jnp.zeros(weights.shape, bool)
    for n in range(count):
        for m in range(count):
            if m != n:
                there = jnp.take_along_axis(laws[m], first[n], axis=-1)
                rank = (laws[m] > there).sum(-1, keepdims=True)
                heard = heard.at[n].set(heard[n] | (there > 0) & (rank < agree))
    heard |= jnp.isnan(laws).any(-1, keepdims=True)  # stays visible
    left = jnp.where(heard, weights, 0.0)
    left = jnp.where(left.sum(0) > 0, left, weights)
    total = left.sum(0)
    return left * weights.sum(0) / jnp.where(total == 0, 1.0, total)


def eva(
    members: Sequence[LM],
    bridges: Sequence[Bridge],
    alignments: Sequence[Alignment | None],
    *weights: float | jax.Array,
    top: int = 320,
    agree: int | None = 5,
    ratio: float = 2.0,
) -> LM:
    """An ensemble of models whose output embeddings were aligned, see `added`.

    Args:
      members: N LMs, each over its own vocabulary.
      bridges: N, from the tokens of the text to those of each member.
      alignments: N, of each member's tokens with the text's; None where they are the
        same tokens.
      *weights: one number >= 0 a member; none for equal weights.
      top: likeliest tokens of a member that count.
      agree: see `added`.
      ratio: room of each member, see `translate.spelled`.

    Returns:
      An LM over the tokens of the text, whose parameters are the tuple of the members'.

    Raises:
      ValueError: as `added` and `translate.spelled`.

    Source: arXiv 2404.09492.

    >>> from collab_jax.models import table
    >>> from collab_jax.translate import from_spellings
    >>> same = from_spellings([[0], [1]], 2)
    >>> swap = Alignment(jnp.array([[1], [0]]), jnp.ones((2, 1)))
    >>> lm = eva([table.language_model(0)] * 2, [same] * 2, [None, swap])
    >>> params = jnp.log(jnp.array([[0.8, 0.2]])), jnp.log(jnp.array([[0.4, 0.6]]))
    >>> out, _ = lm.extend(params, lm.init(params, 1, 2), jnp.array([[0]]))
    >>> jnp.exp(out.logits[0, 0]).round(3).tolist()
    [0.7, 0.3]
    """
    vocab = check_bridges(len(members), bridges)
    if len(alignments) != len(members):
        raise ValueError(
            f"{len(alignments)} alignments for {len(members)} members: one each is "
            "expected, None where the tokens are the text's"
        )
    lifts = [
        likeliest(top) if each is None else aligned(each, vocab, top)
        for each in alignments
    ]
    parts = zip(members, bridges, strict=True)
    return product(
        [spelled(lm, bridge, ratio) for lm, bridge in parts],
        added(lifts, *weights, agree=agree),
    )
