"""Training of parallel heads, and what they are worth: a loss, tuners, accuracies.

The tuners are `finetune.Finetuner`s, so `finetune.fit` runs them. Text that the model
wrote itself is the best to train on: the heads are to say what the model will.

Shapes: N rows of data, B rows of a batch, T tokens of a row, K heads, R ranks, V
vocabulary.
"""

import jax
import jax.numpy as jnp
import optax

from collab_jax.finetune import Finetuner, descent, mean_nats, over_positions
from collab_jax.lm import Backbone, Params
from collab_jax.models.parallel_heads import Heads
from collab_jax.packing import Batch


def heads_loss(
    backbone: Backbone,
    heads: Heads,
    params: Params,
    base: Params,
    batch: Batch,
    decay: float = 0.8,
    chunk: int = 32,
) -> jax.Array:
    """Sum over the heads of `decay^i` times the mean of `-log p_i(x_t+1+i | h_t)`.

    The mean is weighted by the predicted token's weight. A prediction counts where the
    tokens between have a weight too: none reaches into another text, or into an answer
    from within its prompt; nor does that of a token that the heads do not draft. The
    model is frozen: its gradient is 0.

    Args:
      backbone: the model; it is run without a cache.
      heads: K heads over its hidden states.
      params: of the heads.
      base: of the model.
      batch: tokens `[B, T]` and weights `[B, T]`.
      decay: weight of a head relative to the one before.
      chunk: positions whose logits `[B, chunk, K, V]` exist at one time.

    Returns:
      A float32 scalar, nats.

    Raises:
      ValueError: for rows of fewer than K + 2 tokens.

    Source: Medusa-1, arXiv 2401.10774, equation 1.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(backbone, 2)
    >>> params = heads.init(jax.random.key(1), base)
    >>> batch = Batch(jnp.array([[1, 2, 3, 1, 2, 3]]), jnp.ones((1, 6)))
    >>> heads_loss(backbone, heads, params, base, batch).shape
    ()
    """
    base = jax.lax.stop_gradient(base)
    hidden = _hidden(backbone, base, batch)
    return _decayed(heads, params, base, hidden, batch, decay, chunk)


def heads_tuner(
    backbone: Backbone,
    heads: Heads,
    optimizer: optax.GradientTransformation,
    decay: float = 0.8,
    chunk: int = 32,
) -> Finetuner:
    """Gradient steps on `heads_loss`: the heads learn, the model is frozen.

    Args:
      backbone: the model.
      heads: K heads over its hidden states.
      optimizer: any optax transformation.
      decay: see `heads_loss`.
      chunk: see `heads_loss`.

    Returns:
      A Finetuner of the heads' parameters, with the model's as `base`.

    Source: Medusa-1, arXiv 2401.10774.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> from collab_jax.finetune import fit
    >>> from collab_jax.packing import pack
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(backbone, 2)
    >>> tuner = heads_tuner(backbone, heads, optax.adam(0.01))
    >>> data = pack([[1, 2, 3] * 8], length=8)
    >>> params, history = fit(tuner, heads.init(jax.random.key(1), base), data,
    ...     base=base, epochs=8, progress=False)
    >>> history[-1] < history[0]
    True
    """

    def objective(params, base, batch):
        return heads_loss(backbone, heads, params, base, batch, decay, chunk)

    return descent(objective, optimizer)


def joint_loss(
    backbone: Backbone,
    heads: Heads,
    params: tuple[Params, Params],
    batch: Batch,
    weight: float = 0.2,
    decay: float = 0.8,
    chunk: int = 32,
) -> jax.Array:
    """`finetune.loss` of the model plus `weight` times the heads' loss on top of it.

    Args:
      backbone: the model; it is run once, without a cache.
      heads: K heads over its hidden states.
      params: the pair of the heads' and of the model's: both have a gradient.
      batch: tokens `[B, T]` and weights `[B, T]`.
      weight: of the heads.
      decay: weight of a head relative to the one before.
      chunk: positions whose logits exist at one time.

    Returns:
      A float32 scalar, nats.

    Raises:
      ValueError: for rows of fewer than K + 2 tokens.

    Source: Medusa-2, arXiv 2401.10774, equation 2.

    >>> from collab_jax.finetune import loss
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(backbone, 2)
    >>> params = heads.init(jax.random.key(1), base), base
    >>> batch = Batch(jnp.array([[1, 2, 3, 1, 2, 3]]), jnp.ones((1, 6)))
    >>> plain = loss(backbone, base, batch)
    >>> bool(joint_loss(backbone, heads, params, batch, weight=0.0) == plain)
    True
    """
    own, base = params
    hidden = _hidden(backbone, base, batch)
    tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.weights)
    plain = mean_nats(
        backbone.unembed, base, hidden, tokens[:, 1:], weights[:, 1:], chunk
    )
    return plain + weight * _decayed(heads, own, base, hidden, batch, decay, chunk)


def joint_tuner(
    backbone: Backbone,
    heads: Heads,
    optimizer: optax.GradientTransformation,
    weight: float = 0.2,
    decay: float = 0.8,
    chunk: int = 32,
) -> Finetuner:
    """Gradient steps on `joint_loss`: model and heads learn together.

    The heads should be trained alone first, and faster than the model:
    `optax.partition` gives each its own optimizer.

    Args:
      backbone: the model.
      heads: K heads over its hidden states.
      optimizer: any optax transformation of the pair.
      weight: see `joint_loss`.
      decay: see `joint_loss`.
      chunk: see `joint_loss`.

    Returns:
      A Finetuner of the pair (parameters of the heads, of the model), without a base.

    Source: Medusa-2, arXiv 2401.10774.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(backbone, 2)
    >>> optimizer = optax.partition(
    ...     {"heads": optax.adam(4e-2), "model": optax.adam(1e-2)}, ("heads", "model"))
    >>> tuner = joint_tuner(backbone, heads, optimizer)
    >>> batch = Batch(jnp.array([[1, 2, 3, 1, 2, 3]]), jnp.ones((1, 6)))
    >>> pair = heads.init(jax.random.key(1), base), base
    >>> tuned, first = tuner.step((), tuner.init(pair), batch)
    >>> tuned, second = tuner.step((), tuned, batch)
    >>> bool(second.loss < first.loss)
    True
    """

    def objective(params, base, batch):
        del base
        return joint_loss(backbone, heads, params, batch, weight, decay, chunk)

    return descent(objective, optimizer)


def accuracies(
    backbone: Backbone,
    heads: Heads,
    params: Params,
    base: Params,
    batch: Batch,
    ranks: int = 10,
    chunk: int = 32,
) -> jax.Array:
    """How often the r-th best token of head i is the right one.

    On text that the model wrote itself it is what decoding will see, and
    `topology.grow(nodes, accuracies)` the tree that it calls for. Predictions count as
    in `heads_loss`; a token that the heads do not draft has no rank.

    Args:
      backbone: the model; it is run without a cache.
      heads: K heads over its hidden states.
      params: of the heads.
      base: of the model.
      batch: tokens `[B, T]` and weights `[B, T]`.
      ranks: R, from the best token on.
      chunk: positions whose logits `[B, chunk, K, V]` exist at one time.

    Returns:
      `[K, R]` shares; 0 for a head that nothing counts for.

    Raises:
      ValueError: for rows of fewer than K + 2 tokens.

    Source: arXiv 2401.10774, section 2.3.3.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.parallel_heads import medusa
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(backbone, 2)
    >>> params = heads.init(jax.random.key(1), base)
    >>> batch = Batch(jnp.array([[1, 2, 3, 1, 2, 3]]), jnp.ones((1, 6)))
    >>> found = accuracies(backbone, heads, params, base, batch, ranks=10)
    >>> found.shape, found.sum(1).tolist()
    ((2, 10), [1.0, 1.0])
    """
    hidden = _hidden(backbone, base, batch)
    targets, weights = _ahead(batch, heads.size)
    whole = weights.sum((0, 1))[:, None]
    targets, weights = _drafted(heads, targets, weights)

    def hits(hidden, targets, weights):
        logits = heads.apply(params, base, hidden)  # [B, chunk, K, V]
        right = targets[..., None]
        chosen = jnp.take_along_axis(logits, right, axis=-1)
        earlier = jnp.arange(logits.shape[-1]) < right  # the first of equals is better
        better = (logits > chosen) | ((logits == chosen) & earlier)
        place = better.sum(-1)[..., None] == jnp.arange(ranks)
        return (weights[..., None] * place).sum((0, 1))

    found = over_positions(hits, (hidden, targets, weights), chunk)
    return jnp.where(whole > 0, found / jnp.where(whole > 0, whole, 1.0), 0.0)


def _hidden(backbone: Backbone, base: Params, batch: Batch) -> jax.Array:
    """The hidden states of all tokens but the last, `[B, T - 1, W]`."""
    x = backbone.embed(base, jnp.asarray(batch.tokens)[:, :-1])
    return backbone.features(base, None, x)[0].hidden


def _ahead(batch: Batch, size: int) -> tuple[jax.Array, jax.Array]:
    """What the heads are to say at each token, and how much it counts.

    Returns:
      The tokens t + 2 to t + 1 + K and their weights, `[B, T - 1, K]`.
    """
    tokens = jnp.asarray(batch.tokens)
    weights = jnp.asarray(batch.weights).astype(jnp.float32)
    count = tokens.shape[1] - 1
    if count < size + 1:
        raise ValueError(
            f"rows of {count + 1} tokens for {size} heads: at least {size + 2} tokens "
            "are expected; make the rows longer"
        )

    def shifted(leaf, places):
        return jnp.pad(leaf, ((0, 0), (0, size)))[:, places : places + count]

    targets, counted = [], []
    between = jnp.ones((tokens.shape[0], count), bool)
    for i in range(1, size + 1):
        between &= shifted(weights, i) > 0
        targets.append(shifted(tokens, 1 + i))
        counted.append(jnp.where(between, shifted(weights, 1 + i), 0.0))
    return jnp.stack(targets, axis=-1), jnp.stack(counted, axis=-1)


def _drafted(heads, targets, weights):
    """Targets as places in the heads' logits; those without a place do not count."""
    if heads.vocabulary is None:
        return targets, weights
    place, drafted = heads.vocabulary.place(targets)
    return place, jnp.where(drafted, weights, 0.0)


def _decayed(heads, params, base, hidden, batch, decay, chunk) -> jax.Array:
    """The sum of the heads' losses, each with its weight."""

    def logits(both, hidden):
        return heads.apply(*both, hidden)

    targets, weights = _drafted(heads, *_ahead(batch, heads.size))
    each = mean_nats(logits, (params, base), hidden, targets, weights, chunk)
    return jnp.sum(each * decay ** jnp.arange(1, heads.size + 1))
