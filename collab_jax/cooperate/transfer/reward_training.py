"""Training of models that judge unfinished texts: rewards and values of prefixes.

Every loss compares what the model says of the beginnings of a text with what became of
the text. A tuner is a `finetune.Finetuner`, so that `finetune.fit` runs it, and what it
trains are the parameters of `models.reward.reward_model`.

Shapes: B rows, T tokens of a row, O outputs, K candidates, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from collab_jax.cooperate.transfer.hanging import hanging
from collab_jax.finetune import Finetuner, descent
from collab_jax.law import log_probs
from collab_jax.lm import LM, Backbone, Params
from collab_jax.models.heads import Head
from collab_jax.models.reward import outputs, reward_model


class Labelled(NamedTuple):
    """Rows of text, which of their beginnings count, and what became of them."""

    tokens: Any  # [B, T] int32, right-padded
    weights: Any  # [B, T] float32; 0 for what is not judged: prompts, padding
    labels: Any  # [B, O] or [B] float32


Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def cumulative(said: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The loss of RAD: a text's later beginnings count for more.

    `mean_b sum_t t (r_bt - r_b) ^ 2 / sum_t t`, with t counted from 1 over the tokens
    that have a weight.

    Args:
      said: `[B, T, O]`, r_bt.
      labels: `[B, O]`, or `[B]` for one output, r_b; in [0, 1] for `rad`.
      weights: `[B, T]`; a row without any is left out of the mean.

    Returns:
      `[]`, the mean over the outputs as well.

    Source: arXiv 2310.09520, section 2.2.

    >>> said = jnp.array([[[1.0], [0.0], [9.0]]])  # 1 (1 - 0) ^ 2 / (1 + 2)
    >>> weights = jnp.array([[1.0, 1.0, 0.0]])
    >>> round(float(cumulative(said, jnp.array([0.0]), weights)), 4)
    0.3333
    """
    weights = jnp.cumsum(weights > 0, axis=1) * weights
    total = weights.sum(1)
    error = _errors(said, _for_texts(said, labels), weights)
    return _mean(error / jnp.where(total > 0, total, 1.0), weights)


def fudge(said: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The loss of CD-FUDGE: `mean_b 1/2 sum_t (v_bt - r_b) ^ 2`.

    Its minimum is the mean reward of the texts that go on from a beginning: the value.

    Args:
      said: `[B, T, O]`, v_bt.
      labels: `[B, O]`, or `[B]` for one output, r_b.
      weights: `[B, T]`; a row without any is left out of the mean.

    Returns:
      `[]`, the mean over the outputs as well.

    Source: arXiv 2310.17022, section 2.1; the idea of arXiv 2104.05218.

    >>> said = jnp.array([[[1.0], [3.0], [9.0]]])
    >>> weights = jnp.array([[1.0, 1.0, 0.0]])
    >>> float(fudge(said, jnp.array([0.0]), weights))  # (1 + 9) / 2
    5.0
    """
    return _mean(0.5 * _errors(said, _for_texts(said, labels), weights), weights)


def _for_texts(said: jax.Array, labels: jax.Array) -> jax.Array:
    """Labels of texts as those of all their beginnings, `[B, 1, O]`."""
    batch, _, count = said.shape
    if labels.shape != (batch, count) and (labels.shape, count) != ((batch,), 1):
        raise ValueError(
            f"labels of shape {labels.shape} for {count} outputs of {batch} texts: "
            f"[{batch}, {count}] are expected"
        )
    return labels.reshape(batch, 1, count)


def _errors(said: jax.Array, should: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted squares, summed over a text's beginnings, mean over outputs, `[B]`."""
    weights = weights[..., None]
    # what is not judged may be anything
    square = jnp.where(weights > 0, said - should, 0.0) ** 2
    return (weights * square).sum(1).mean(-1)


def _mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of losses `[B]` over the rows that have a weight."""
    return losses.sum() / jnp.maximum((weights > 0).any(1).sum(), 1)


def judging(
    backbone: Backbone,
    head: Head,
    optimizer: optax.GradientTransformation,
    loss: Loss = cumulative,
) -> Finetuner:
    """Gradient steps of a model of rewards, on texts whose reward is known.

    All of it is trained; an optimizer that changes the head alone
    (`optax.partition`) leaves the backbone as it is.

    Args:
      backbone: of the model.
      head: of the model, with O outputs.
      optimizer: any optax transformation.
      loss: `cumulative` of RAD, or `fudge` of controlled decoding.

    Returns:
      A tuner of the parameters (the backbone's, the head's) over `Labelled` texts.

    Source: arXiv 2310.09520; arXiv 2310.17022.

    >>> import numpy as np
    >>> from collab_jax.finetune import fit
    >>> from collab_jax.models import heads, transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, head = transformer.transformer(config), heads.linear(8)
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = transformer.init(keys[0], config), head.init(keys[1])
    >>> texts = np.array([[1, 2, 3], [4, 5, 6]])
    >>> data = Labelled(texts, np.ones((2, 3)), np.array([0.0, 1.0]))
    >>> tuner = judging(backbone, head, optax.adam(0.01))
    >>> params, history = fit(tuner, params, data, epochs=9, progress=False)
    >>> history[-1] < history[0]
    True
    """

    def objective(params: Params, base: Params, batch: Labelled) -> jax.Array:
        del base
        said = outputs(backbone, head, params, jnp.asarray(batch.tokens))
        return loss(said, jnp.asarray(batch.labels), jnp.asarray(batch.weights))

    return descent(objective, optimizer)


def backed_up(
    values: jax.Array, log_p: jax.Array, labels: jax.Array, weights: jax.Array
) -> jax.Array:
    """What a value should be: that of the next token on average; at the end the reward.

    `sum_c p(c | x_<=t) v(x_<=t, c)`, and r where the text ends.

    Args:
      values: `[B, T, K]`, v of every continuation.
      log_p: `[B, T, K]`, of the continuations, up to a constant at each place.
      labels: `[B]`, r.
      weights: `[B, T]`; a text ends at its last token that has a weight.

    Returns:
      `[B, T]`.

    Source: arXiv 2310.17022, equation of CD-Q; there K is V.

    >>> v, even = jnp.array([[[1.0, 3.0], [9.0, 9.0]]]), jnp.zeros((1, 2, 2))
    >>> backed_up(v, even, jnp.array([5.0]), jnp.ones((1, 2))).tolist()
    [[2.0, 5.0]]
    """
    average = (jax.nn.softmax(log_p) * values).sum(-1)
    place = jnp.arange(weights.shape[1])
    end = jnp.max(jnp.where(weights > 0, place, -1), axis=1, keepdims=True)
    return jnp.where(place == end, labels[:, None], average)


def q_learning(
    lm: LM,
    backbone: Backbone,
    head: Head,
    optimizer: optax.GradientTransformation,
    k: int,
    width: int = 8,
) -> Finetuner:
    """Gradient steps of a model of values, CD-Q: each value is learned off the next.

    `mean_b 1/2 sum_t (v(x_<=t) - u_t) ^ 2` with u of `backed_up`, over the K likeliest
    continuations, held fixed. Nothing is drawn: the average over what the LM might say
    next is taken as it is, so that a text teaches more than its own reward.

    `base` are the parameters of the LM.

    Args:
      lm: whose texts are valued.
      backbone: of the model of values.
      head: of the model, whose first output is trained.
      optimizer: any optax transformation.
      k: continuations of each place; V for the method's own form.
      width: places whose continuations are read in one call, at `T + width K` nodes.

    Returns:
      A tuner of the parameters (the backbone's, the head's) over `Labelled` texts.

    Source: arXiv 2310.17022, CD-Q.

    >>> import numpy as np
    >>> from collab_jax.finetune import fit
    >>> from collab_jax.models import heads, table, transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, head = transformer.transformer(config), heads.linear(8)
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = transformer.init(keys[0], config), head.init(keys[1])
    >>> texts = np.array([[1, 2, 3], [4, 5, 6]])
    >>> data = Labelled(texts, np.ones((2, 3)), np.array([0.0, 1.0]))
    >>> tuner = q_learning(table.language_model(1), backbone, head, optax.adam(0.01), 2)
    >>> base = table.init(jax.random.key(1), 10, 1)
    >>> params, history = fit(tuner, params, data, base=base, epochs=9, progress=False)
    >>> history[-1] < history[0]
    True
    """
    model = reward_model(backbone, head)
    below = hanging(model, (-1,) * k, width)

    def objective(params: Params, base: Params, batch: Labelled) -> jax.Array:
        tokens, weights, labels = map(jnp.asarray, batch)
        rows, size = tokens.shape
        said = outputs(backbone, head, params, tokens)[..., :1]
        out, _ = lm.extend(base, lm.init(base, rows, size), tokens)
        log_p, following = jax.lax.top_k(log_probs(out.logits), k)
        fixed = jax.lax.stop_gradient(params)
        state = model.init(fixed, rows, size + below.room)
        values, _ = below.extend(
            fixed, state, tokens, following, lambda outputs: outputs[..., 0]
        )
        should = backed_up(values, log_p, labels.reshape(rows), weights)
        return _mean(0.5 * _errors(said, should[..., None], weights), weights)

    return descent(objective, optimizer)
