"""Training of a feature drafter's layer: a loss, a tuner, accuracies.

While drafting, the layer reads its own guesses in the place of features that are not
known yet. Training can do the same, some steps deep: step 0 reads true features, step i
at token t reads its guess of step i - 1 at token t - 1, and attends to true features up
to token t - i, and behind them to the steps 1 .. i of the tokens in between. That is
what the i-th drafted token sees, for a draft that begins at every token of the text.

The tuner is a `finetune.Finetuner`, so `finetune.fit` runs it. Text that the model
wrote itself is the best to train on: the layer is to say what the model will.

Shapes: B rows, T tokens of a row, K steps, W width, R ranks, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax

from collab_jax import law, tree
from collab_jax.cooperate.efficient.draft import check_size
from collab_jax.finetune import Finetuner, Info, Tuned, over_positions
from collab_jax.lm import Backbone, Params
from collab_jax.models.extrapolator import Extrapolator
from collab_jax.packing import Batch


def extrapolation_loss(
    backbone: Backbone,
    layer: Extrapolator,
    params: Params,
    base: Params,
    batch: Batch,
    *,
    steps: int = 1,
    feature_weight: float = 1.0,
    law_weight: float = 0.1,
    decay: float = 0.8,
    noise: float = 0.0,
    key: jax.Array | None = None,
    chunk: int = 32,
) -> jax.Array:
    """Distance of the guesses from the model's features, and of the laws they give.

        sum_i decay^i mean_t (a smooth_l1(f'_t,i - f_t) - b sum_v p_t(v) log q_t,i(v))

    with `p_t = softmax(unembed f_t)` and q of the guess; the mean over the tokens is
    weighted by that of the next token. The model is frozen: its gradient is 0. For a
    layer with a draft vocabulary p is conditional on it, and the second term is left
    out where the likeliest token is not in it.

    EAGLE-1 has one step, a = 1, b = 0.1 and noise 0.1; EAGLE-3 has taps, 7 steps, a = 0
    and b = 1.

    Args:
      backbone: the model; it is run without a cache.
      layer: the extrapolator of this model.
      params: of the layer.
      base: of the model.
      batch: tokens `[B, T]` and weights `[B, T]`.
      steps: K, how deep it reads its own guesses.
      feature_weight: a.
      law_weight: b.
      decay: weight of a step relative to the one before.
      noise: features are read with uniform noise in (-noise, noise).
      key: of the noise; consumed.
      chunk: positions whose logits `[B, chunk, K, V]` exist at one time.

    Returns:
      A float32 scalar; 0 where all weights are 0.

    Raises:
      ValueError: for fewer than 1 step, rows of fewer than K + 1 tokens, or noise
        without a key.

    Source: arXiv 2401.15077, section 4.2; arXiv 2503.01840, section 3.2.

    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.extrapolator import extrapolator
    >>> from collab_jax.models.transformer import init, transformer
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, layer = transformer(config), extrapolator(config)
    >>> base = init(jax.random.key(0), config)
    >>> params = layer.init(jax.random.key(1), base)
    >>> batch = Batch(jnp.array([[1, 2, 3, 1, 2, 3]]), jnp.ones((1, 6)))
    >>> extrapolation_loss(backbone, layer, params, base, batch, steps=2).shape
    ()
    """
    base = jax.lax.stop_gradient(base)
    guesses, hidden, weights = _guesses(
        backbone, layer, params, base, batch, steps, noise, key
    )

    @jax.checkpoint
    def nats(guesses, hidden, weights):  # [K]
        logits = backbone.unembed(base, hidden)
        if layer.vocabulary is not None:
            _, drafted = layer.vocabulary.place(law.best(logits))
            weights = jnp.where(drafted[..., None], weights, 0.0)
            logits = logits[..., jnp.asarray(layer.vocabulary.tokens)]
        p = jnp.exp(law.log_probs(logits))[:, :, None]
        log_q = law.log_probs(_laws(layer, params, base, guesses))
        cross = -jnp.where(p > 0, p * log_q, 0.0).sum(-1)
        return (weights * cross).sum((0, 1))

    apart = optax.huber_loss(guesses, hidden[:, :, None]).mean(-1)
    total = feature_weight * (weights * apart).sum((0, 1))
    total += law_weight * over_positions(nats, (guesses, hidden, weights), chunk)
    whole = weights.sum((0, 1))
    each = jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1.0), 0.0)
    return jnp.sum(each * decay ** jnp.arange(steps))


def extrapolation_tuner(
    backbone: Backbone,
    layer: Extrapolator,
    optimizer: optax.GradientTransformation,
    *,
    noise: float = 0.0,
    seed: int = 0,
    **loss,
) -> Finetuner:
    """Gradient steps on `extrapolation_loss`: the layer learns, the model is frozen.

    Args:
      backbone: the model.
      layer: its extrapolator.
      optimizer: any optax transformation, clipping included.
      noise: see `extrapolation_loss`.
      seed: of the noise.
      **loss: steps, weights, decay and chunk of `extrapolation_loss`.

    Returns:
      A Finetuner of the layer's parameters, with the model's as `base`.

    Source: arXiv 2401.15077; arXiv 2503.01840.

    >>> from collab_jax.finetune import fit
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.extrapolator import extrapolator
    >>> from collab_jax.models.transformer import init, transformer
    >>> from collab_jax.packing import pack
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, layer = transformer(config), extrapolator(config)
    >>> base = init(jax.random.key(0), config)
    >>> tuner = extrapolation_tuner(backbone, layer, optax.adam(0.01), noise=0.1)
    >>> data = pack([[1, 2, 3] * 8], length=8)
    >>> params, history = fit(tuner, layer.init(jax.random.key(1), base), data,
    ...     base=base, epochs=8, progress=False)
    >>> history[-1] < history[0]
    True
    """

    def objective(params, base, batch, key):
        return extrapolation_loss(
            backbone, layer, params, base, batch, noise=noise, key=key, **loss
        )

    def init(params: Params) -> Tuned:
        tree.refuse_packed(params, "trained")
        return Tuned(params, (optimizer.init(params), jax.random.key(seed)))

    def step(base: Params, tuned: Tuned, batch: Batch) -> tuple[Tuned, Info]:
        state, key = tuned.optimizer
        key, now = jax.random.split(key)
        value, gradient = jax.value_and_grad(objective)(tuned.params, base, batch, now)
        updates, state = optimizer.update(gradient, state, tuned.params)
        params = optax.apply_updates(tuned.params, updates)
        return Tuned(params, (state, key)), Info(value, optax.tree.norm(gradient))

    return Finetuner(init, step)


def accuracies(
    backbone: Backbone,
    layer: Extrapolator,
    params: Params,
    base: Params,
    batch: Batch,
    *,
    steps: int = 5,
    ranks: int = 10,
    chunk: int = 32,
) -> jax.Array:
    """How often the r-th best token of step i is the next token of the text.

    On text that the model wrote itself it is what decoding will see: the first column
    is the greedy acceptance of each drafted token, if all before it were right; and
    `topology.grow(nodes, accuracies)` is the tree that it calls for.

    Args:
      backbone: the model; it is run without a cache.
      layer: its extrapolator.
      params: of the layer.
      base: of the model.
      batch: tokens `[B, T]` and weights `[B, T]`.
      steps: K, drafted tokens.
      ranks: R, from the best token on.
      chunk: positions whose logits `[B, chunk, K, V]` exist at one time.

    Returns:
      `[K, R]` shares; 0 for a step that nothing counts for.

    Raises:
      ValueError: for fewer than 1 step, or rows of fewer than K + 1 tokens.

    Source: the acceptance n-alpha of arXiv 2401.15077, section 4.

    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.extrapolator import extrapolator
    >>> from collab_jax.models.transformer import init, transformer
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, layer = transformer(config), extrapolator(config)
    >>> base = init(jax.random.key(0), config)
    >>> params = layer.init(jax.random.key(1), base)
    >>> batch = Batch(jnp.array([[1, 2, 3, 1, 2, 3]]), jnp.ones((1, 6)))
    >>> found = accuracies(backbone, layer, params, base, batch, steps=2)
    >>> found.shape, found.sum(1).round(4).tolist()
    ((2, 10), [1.0, 1.0])
    """
    guesses, hidden, weights = _guesses(
        backbone, layer, params, base, batch, steps, 0.0, None
    )
    del hidden

    targets = jnp.asarray(batch.tokens)[:, 1:]
    whole = weights.sum((0, 1))[:, None]
    if layer.vocabulary is not None:  # what is not drafted has no rank
        targets, drafted = layer.vocabulary.place(targets)
        weights = jnp.where(drafted[..., None], weights, 0.0)

    def hits(guesses, targets, weights):
        logits = _laws(layer, params, base, guesses)  # [B, chunk, K, V]
        right = jnp.broadcast_to(targets[:, :, None, None], (*logits.shape[:3], 1))
        chosen = jnp.take_along_axis(logits, right, axis=-1)
        earlier = jnp.arange(logits.shape[-1]) < right  # the first of equals is better
        better = (logits > chosen) | ((logits == chosen) & earlier)
        place = better.sum(-1)[..., None] == jnp.arange(ranks)
        return (weights[..., None] * place).sum((0, 1))

    found = over_positions(hits, (guesses, targets, weights), chunk)
    return jnp.where(whole > 0, found / jnp.where(whole > 0, whole, 1.0), 0.0)


def _guesses(backbone, layer, params, base, batch, steps, noise, key):
    """What the layer says at each token but the last, at each step.

    Returns:
      Guesses `[B, T - 1, K, W]`, the model's hidden states `[B, T - 1, W]`, and how
      much each guess counts, `[B, T - 1, K]`.
    """
    check_size("steps", steps)
    tokens = jnp.asarray(batch.tokens)[:, :-1]
    rows, count = tokens.shape
    if count < steps:
        raise ValueError(
            f"rows of {count + 1} tokens for {steps} steps: at least {steps + 1} "
            "tokens are expected; make the rows longer"
        )
    x = backbone.embed(base, tokens)
    features = jax.lax.stop_gradient(backbone.features(base, None, x)[0])
    seen = layer.see(params, features)
    if noise:
        if key is None:
            raise ValueError(f"noise = {noise} without a key: give one")
        seen += jax.random.uniform(key, seen.shape, seen.dtype, -noise, noise)

    def shifted(seen):
        return jnp.pad(seen, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    place = jnp.arange(count)
    slot = jnp.arange(steps * count)
    their_step, token = slot // count, slot % count
    cache, found = layer.start(params, rows, steps * count), []
    for step in range(steps):
        begin = place[:, None] - step  # the last token whose feature is true
        mask = jnp.where(
            their_step == 0,
            token <= begin,
            (token == begin + their_step) & (their_step <= step),
        )
        guess, cache = layer.read(
            params,
            cache,
            x,
            shifted(seen),
            jnp.broadcast_to(mask, (rows, *mask.shape)),
            jnp.broadcast_to(place, tokens.shape),
        )
        found.append(guess)
        seen = guess
    weights = jnp.asarray(batch.weights).astype(jnp.float32)[:, 1:, None]
    weights = weights * (place[:, None] >= jnp.arange(steps))
    return jnp.stack(found, axis=2), features.hidden, weights


def _laws(
    layer: Extrapolator, params: Params, base: Params, guesses: jax.Array
) -> jax.Array:
    """Logits `[B, T, K, V]` of guesses `[B, T, K, W]`."""
    rows, count, steps, width = guesses.shape
    flat = layer.unembed(params, base, guesses.reshape(rows, count * steps, width))
    return flat.reshape(rows, count, steps, -1)
