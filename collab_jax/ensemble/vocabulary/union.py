"""GaC: the mean of the members' laws over the union of their vocabularies.

Shapes: N members, V tokens of the union, U of a member.
"""

from collections.abc import Sequence

import jax

from collab_jax.combine import product
from collab_jax.ensemble.vocabulary.lift import carry
from collab_jax.lm import LM
from collab_jax.pool import mixture
from collab_jax.translate import Bridge, spelled
from collab_jax.warp import warp


def union(
    members: Sequence[LM],
    bridges: Sequence[Bridge],
    *weights: float | jax.Array,
    ratio: float = 2.0,
) -> LM:
    """The mean of laws over a union of vocabularies, at every token.

        p[v] = sum_n w[n] sum_{u: home_n[u] = v} softmax(z_n)[u]

    with `home_n` the `pivot` of the n-th bridge. A token that only one member has is
    spelled for the others in their own tokens (`translate.spelled`), as it will be read
    if it is chosen; they give it no probability. In a union every token has a home, so
    that no mass is lost; with bridges from one member's vocabulary, mass on tokens that
    it lacks is dropped and the rest renormalised, as `translate` does. So are rows of
    a model beyond its tokenizer.

    Args:
      members: N LMs, each over its own vocabulary.
      bridges: N, from the tokens of the text to those of each member:
        `collab_jax.io.union.unite`.
      *weights: one number >= 0 a member; none for equal weights.
      ratio: room of each member, see `translate.spelled`.

    Returns:
      An LM over the union, whose parameters are the tuple of the members'.

    Raises:
      ValueError: for bridges that do not fit the members or each other, weights that
        do not fit or are negative, or a ratio that is not positive.

    Source: arXiv 2406.12585.

    >>> import jax.numpy as jnp
    >>> from collab_jax.models import table
    >>> from collab_jax.translate import from_spellings
    >>> ab, ac = table.language_model(0), table.language_model(0)
    >>> bridges = [from_spellings([[0], [1], [1]], 2, aliases=[2]),  # a, b, c in a, b
    ...            from_spellings([[0], [1], [1]], 2, aliases=[1])]  # and in a, c
    >>> params = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.1, 0.9]]))
    >>> lm = union([ab, ac], bridges)
    >>> out, _ = lm.extend(params, lm.init(params, 1, 2), jnp.array([[2]]))
    >>> jnp.exp(out.logits[0, 0]).round(3).tolist()
    [0.3, 0.25, 0.45]
    """
    vocab = check_bridges(len(members), bridges)
    mixture(*weights)  # refuses negative ones before a model is built
    return product(
        [
            warp(spelled(lm, bridge, ratio), carry(bridge.pivot, vocab))
            for lm, bridge in zip(members, bridges, strict=True)
        ],
        mixture(*weights),
    )


def check_bridges(members: int, bridges: Sequence[Bridge]) -> int:
    """Refuses bridges that do not fit; else the number of tokens of the text, V.

    Args:
      members: N.
      bridges: one for each.

    Raises:
      ValueError: naming both sides.

    >>> from collab_jax.translate import from_spellings
    >>> check_bridges(1, [from_spellings([[0], [1], [1]], 2)])
    3
    """
    if len(bridges) != members or not bridges:
        raise ValueError(
            f"{len(bridges)} bridges for {members} members: one each is expected, the "
            "first member's included"
        )
    sizes = [bridge.size.shape[0] for bridge in bridges]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"bridges from vocabularies of {sizes} tokens: the text stands in one, "
            "make them together with collab_jax.io.union.unite"
        )
    return sizes[0]
