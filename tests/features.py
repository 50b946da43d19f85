"""Small targets for feature drafters, and what a drafter says, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import speculation as spec

from collab_jax import decode, finetune, lm
from collab_jax.cooperate.efficient.feature_training import extrapolation_tuner
from collab_jax.models.config import from_hf
from collab_jax.models.extrapolator import extrapolator
from collab_jax.models.transformer import init, transformer
from collab_jax.packing import Batch

VOCAB, WIDTH, LONGEST = 61, 32, 48
CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
TAPS = ("hidden.1", "hidden.0")
BACKBONE = transformer(CONFIG, TAPS)
MODEL = lm.language_model(BACKBONE)
LAYER = extrapolator(CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, n).tolist() for n in (3, 17, 1, 9, 6)]


def model(seed=0):
    """Random weights whose text depends most on the last token: it can be learned."""
    params = init(jax.random.key(seed), CONFIG)
    for name, factor in (("embed", 50.0), ("head", 5.0)):
        params[name] = jax.tree.map(lambda x, f=factor: f * x, params[name])
    return params


BASE = model()
NEW_LAYER = LAYER.init(jax.random.key(1), BASE)


@functools.cache
def written(rows=96, length=28):
    """Text that the model wrote, and weights of what it wrote."""
    prompts = RNG.integers(0, VOCAB, (rows, 4)).tolist()
    tokens = spec.draws(decode.greedy(MODEL, length), BASE, prompts).tokens
    weights = np.broadcast_to(np.arange(length + 4) >= 4, tokens.shape)
    return Batch(np.asarray(tokens), weights.astype(np.float32))


@functools.cache
def trained():
    """A layer after some seconds of training."""
    tuner = extrapolation_tuner(BACKBONE, LAYER, optax.adam(1e-2))
    run = {"base": BASE, "batch_size": 32, "epochs": 25, "progress": False}
    return finetune.fit(tuner, NEW_LAYER, written(), **run)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_by_one(layer, backbone, own, base, tokens, true):
    x = backbone.embed(base, tokens[None])
    seen = layer.see(own, backbone.features(base, None, x)[0])[0]
    seen = jnp.pad(seen, ((1, 0), (0, 0)))[:-1]  # the feature of the token before

    def step(carry, xs):
        cache, guess = carry
        place, one, before = xs
        before = jnp.where(place < true, before, guess)
        guess, cache = layer.read(own, cache, one[None, None], before[None, None])
        return (cache, guess[0, 0]), (guess[0, 0], backbone.unembed(base, guess)[0, 0])

    start = layer.start(own, 1, LONGEST), jnp.zeros_like(seen[0])
    return jax.lax.scan(step, start, (jnp.arange(LONGEST), x[0], seen))[1]


def one_by_one(text, true, own, layer=LAYER, backbone=BACKBONE, base=BASE):
    """Reads a text token by token, with a new cache and no mask.

    Args:
      text: tokens.
      true: how many tokens are read with the model's feature of the token before them;
        the others are read with the layer's own guess.
      own: parameters of the layer.
      layer: the extrapolator.
      backbone: of the model.
      base: its parameters.

    Returns:
      The guesses `[T, W]` and the logits of them `[T, V]`.
    """
    padded = np.zeros(LONGEST, np.int32)
    padded[: len(text)] = text
    found = _one_by_one(layer, backbone, own, base, padded, true)
    return tuple(np.asarray(leaf)[: len(text)] for leaf in found)
