"""Marian, an encoder and a decoder, as an LM that writes with a source text in view.

The source belongs to the parameters, as the prompt of a `prefixed` member does; it is
encoded once, when the state is made, and what the decoder's layers read of it lies in
the state, row by row. The text begins with one start token.

Shapes: B rows, T tokens of this call, N nodes of a tree, S slots of the text, U tokens
of the source, W width of the hidden states, H heads, K size of a head, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from collab_jax import slots
from collab_jax.lm import LM, Backbone, Features, KVCache, Params, language_model
from collab_jax.models import attention
from collab_jax.models.encoder import Layer
from collab_jax.models.linear import Embedding, Projection, drawn, leaf
from collab_jax.models.marian_config import MarianConfig
from collab_jax.models.norm import Norm
from collab_jax.models.transformer import MLP


class MarianState(NamedTuple):
    """The text's keys and values, and the source's."""

    cache: KVCache
    keys: tuple[jax.Array, ...]  # per layer [B, H, U, K]
    values: tuple[jax.Array, ...]  # per layer [B, H, U, K]
    real: jax.Array  # [B, U] bool, tokens of the source that are no padding


def sinusoids(count: int, width: int) -> np.ndarray:
    """Positions that are not learned: sines in the first half, cosines in the second.

        angle[p, j] = p / 10000 ** (2 j / W);  [sin angle, cos angle]

    Args:
      count: positions.
      width: W; if it is odd there is one more sine.

    Returns:
      `[count, W]` float32.

    Source: arXiv 1706.03762, in Marian's order.

    >>> sinusoids(2, 2).round(3).tolist()
    [[0.0, 1.0], [0.841, 0.54]]
    """
    rate = 10000.0 ** (-2 * (np.arange(width) // 2) / width)
    angle = np.arange(count)[:, None] * rate
    parts = np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])
    return np.concatenate(parts, axis=1).astype(np.float32)


class CrossAttention(nn.Module):
    """Attention of the text to the source."""

    config: MarianConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the projections."""
        width = self.config.width
        self.q = Projection(width, width, True, self.dtype)
        self.k = Projection(width, width, True, self.dtype)
        self.v = Projection(width, width, True, self.dtype)
        self.o = Projection(width, width, True, self.dtype)

    def read(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, H, U, K]` of the encoder's output `[B, U, W]`."""
        split = (*hidden.shape[:2], self.config.heads, -1)
        keys, values = (f(hidden).reshape(split) for f in (self.k, self.v))
        return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)

    def __call__(self, x, keys, values, mask) -> jax.Array:
        """Maps `[B, T, W]` to `[B, T, W]`; the mask is `[B, T, U]`."""
        q = self.q(x).reshape(*x.shape[:2], self.config.heads, -1)
        out, _ = attention.attend(q, keys, values, mask, q.shape[-1] ** -0.5)
        return self.o(out)


class DecoderLayer(nn.Module):
    """`x = norm(x + f(x))` for attention, attention to the source, and MLP."""

    config: MarianConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the sub-layers and norms."""
        c = self.config.decoder
        self.attention = attention.Attention(c, self.dtype)
        self.attention_norm = Norm(c, c.width, self.dtype)
        self.cross = CrossAttention(self.config, self.dtype)
        self.cross_norm = Norm(c, c.width, self.dtype)
        self.mlp = MLP(c, self.dtype)
        self.mlp_norm = Norm(c, c.width, self.dtype)

    def __call__(self, x, cache, length, mask, within, keys, values, real):
        """Maps `[B, T, W]` to `[B, T, W]` and the cache."""
        attended, cache, _ = self.attention(x, cache, length, mask, within, None, False)
        x = self.attention_norm(x + attended)
        x = self.cross_norm(x + self.cross(x, keys, values, real))
        return self.mlp_norm(x + self.mlp(x)), cache


class Marian(nn.Module):
    """Both halves."""

    config: MarianConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares everything that has parameters."""
        c = self.config
        self.embed = Embedding(c.source_vocab, c.width, self.dtype)
        if not c.shared:
            self.text_embed = Embedding(c.vocab, c.width, self.dtype)
        self.source_layers = [
            Layer(c.source, self.dtype) for _ in range(c.source_layers)
        ]
        self.layers = [DecoderLayer(c, self.dtype) for _ in range(c.layers)]
        if not c.tied:
            self.head = Projection(c.width, c.vocab, False, self.dtype)
        zeros = nn.initializers.zeros
        self.logit_bias = leaf(self, "logit_bias", zeros, (c.vocab,), self.dtype)

    def _scaled(self, x):
        factor = self.config.width**0.5 if self.config.scaled else 1.0
        return x * jnp.asarray(factor, x.dtype)

    def encode(self, tokens, length):
        """Keys and values of every decoder layer for the source, and what is real."""
        count = tokens.shape[1]
        real = jnp.arange(count) < jnp.maximum(length, 1)[:, None]
        x = self._scaled(self.embed(tokens))
        x = x + jnp.asarray(sinusoids(count, self.config.width), x.dtype)
        for i, layer in enumerate(self.source_layers):
            with jax.named_scope(f"source_layer_{i}"):
                x, _ = layer(x, real)
        read = [layer.cross.read(x) for layer in self.layers]
        return tuple(k for k, _ in read), tuple(v for _, v in read), real

    def embedding(self, tokens):
        """Maps tokens of the text `[B, T]` to `[B, T, W]`, without positions."""
        embed = self.embed if self.config.shared else self.text_embed
        return self._scaled(embed(tokens))

    def features(self, cache, source, x, parents):
        """Runs the decoder; without a cache it reads x alone."""
        keys, values, real = source
        batch, count = x.shape[:2]
        length = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
        size = count if cache is None else cache.k[0].shape[2]
        mask = slots.visible(length, count, size, parents)
        within = attention.reach(length, count, None)
        places = slots.positions(length, count)
        if parents is not None:
            places = length[:, None] + slots.depths(parents).astype(length.dtype)
        x = x + jnp.asarray(sinusoids(size, self.config.width), x.dtype)[places]
        real = jnp.broadcast_to(real[:, None], (batch, count, real.shape[1]))
        caches = []
        for i, layer in enumerate(self.layers):
            own = None if cache is None else (cache.k[i], cache.v[i])
            with jax.named_scope(f"layer_{i}"):
                x, own = layer(x, own, length, mask, within, keys[i], values[i], real)
            caches.append(own)
        if cache is None:
            return Features(x), None
        new_keys, new_values = zip(*caches, strict=True)
        return Features(x), KVCache(new_keys, new_values, cache.length)

    def unembed(self, hidden):
        """Maps `[B, T, W]` to logits `[B, T, V]` float32."""
        c = self.config
        embed = self.embed if c.shared else self.text_embed
        logits = embed.attend(hidden) if c.tied else self.head.unembed(hidden)
        return logits + self.logit_bias.astype(jnp.float32)

    def __call__(self, tokens):
        """Touches every parameter, for `init`."""
        source = self.encode(tokens, jnp.ones(tokens.shape[0], jnp.int32))
        features, _ = self.features(None, source, self.embedding(tokens), None)
        return self.unembed(features.hidden)


def init(key: jax.Array, config: MarianConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters, a plain nested dict.

    Args:
      key: consumed.
      config: what the model is made of.
      dtype: type of every leaf.

    >>> config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8)
    >>> params = init(jax.random.key(0), config)
    >>> params["layers_0"]["cross"]["q"]["kernel"].shape
    (8, 8)
    """
    return drawn(Marian(config, dtype), key)


def marian(config: MarianConfig) -> Backbone:
    """The `Backbone` of the decoder, whose parameters hold a source for every row.

    Args:
      config: what the model is made of.

    Returns:
      A Backbone; its parameters are `(params, source[B, U], length[B])`, the source
      right-padded and as its tokenizer gives it, with the end token. A state of None
      means no memory: the source is then encoded anew.

    Raises:
      ValueError: when a state is made, for another number of sources than rows, or a
        source longer than the model was made for.

    Source: Junczys-Dowmunt et al. 2018, arXiv 1804.00344.

    >>> config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8)
    >>> own = init(jax.random.key(0), config), jnp.array([[3, 4, 0]]), jnp.array([3])
    >>> backbone = marian(config)
    >>> x = backbone.embed(own, jnp.array([[8, 1]]))
    >>> features, state = backbone.features(own, backbone.init(own, 1, 4), x)
    >>> features.hidden.shape, state.cache.length.tolist()
    ((1, 2, 8), [2])
    """
    module, c = Marian(config), config.decoder

    def apply(params, method, *args):
        return module.apply({"params": params[0]}, *args, method=method)

    def encode(params, batch):
        _, tokens, length = params
        if tokens.shape[0] != batch:
            raise ValueError(
                f"{tokens.shape[0]} source texts for a batch of {batch}: one source a "
                "row is expected"
            )
        if tokens.shape[1] > config.context:
            raise ValueError(
                f"a source of {tokens.shape[1]} tokens exceeds the {config.context} "
                "that the model was made for; truncate it"
            )
        return apply(params, Marian.encode, tokens, length)

    def start(params, batch, capacity):
        shape = (batch, c.heads, capacity, c.head_size)
        dtype = slots.held(params[0]["embed"]["embedding"].dtype)

        def buffers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(c.layers))

        cache = KVCache(buffers(), buffers(), jnp.zeros(batch, jnp.int32))
        return MarianState(cache, *encode(params, batch))

    def embed(params, tokens):
        return apply(params, Marian.embedding, tokens)

    def run(params, state, x, parents):
        source = state.keys, state.values, state.real
        out, cache = apply(params, Marian.features, state.cache, source, x, parents)
        return out, state._replace(cache=cache)

    def features(params, state, x):
        if state is None:
            source = encode(params, x.shape[0])
            return apply(params, Marian.features, None, source, x, None)
        out, state = run(params, state, x, None)
        length = state.cache.length + x.shape[1]
        return out, state._replace(cache=state.cache._replace(length=length))

    def unembed(params, hidden):
        return apply(params, Marian.unembed, hidden)

    def rewind(state, count):
        return state._replace(cache=state.cache.rewind(count))

    def take(state, rows):
        return jax.tree.map(lambda x: x[rows], state)

    def prune(state, path, count):
        return state._replace(cache=state.cache.prune(path, count))

    return Backbone(start, embed, features, unembed, rewind, take, run, prune)


def translator(config: MarianConfig) -> LM:
    """The LM of `marian`: what follows in the text, given the source of its row.

    The first token of a text is read as the model's own start token, whatever it is: so
    a member among others shares their text, as a `prefixed` one does.

    Args:
      config: what the model is made of.

    Returns:
      An LM whose parameters are `(params, source[B, U], length[B])`. It may write its
      padding token, which transformers forbids: `warp(lm, forbid([config.pad]))`.

    Raises:
      ValueError: as `marian`.

    >>> config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8)
    >>> own = init(jax.random.key(0), config), jnp.array([[3, 4, 0]]), jnp.array([3])
    >>> lm = translator(config)
    >>> out, state = lm.extend(own, lm.init(own, 1, 4), jnp.array([[8, 1]]))
    >>> out.logits.shape
    (1, 2, 9)
    """
    plain = language_model(marian(config))

    def begun(tokens, position):
        return jnp.where(position == 0, config.start, tokens)

    def extend(params, state, tokens):
        position = slots.positions(state.cache.length, tokens.shape[1])
        return plain.extend(params, state, begun(tokens, position))

    def branch(params, state, tokens, parents):
        position = state.cache.length[:, None] + slots.depths(parents)
        return plain.branch(params, state, begun(tokens, position), parents)

    return plain._replace(extend=extend, branch=branch)
