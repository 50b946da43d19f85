"""A layer that guesses the next hidden state of a model: the drafter of EAGLE.

The *feature* of a token is what the model's own head reads the next token off. From a
token and the feature before it the layer guesses the token's feature,

    f'_t = norm(block(fc [norm e(x_t); norm f_t-1])),   f_-1 = 0,

where the block, one decoder layer of the model's own kind, also attends to all earlier
tokens. The model's head then makes a law of f'_t. Where f_t-1 is not known yet,
f'_t-1 stands in its place.

So everything is indexed by tokens: slot t of the cache belongs to token t, and needs
the feature of token t - 1.

Shapes: B rows, T tokens of this call, S slots, W width of the hidden states.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax import slots
from collab_jax.lm import Features, KVCache, Params
from collab_jax.models import attention, linear
from collab_jax.models.config import Config
from collab_jax.models.draft_vocabulary import DraftVocabulary, output_matrix
from collab_jax.models.linear import Projection
from collab_jax.models.norm import Norm
from collab_jax.models.rotary import angles as rotary_angles
from collab_jax.models.transformer import Block, transformer


class Extrapolator(NamedTuple):
    """The layer as pure functions; the model's own parameters are `base`."""

    # (key, base) -> a plain nested dict
    init: Callable[[jax.Array, Params], Params]
    # (params, batch, capacity) -> the cache of B empty rows
    start: Callable[[Params, int, int], KVCache]
    # (params, features of the model) -> [B, T, W], the features as the layer reads them
    see: Callable[[Params, Features], jax.Array]
    # (params, cache, embedded [B, T, W], before [B, T, W], mask [B, T, S] | None,
    # places [B, T] | None) -> (guesses [B, T, W], cache): reads T tokens, given the
    # features before them, and writes them behind the cache's length. Without a mask
    # and places they follow the text; nodes of a tree have their own
    read: Callable[..., tuple[jax.Array, KVCache]]
    width: int  # W
    # (params, base, guesses [B, T, W]) -> [B, T, V], or [B, T, R]: the draft's logits
    unembed: Callable[[Params, Params, jax.Array], jax.Array]
    vocabulary: DraftVocabulary | None = None  # the R tokens; all unless given


class Layer(nn.Module):
    """The parameters of an extrapolator, and what it computes."""

    config: Config
    taps: int
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the sub-layers."""
        c = self.config
        if self.taps:
            self.fuse = Projection(self.taps * c.width, c.width, False, self.dtype)
        self.embed_norm = Norm(c, c.width, self.dtype)
        self.feature_norm = Norm(c, c.width, self.dtype)
        self.fc = Projection(2 * c.width, c.width, True, self.dtype)
        self.block = Block(c, c.sparse[0], self.dtype)
        self.norm = Norm(c, c.width, self.dtype)

    def fused(self, x: jax.Array) -> jax.Array:
        """Maps taps `[B, T, taps * W]` to `[B, T, W]`."""
        return self.fuse(x)

    def read(self, cache, embedded, before, mask, places):
        """Guesses features `[B, T, W]`; see `Extrapolator.read`."""
        c, count = self.config, embedded.shape[1]
        length, size = cache.length, cache.k[0].shape[2]
        mask = slots.visible(length, count, size) if mask is None else mask
        places = slots.positions(length, count) if places is None else places
        turn = c.rotary[0]
        angles = None if turn is None else rotary_angles(turn, c.head_size, places)
        both = self.embed_norm(embedded), self.feature_norm(before)
        x, (k, v), _ = self.block(
            self.fc(jnp.concatenate(both, axis=-1)),
            (cache.k[0], cache.v[0]),
            length,
            mask,
            attention.reach(length, count, None),
            angles,
            False,
        )
        return self.norm(x), KVCache((k,), (v,), length + count)

    def __call__(self, cache: KVCache) -> jax.Array:
        """Touches every parameter, for `init`."""
        x = jnp.zeros((1, 1, self.config.width), self.dtype)
        if self.taps:
            x = self.fuse(jnp.tile(x, self.taps))
        return self.read(cache, x, x, None, None)[0]


def extrapolator(
    config: Config,
    taps: tuple[str, ...] = (),
    vocabulary: DraftVocabulary | None = None,
) -> Extrapolator:
    """One decoder layer of a model's own kind over pairs of a token and a feature.

    Without taps it reads the hidden states that the model's head reads, as EAGLE-1 and
    2 do; with taps their linear combination, `see(h) = fuse [h_1; ..; h_k]`, as EAGLE-3
    does. What it guesses is always what the head reads; it starts with the scale of
    the model's last norm. Both halves of the pair are normed, and the guess is, as in
    EAGLE-3. The layer is dense and sees the whole text even if the model's last layer
    does not.

    Args:
      config: of the model.
      taps: names of the hidden states that are fused, a low, a middle and a high one,
        e.g. `("hidden.3", "hidden.15", "hidden.27")` of 30 layers; the backbone has to
        be built with these taps.
      vocabulary: the R tokens that are drafted, with an output matrix `[W, R]` of the
        layer's own, as EAGLE-3 has it; it starts as columns of the model's. Without,
        the model's output matrix reads the guesses.

    Raises:
      ValueError: when first called, for features that lack a tap.

    Source: EAGLE, arXiv 2401.15077; EAGLE-3, arXiv 2503.01840; the draft vocabulary,
    arXiv 2502.14856.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> base = transformer.init(jax.random.key(0), config)
    >>> layer = extrapolator(config)
    >>> params = layer.init(jax.random.key(1), base)
    >>> x = jnp.ones((1, 3, 8))
    >>> guesses, cache = layer.read(params, layer.start(params, 1, 4), x, x)
    >>> guesses.shape, cache.length.tolist()
    ((1, 3, 8), [3])
    """
    backbone = transformer(config)
    wide = [i for i, window in enumerate(config.windows) if window is None]
    one = dataclasses.replace(
        config,
        layers=1,
        windows=(None,),
        rotary=(config.rotary[wide[-1] if wide else -1],),
        sparse=(False,),
        learned_positions=0,
    )

    def module(dtype: Any) -> Layer:
        return Layer(one, len(taps), dtype)

    def apply(params: Params, *args: Any, method: Callable) -> Any:
        dtype = params["fc"]["kernel"].dtype
        return module(dtype).apply({"params": params}, *args, method=method)

    def empty(dtype: Any, batch: int, capacity: int) -> KVCache:
        zeros = jnp.zeros((batch, one.kv_heads, capacity, one.head_size), dtype)
        return KVCache((zeros,), (zeros,), jnp.zeros(batch, jnp.int32))

    def init(key: jax.Array, base: Params) -> Params:
        scale = base["norm"]
        dtype = jax.tree.leaves(scale)[0].dtype
        params = dict(module(dtype).init(key, empty(dtype, 1, 1))["params"])
        params["norm"] = scale
        if vocabulary is not None:
            kernel = output_matrix(backbone, base)[:, jnp.asarray(vocabulary.tokens)]
            params["head"] = {"kernel": kernel.astype(dtype)}
        return params

    def start(params: Params, batch: int, capacity: int) -> KVCache:
        return empty(slots.held(params["fc"]["kernel"].dtype), batch, capacity)

    def see(params: Params, features: Features) -> jax.Array:
        if not taps:
            return features.hidden
        missing = [tap for tap in taps if tap not in features.taps]
        if missing:
            raise ValueError(
                f"the model shows no {missing}, only {sorted(features.taps)}: build it "
                f"with transformer(config, taps={taps})"
            )
        seen = jnp.concatenate([features.taps[tap] for tap in taps], axis=-1)
        return apply(params, seen, method=Layer.fused)

    def read(params, cache, embedded, before, mask=None, places=None):
        return apply(params, cache, embedded, before, mask, places, method=Layer.read)

    def unembed(params, base, guesses):
        if vocabulary is None:
            return backbone.unembed(base, guesses)
        return linear.unembed(guesses, params["head"]["kernel"])

    return Extrapolator(init, start, see, read, config.width, unembed, vocabulary)
