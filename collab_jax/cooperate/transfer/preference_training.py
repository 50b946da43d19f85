"""Training of rewards on pairs of answers of which the first is preferred.

A tuner is a `finetune.Finetuner`, so that `finetune.fit` runs it. A batch holds pairs:
`Batch` with tokens and weights `[B, 2, T]`, the preferred text first, prompts and
padding with weight 0.

Shapes: B pairs, T tokens of a text.
"""

import jax
import jax.numpy as jnp
import optax

from collab_jax.finetune import Finetuner, descent, over_positions
from collab_jax.law import log_probs
from collab_jax.lm import Backbone, Params
from collab_jax.models.heads import Head
from collab_jax.models.reward import outputs
from collab_jax.packing import Batch


def ranking(
    backbone: Backbone, head: Head, optimizer: optax.GradientTransformation
) -> Finetuner:
    """Gradient steps of a model of rewards, on pairs of which the first is preferred.

    `-log sigmoid(r(x, y_1) - r(x, y_2))`, the loss of Bradley and Terry, with r the
    first output at the last token that has a weight.

    Args:
      backbone: of the model.
      head: of the model.
      optimizer: any optax transformation.

    Returns:
      A tuner of the parameters (the backbone's, the head's) over a `Batch` of pairs
      `[B, 2, T]`, the preferred text first.

    Source: the reward models of arXiv 2402.01694; the loss, arXiv 2203.02155.

    >>> import numpy as np
    >>> from collab_jax.finetune import fit
    >>> from collab_jax.models import heads, transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, head = transformer.transformer(config), heads.linear(8)
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = transformer.init(keys[0], config), head.init(keys[1])
    >>> data = Batch(np.array([[[1, 2, 3], [1, 4, 5]]]), np.ones((1, 2, 3)))
    >>> tuner = ranking(backbone, head, optax.adam(0.01))
    >>> params, history = fit(tuner, params, data, epochs=9, progress=False)
    >>> history[-1] < history[0]
    True
    """

    def objective(params: Params, base: Params, batch: Batch) -> jax.Array:
        del base
        tokens, weights = _side_by_side(batch)
        said = outputs(backbone, head, params, tokens)[..., 0]
        end = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[1]), 0), axis=1)
        reward = jnp.take_along_axis(said, end[:, None], axis=1)[:, 0]
        return preference(reward.reshape(2, -1), batch.weights)

    return descent(objective, optimizer)


def autoregressive(
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    beta: float = 0.05,
    chunk: int = 128,
) -> Finetuner:
    """Gradient steps of an LM whose log-likelihood of an answer is to be its reward.

    `-log sigmoid(b (log r(y_1 | x) - log r(y_2 | x)))`, where r is the LM itself and
    `log r(y | x) = sum_t log r(y_t | x, y_<t)`: the rewards of `reward.genarm`. No
    reference takes part in it, as one does in DPO.

    Args:
      backbone: of the LM.
      optimizer: any optax transformation.
      beta: b.
      chunk: positions whose logits exist at one time.

    Returns:
      A tuner of the LM's parameters over a `Batch` of pairs `[B, 2, T]`, the preferred
      text first; prompts have weight 0.

    Source: arXiv 2410.08193.

    >>> import numpy as np
    >>> from collab_jax.finetune import fit
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> params = transformer.init(jax.random.key(0), config)
    >>> data = Batch(np.array([[[1, 2, 3], [1, 4, 5]]]), np.ones((1, 2, 3)))
    >>> tuner = autoregressive(backbone, optax.adam(0.01), beta=1.0)
    >>> params, history = fit(tuner, params, data, epochs=9, progress=False)
    >>> history[-1] < history[0]
    True
    """

    def objective(params: Params, base: Params, batch: Batch) -> jax.Array:
        del base
        tokens, weights = _side_by_side(batch)
        x = backbone.embed(params, tokens[:, :-1])
        hidden = backbone.features(params, None, x)[0].hidden

        @jax.checkpoint
        def part(hidden, targets, weights):
            law = log_probs(backbone.unembed(params, hidden))
            found = jnp.take_along_axis(law, targets[..., None], axis=-1)[..., 0]
            return jnp.where(weights > 0, weights * found, 0.0).sum(1)  # [2 B]

        arrays = hidden, tokens[:, 1:], weights[:, 1:]
        reward = over_positions(part, arrays, chunk)
        return preference(beta * reward.reshape(2, -1), batch.weights)

    return descent(objective, optimizer)


def preference(rewards: jax.Array, weights: jax.Array) -> jax.Array:
    """`-log sigmoid(r_1 - r_2)`, the mean over the pairs that have a weight.

    Args:
      rewards: `[2, B]`, of the preferred texts and of the others.
      weights: `[B, 2, T]`; a pair without any is left out.

    >>> float(preference(jnp.zeros((2, 3)), jnp.ones((3, 2, 4))))
    0.693...
    """
    counts = (jnp.asarray(weights) > 0).any((1, 2))
    nats = -jax.nn.log_sigmoid(rewards[0] - rewards[1])
    return jnp.where(counts, nats, 0.0).sum() / jnp.maximum(counts.sum(), 1)


def _side_by_side(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Pairs `[B, 2, T]` as rows `[2 B, T]`: the preferred texts, then the others."""
    tokens, weights = (jnp.asarray(leaf) for leaf in batch)
    if tokens.ndim != 3 or tokens.shape[1] != 2:
        raise ValueError(
            f"pairs of shape {tokens.shape}: [B, 2, T] is expected, the preferred text "
            "first"
        )

    def rows(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 1, 0).reshape(-1, x.shape[-1])

    return rows(tokens), rows(weights)
