"""Context-aware decoding: what the context says counts for more than what memory says.

One model reads two prompts, with the context and without it, and both members go on
with the same text. Both prompts are the members' own (`combine.prefixed`); the text
that they share begins with one start token, which each reads as the last token of its
prompt.

Shapes: B rows, P tokens of the longest prompt, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from collab_jax.combine import prefixed, stacked
from collab_jax.cooperate.efficient.distill import jensen_shannon
from collab_jax.cooperate.transfer.gate import gated
from collab_jax.decoder import pad
from collab_jax.lm import LM, Params
from collab_jax.pool import Pool, linear


def contextual(lm: LM, pool: Pool, chunk: int | None = None) -> LM:
    """One model under two prompts, as one LM: the members are (with, without).

    Args:
      lm: any LM.
      pool: of the two laws: `cad(alpha)`, `adacad()`.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      An LM whose parameters are those of `contexts`.

    >>> from collab_jax import decode
    >>> from collab_jax.models import table
    >>> own = table.init(jax.random.key(0), vocab=5, order=2)
    >>> params = contexts(own, [[1, 2, 3], [4, 4]], [[3], [4]])
    >>> start, length = decode.pad([[0], [0]])
    >>> lm = contextual(table.language_model(2), cad(0.5))
    >>> found = decode.run(decode.greedy(lm, 3), params, start, length,
    ...     jax.random.key(0))
    >>> found.length.tolist()
    [4, 4]
    """
    return stacked(prefixed(lm, chunk), 2, pool, axes=(None, 0, 0))


def contexts(
    params: Params,
    with_context: Sequence[Sequence[int]],
    without: Sequence[Sequence[int]],
) -> tuple[Params, jax.Array, jax.Array]:
    """The parameters of `contextual`: the model's, and the prompts of both members.

    Args:
      params: of the model.
      with_context: B prompts of token ids, context and question.
      without: B prompts, the question alone; at least the start-of-text token.

    Returns:
      The parameters, tokens `[2, B, P]` and lengths `[2, B]`.

    Raises:
      ValueError: for other numbers of prompts with than without, or an empty prompt.

    >>> _, tokens, length = contexts((), [[1, 2, 3], [4, 4]], [[3], [4]])
    >>> tokens.shape, length.tolist()
    ((2, 2, 3), [[3, 2], [1, 1]])
    """
    if len(with_context) != len(without):
        raise ValueError(
            f"{len(with_context)} prompts with a context and {len(without)} without: "
            "one of each is expected for every row"
        )
    tokens, length = pad([*with_context, *without])
    shape = 2, len(without)
    return params, tokens.reshape(*shape, -1), length.reshape(shape)


def cad(alpha=0.5) -> Pool:
    """Context-aware decoding of (with, without): the context's influence, amplified.

    `log p = (1 + alpha) log p(. | c, x) - alpha log p(. | x)`, up to a constant.

    Args:
      alpha: strength; in the paper 0.5 for summaries and 1 where context and memory
        conflict. 0 is the model with the context, -1 the one without.

    Source: arXiv 2305.14739.

    >>> with_it, without = jnp.log(jnp.array([[[[0.6, 0.4]]], [[[0.9, 0.1]]]]))
    >>> jax.nn.softmax(cad(1.0)([with_it, without]))[0, 0].tolist()
    [0.2, 0.8]
    """
    return linear(1 + alpha, -alpha)


def adacad(least=0.0, scale=1.0) -> Pool:
    """Context-aware decoding whose strength is the conflict of context and memory.

    `alpha = max(least, scale * JSD(p(. | c, x), p(. | x)))` at every place, then `cad`.
    Where both agree, nothing is amplified.

    Args:
      least: least strength.
      scale: 1 for a divergence in nats, of log 2 at most, as in public code; `1 / log
        2` for one in bits, of 1 at most.

    Source: arXiv 2409.07394.

    >>> with_it, without = jnp.log(jnp.array([[[[0.6, 0.4]]], [[[0.9, 0.1]]]]))
    >>> jax.nn.softmax(adacad()([with_it, without]))[0, 0].tolist()
    [0.5725, 0.4275]
    >>> jax.nn.softmax(adacad()([with_it, with_it]))[0, 0].tolist()
    [0.6, 0.4]
    """
    divergence = jensen_shannon()

    def strength(with_context: jax.Array, without: jax.Array) -> jax.Array:
        conflict = scale * divergence(with_context, without)
        return jnp.maximum(least, conflict)[..., None]

    return gated(strength, cad)
