"""Fusion of a model that was made for a task with a language model that is told of it.

A translation model reads the source text, the language model a prompt with the source,
examples and context in it; both write the same text, token by token.

Shapes: B rows, P tokens of a prompt, V vocabulary of the text.
"""

from collections.abc import Sequence

import jax

from collab_jax.combine import prefixed, product
from collab_jax.decoder import pad
from collab_jax.ensemble.vocabulary.union import check_bridges, union
from collab_jax.lm import LM, Params
from collab_jax.pool import mixture
from collab_jax.translate import Bridge


def fused(
    task: LM,
    model: LM,
    weight: float | jax.Array,
    *,
    bridges: Sequence[Bridge] = (),
    start: int | None = None,
    ratio: float = 2.0,
    chunk: int | None = None,
) -> LM:
    """The mean of a task model and a language model with a prompt of its own.

        p(v | y) = w p_task(v | source, y) + (1 - w) p_model(v | prompt, y)

    The text that both write begins with one start token. The language model reads it as
    the last token of its prompt, a translator as its own start. `beam.search` over it
    is the paper's decoding.

    Args:
      task: e.g. `models.marian.translator(config)`, or `prefixed(lm)`.
      model: any LM.
      weight: w in [0, 1]; 1 is the task model, 0 the language model. Tuned on a few
        texts.
      bridges: none for one vocabulary, as in the paper; else two, from the tokens of
        the text to those of each, with which the mean is that of `union`.
      start: with bridges: the token that every text begins with.
      ratio: room of members with bridges, see `translate.spelled`.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      An LM whose parameters are `(task's, (model's, prompts[B, P], length[B]))`, see
      `prompted`.

    Raises:
      ValueError: for a weight outside of [0, 1], bridges without a start, or bridges
        that do not fit; when first called, for unequal vocabularies without bridges.

    Source: arXiv 2311.08306.

    >>> import jax.numpy as jnp
    >>> from collab_jax.models import table
    >>> lm = fused(table.language_model(0), table.language_model(0), 0.25)
    >>> laws = jnp.log(jnp.array([[0.8, 0.2]])), jnp.log(jnp.array([[0.4, 0.6]]))
    >>> params = prompted(*laws, [[1, 1, 0]])
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[0]]))
    >>> jnp.exp(out.logits[0, 0]).round(3).tolist()
    [0.5, 0.5]
    """
    if not isinstance(weight, jax.core.Tracer) and not 0 <= float(weight) <= 1:
        raise ValueError(f"weight = {weight} was given, a number in [0, 1] is expected")
    members = task, prefixed(model, chunk)
    shares = weight, 1 - weight
    if not bridges:
        return product(members, mixture(*shares))
    vocab = check_bridges(2, bridges)
    if start is None or not 0 <= start < vocab:
        raise ValueError(
            f"start = {start}: with bridges, the token that every text begins with is "
            f"expected, 0 to {vocab - 1}"
        )
    # one token, whatever it is: each member reads another in its place
    begun = [b._replace(size=b.size.at[start].set(1)) for b in bridges]
    return union(members, begun, *shares, ratio=ratio)


def prompted(
    task: Params, model: Params, prompts: Sequence[Sequence[int]]
) -> tuple[Params, tuple[Params, jax.Array, jax.Array]]:
    """The parameters of `fused`.

    Args:
      task: of the task model, its source texts included.
      model: of the language model.
      prompts: B prompts in its tokens, of at least one each.

    Raises:
      ValueError: for an empty prompt.

    >>> task, (model, tokens, length) = prompted((), (), [[1, 2], [3]])
    >>> tokens.tolist(), length.tolist()
    ([[1, 2], [3, 0]], [2, 1])
    """
    return task, (model, *pad(prompts))
