"""Contrastive decoding: what an expert says and a weaker model would not have said.

The contrast of O'Brien and Lewis (arXiv 2309.09117), `log p_e + beta (log p_e - log
p_a)`, is `pool.contrast`. Here are the first form of the method, its search, and
DExperts.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax

from collab_jax import beam, warp
from collab_jax.decoder import Decoder
from collab_jax.lm import LM
from collab_jax.pool import Pool, linear, plausible


def warped(pool: Pool, *warps: Any) -> Pool:
    """A pool whose members are warped before they are pooled.

    `pool([warp_n(z_n) for each member n])`. Members of a product can be warped LMs as
    well; members of a stack, and those that a draft hands over, cannot.

    Args:
      pool: what joins the warped members.
      *warps: for each member a function of logits from `collab_jax.warp`, or None.

    Raises:
      ValueError: when the warps do not fit the members.

    >>> import jax.numpy as jnp
    >>> first, second = jnp.array([[[1.0, 0.0]]]), jnp.array([[[4.0, 0.0]]])
    >>> pool = warped(linear(1, -1), None, warp.temperature(2.0))
    >>> z = pool([first, second])[0, 0]
    >>> round(float(z[0] - z[1]), 4)  # 1 - 4 / 2
    -1.0
    """

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        if len(members) != len(warps):
            raise ValueError(
                f"{len(warps)} warps for {len(members)} members: give one warp each, "
                "or None"
            )
        pairs = zip(warps, members, strict=True)
        return pool([z if w is None else w(z) for w, z in pairs])

    return pooled


def contrastive(alpha=0.1, strength=1.0, temperature=1.0) -> Pool:
    """The contrastive score of (expert, amateur), over what the expert finds plausible.

    `s(v) = log p_e(v) - strength * log p_a(v)` where `p_e(v) >= alpha max p_e`, else
    -inf, with the amateur at its own temperature. The scores are not normalised, and
    they are meant for `contrastive_search`; a law is made of them by any other decoder.
    The method's code drops the mask when it decodes greedily: that is alpha = 0.

    Args:
      alpha: plausibility, in [0, 1]; 0.1 in the paper.
      strength: factor of the amateur's log-probs; 1 in the paper, 0 is the expert.
      temperature: of the amateur, > 0; in the paper 0.5 for GPT-2 and 1 for OPT.

    Raises:
      ValueError: for knobs out of range; when first called, without two members.

    Source: arXiv 2210.15097, equations 1 to 3.

    >>> import jax.numpy as jnp
    >>> expert, amateur = jnp.log(jnp.array([[[[0.6, 0.39, 0.01]]], [[[0.9, 0.09,
    ...     0.01]]]]))
    >>> contrastive()([expert, amateur])[0, 0].tolist()
    [-0.405, 1.466, -inf]
    """
    amateur = warp.temperature(temperature)
    return plausible(alpha, warped(linear(1, -strength), None, amateur))


def contrastive_search(
    lm: LM, max_new_tokens: int, beams: int = 5, **rest: Any
) -> Decoder:
    """The text of the largest summed contrastive score, by beam search.

    `argmax_y sum_t s(y_t | y_<t)`: the logits of the LM are summed as they are. A
    search over the law that is made of them would pay for log-probs that the amateur
    takes from every token of a place alike, and find other texts.

    The amateur of the paper reads less: where it is to see the last token of the prompt
    alone, give both members prompts of their own with `combine.prefixed`.

    Args:
      lm: `combine.product([expert, amateur], contrastive())`, or any LM of scores.
      max_new_tokens: a beam ends after so many new tokens.
      beams: K.
      **rest: of `beam.search`.

    Returns:
      A decoder, whose scores are sums of contrastive scores.

    Source: arXiv 2210.15097, section 3.

    >>> import jax.numpy as jnp
    >>> from collab_jax import combine, decoder
    >>> from collab_jax.models import table
    >>> tables = [jax.random.normal(jax.random.key(n), (4, 3)) for n in range(2)]
    >>> lm = combine.product([table.language_model(1)] * 2, contrastive())
    >>> prompt, length = decoder.pad([[1], [0, 2]])
    >>> found = decoder.run(contrastive_search(lm, 4), tables, prompt, length,
    ...     jax.random.key(0))
    >>> found.length.tolist()
    [5, 6]
    """
    return beam.search(lm, max_new_tokens, beams, measure=lambda z: z, **rest)


def dexperts(alpha=2.0, p=0.9) -> Pool:
    """DExperts of (base, expert, anti-expert): the base moved to where the two differ.

    `z = z_0 + alpha (z_+ - z_-)` over the nucleus of the base, the rest forbidden.

    Where there is no expert, or no anti-expert, the base takes its place: that is
    `warped(linear(1 + alpha, -alpha), warp.top_p(p), None)` of (base, anti-expert), and
    `warped(linear(1 - alpha, alpha), warp.top_p(p), None)` of (base, expert).

    Args:
      alpha: strength; in the paper 2.0 against toxicity, and 3.2 for sentiment, -3.2
        for the negative one. 0 is the base.
      p: nucleus of the base that is kept, in (0, 1]; 0.9 in the paper, 1 keeps all.

    Raises:
      ValueError: for a p out of range; when first called, without three members.

    Source: arXiv 2105.03023.

    >>> import jax.numpy as jnp
    >>> base, expert = jnp.log(jnp.array([0.5, 0.4, 0.1])), jnp.array([0.0, 1.0, 9.0])
    >>> anti = jnp.zeros(3)
    >>> law = jax.nn.softmax(dexperts(1.0)([base, expert, anti]))
    >>> [round(float(x), 4) for x in law]  # 4 / 5 exp(1) to 1
    [0.315, 0.685, 0.0]
    """
    return warped(linear(1, alpha, -alpha), warp.top_p(p), None, None)
