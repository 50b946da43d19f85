"""Training of SpecDec++'s head on text: which drafted tokens would have been accepted?

The tuner is a `finetune.Finetuner`, so `finetune.fit` runs it.

Shapes: B rows, T tokens of a row, W width of the draft's hidden states, V vocabulary.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from collab_jax import law
from collab_jax.cooperate.efficient.acceptance import inputs
from collab_jax.finetune import Finetuner, descent
from collab_jax.lm import Backbone, Params
from collab_jax.models.heads import Head
from collab_jax.packing import Batch

Warps = Sequence[Callable[[jax.Array], jax.Array]]


def examples(
    draft: Backbone,
    target: Backbone,
    params: tuple[Params, Params],
    batch: Batch,
    key: jax.Array,
    *,
    warps: Warps = (),
    greedy: bool = False,
    mix: float = 0.15,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the head is to learn: at every position a drafted token and its acceptance.

    Some tokens of the text are replaced by what the draft says there, as they would be
    in a draft; then z ~ q(. | text so far) is drawn at every position, and its label is
    `min(1, p(z) / q(z))`. Of a greedy draft, z = argmax q and the label is p(z).

    Args:
      draft: the draft model, run without a cache.
      target: the target, likewise; over the same vocabulary.
      params: of the draft, and of the target.
      batch: tokens `[B, T]` and weights `[B, T]`; text that the target wrote is best.
      key: one typed key; consumed.
      warps: functions of logits that both laws go through when they decode; only the
        target's, if the draft is greedy.
      greedy: whether the draft is; of `draft_lm`.
      mix: share of the tokens (of those that have a weight) that is replaced.
      chunk: positions whose logits exist at one time.

    Returns:
      Inputs `[B, T - 1, W + 2]`, labels `[B, T - 1]` in [0, 1], weights `[B, T - 1]`.

    Source: SpecDec++, arXiv 2405.19715, section 3; there only replaced tokens count.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> small = transformer.transformer(config)
    >>> p = transformer.init(jax.random.key(0), config)
    >>> batch = Batch(jnp.array([[1, 2, 3]]), jnp.ones((1, 3)))
    >>> x, labels, _ = examples(small, small, (p, p), batch, jax.random.key(1))
    >>> x.shape, labels.tolist()
    ((1, 2, 10), [[1.0, 1.0]])
    """
    tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.weights)
    ours, theirs = jax.lax.stop_gradient(params)
    draws, again, swap = jax.random.split(key, 3)

    def hidden(backbone, params, tokens):
        return backbone.features(params, None, backbone.embed(params, tokens))[0].hidden

    def warped(logits):
        for warp in warps:
            logits = warp(logits)
        return logits

    def drawn(state, noise):
        q = draft.unembed(ours, state)
        if greedy:
            return q, law.best(q)
        q = warped(q)
        return q, jax.random.categorical(noise, q)

    def replace(state, noise):
        return drawn(state, noise)[1]

    def judge(state, other, noise):
        q, z = drawn(state, noise)
        p = warped(target.unembed(theirs, other))
        if p.shape != q.shape:
            raise ValueError(
                f"a target over {p.shape[-1]} tokens and a draft over {q.shape[-1]}: "
                "one vocabulary is expected"
            )
        log_p, log_q = (
            jnp.take_along_axis(law.log_probs(x), z[..., None], -1)[..., 0]
            for x in (p, q)
        )
        label = log_p if greedy else jnp.minimum(log_p - log_q, 0.0)
        return inputs(state, q, z), jnp.exp(label)

    said = _in_pieces(replace, (hidden(draft, ours, tokens[:, :-1]),), draws, chunk)
    counted = weights[:, 1:]
    chosen = jax.random.bernoulli(swap, mix, said.shape) & (counted > 0)
    mixed = jnp.where(chosen, said, tokens[:, 1:])
    mixed = jnp.concatenate([tokens[:, :1], mixed], axis=1)[:, :-1]
    both = hidden(draft, ours, mixed), hidden(target, theirs, mixed)
    x, labels = _in_pieces(judge, both, again, chunk)
    return jax.lax.stop_gradient((x, labels, counted.astype(jnp.float32)))


def _in_pieces(function, arrays: tuple[jax.Array, ...], key, chunk: int):
    """A function of pieces `[B, chunk, ...]` and a key each, along the positions."""
    count = arrays[0].shape[1]
    chunk = min(chunk, count)
    pieces = -(-count // chunk)

    def cut(leaf):
        width = [(0, 0), (0, -count % chunk)] + [(0, 0)] * (leaf.ndim - 2)
        leaf = jnp.pad(leaf, width)
        leaf = leaf.reshape(leaf.shape[0], pieces, chunk, *leaf.shape[2:])
        return jnp.moveaxis(leaf, 1, 0)

    def laid_out(leaf):
        leaf = jnp.moveaxis(leaf, 0, 1)
        return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])[:, :count]

    keys = jax.random.split(key, pieces)
    found = jax.lax.map(lambda xs: function(*xs), (*map(cut, arrays), keys))
    return jax.tree.map(laid_out, found)


def acceptance_loss(
    log_odds: jax.Array, labels: jax.Array, weights: jax.Array, mismatch: float = 6.0
) -> jax.Array:
    """`-mean(y log P + m (1 - y) log(1 - P))`: rejections count m times.

    So the head's odds are the true ones divided by m: it is careful.

    Args:
      log_odds: `[...]`, P = sigmoid.
      labels: `[...]`, y in [0, 1].
      weights: `[...]` of the mean.
      mismatch: m.

    Source: SpecDec++, arXiv 2405.19715.

    >>> float(acceptance_loss(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.ones(2), 1.0))
    0.693...
    """
    yes, no = jax.nn.log_sigmoid(log_odds), jax.nn.log_sigmoid(-log_odds)
    nats = -(labels * yes + mismatch * (1.0 - labels) * no)
    whole = weights.sum()
    return (weights * nats).sum() / jnp.where(whole > 0, whole, 1.0)


def acceptance_tuner(
    draft: Backbone,
    target: Backbone,
    head: Head,
    optimizer: optax.GradientTransformation,
    *,
    warps: Warps = (),
    greedy: bool = False,
    mix: float = 0.15,
    mismatch: float = 6.0,
    chunk: int = 64,
) -> Finetuner:
    """Gradient steps on `acceptance_loss` over `examples`; both models are frozen.

    `base` is the triple (parameters of the draft, of the target, a key). What is drawn
    for a batch depends on the key and on the batch's tokens.

    Args:
      draft: the draft model.
      target: the target.
      head: what is trained; of `head`.
      optimizer: any optax transformation.
      warps: functions of logits that both laws go through when they decode; only the
        target's, if the draft is greedy.
      greedy: whether the draft is; of `draft_lm`.
      mix: share of the tokens that the draft replaces.
      mismatch: how often a rejection counts.
      chunk: positions whose logits exist at one time.

    Source: SpecDec++, arXiv 2405.19715: three blocks, mix 0.15, mismatch 6.

    >>> from collab_jax.finetune import fit
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> import numpy as np
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> small = transformer.transformer(config)
    >>> p, q = (transformer.init(jax.random.key(k), config) for k in (0, 1))
    >>> data = Batch(np.array([[1, 2, 3, 4]]), np.ones((1, 4), np.float32))
    >>> from collab_jax.cooperate.efficient.acceptance import head
    >>> made = head(8, blocks=1)
    >>> tuner = acceptance_tuner(small, small, made, optax.adam(0.01))
    >>> base = q, p, jax.random.key(0)
    >>> params, history = fit(tuner, made.init(jax.random.key(1)), data, base=base,
    ...     epochs=2, progress=False)
    >>> len(history)
    2
    """

    def objective(params: Params, base: Params, batch: Batch) -> jax.Array:
        ours, theirs, key = base
        tokens = jnp.asarray(batch.tokens)
        place = 1 + jnp.arange(tokens.size, dtype=jnp.uint32).reshape(tokens.shape)
        key = jax.random.fold_in(key, (tokens.astype(jnp.uint32) * place).sum())
        x, labels, weights = examples(
            draft,
            target,
            (ours, theirs),
            batch,
            key,
            warps=warps,
            greedy=greedy,
            mix=mix,
            chunk=chunk,
        )
        log_odds = head.apply(params, x)[..., 0]
        return acceptance_loss(log_odds, labels, weights, mismatch)

    return descent(objective, optimizer)
