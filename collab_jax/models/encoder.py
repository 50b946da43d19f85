"""The bidirectional encoder of the BERT family, and sentence embeddings.

Every token attends to every token of its own text; the norms stand behind the sums.
Texts of unequal length are padded on the right, and padding is never attended to.

Shapes: B rows, T tokens, W width of the hidden states, H heads, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax.lm import Features, Params
from collab_jax.models.encoder_config import EncoderConfig
from collab_jax.models.linear import Embedding, Projection, drawn, leaf, together
from collab_jax.models.norm import layer_norm
from collab_jax.models.transformer import ACTIVATIONS


class Encoder(NamedTuple):
    """An encoder as pure functions; parameters stay outside."""

    # (params, tokens[B, T], length[B], types[B, T] = zeros) -> Features; what lies
    # behind a row's length is garbage
    features: Callable[..., Features]
    # (params, tokens[B, T], length[B]) -> [B, W]
    embed_sentences: Callable[[Params, jax.Array, jax.Array], jax.Array]
    # (params, hidden[B, T, W]) -> [B, W]: tanh(first token), where there is a pooler
    summary: Callable[[Params, jax.Array], jax.Array]


class LayerNorm(nn.Module):
    """Layer normalisation with scale and bias."""

    width: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `[..., W]`."""
        shape = (self.width,)
        scale = leaf(self, "scale", nn.initializers.ones, shape, self.dtype)
        bias = leaf(self, "bias", nn.initializers.zeros, shape, self.dtype)
        return layer_norm(x, scale, bias, self.eps)


class SelfAttention(nn.Module):
    """Attention of every token to all tokens of its row, masked before the softmax."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the projections."""
        width = self.config.width
        self.q = Projection(width, width, True, self.dtype)
        self.k = Projection(width, width, True, self.dtype)
        self.v = Projection(width, width, True, self.dtype)
        self.o = Projection(width, width, True, self.dtype)

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps `[B, T, W]` to `[B, T, W]` and the weights `[B, H, T, T]`."""
        split = (*x.shape[:2], self.config.heads, -1)
        parts = together(x, self.q, self.k, self.v)
        q, k, v = (part.reshape(split) for part in parts)
        scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
        scores = scores / q.shape[-1] ** 0.5
        # finite, so that a row of length 0 gives no NaN
        scores = jnp.where(real[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bhts,bshk->bthk", weights.astype(x.dtype), v)
        return self.o(mixed.reshape(x.shape)), weights


class MLP(nn.Module):
    """`down(activation(up x))`."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the projections."""
        c = self.config
        self.up = Projection(c.width, c.mlp_width, True, self.dtype)
        self.down = Projection(c.mlp_width, c.width, True, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, W]` to `[B, T, W]`."""
        return self.down(ACTIVATIONS[self.config.activation](self.up(x)))


class Layer(nn.Module):
    """`x = norm(x + attention(x)); x = norm(x + mlp(x))`."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the sub-layers and norms."""
        c = self.config
        self.attention = SelfAttention(c, self.dtype)
        self.attention_norm = LayerNorm(c.width, c.norm_eps, self.dtype)
        self.mlp = MLP(c, self.dtype)
        self.mlp_norm = LayerNorm(c.width, c.norm_eps, self.dtype)

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps `[B, T, W]` to `[B, T, W]` and the attention weights."""
        attended, weights = self.attention(x, real)
        x = self.attention_norm(x + attended)
        return self.mlp_norm(x + self.mlp(x)), weights


class Stack(nn.Module):
    """Embeddings, layers, and the pooler where there is one."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares everything that has parameters."""
        c = self.config
        self.embed = Embedding(c.vocab, c.width, self.dtype)
        self.positions = Embedding(c.positions, c.width, self.dtype)
        if c.token_types:
            self.token_types = Embedding(c.token_types, c.width, self.dtype)
        self.embed_norm = LayerNorm(c.width, c.norm_eps, self.dtype)
        self.layers = [Layer(c, self.dtype) for _ in range(c.layers)]
        if c.pooler:
            self.pooler = Projection(c.width, c.width, True, self.dtype)

    def features(self, tokens, length, types, taps) -> Features:
        """Runs the layers; see `encoder`."""
        c, count = self.config, tokens.shape[1]
        real = jnp.arange(count) < length[:, None]
        x = self.embed(tokens) + self.positions(c.position_offset + jnp.arange(count))
        if c.token_types:
            x = x + self.token_types(jnp.zeros_like(tokens) if types is None else types)
        x = self.embed_norm(x)
        seen = {"hidden.0": x}
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, weights = layer(x, real)
            seen[f"hidden.{i + 1}"] = x
            seen[f"attention.{i + 1}"] = weights.mean(axis=1)  # [B, T, T]
        return Features(x, {name: seen[name] for name in taps})

    def summary(self, hidden: jax.Array) -> jax.Array:
        """Maps `[B, T, W]` to `[B, W]` by the first token."""
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter, for `init`."""
        length = jnp.full(tokens.shape[:1], tokens.shape[1])
        hidden = self.features(tokens, length, None, ()).hidden
        return self.summary(hidden) if self.config.pooler else hidden


def init(key: jax.Array, config: EncoderConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters, a plain nested dict.

    Args:
      key: consumed.
      config: what the encoder is made of.
      dtype: type of every leaf.

    >>> params = init(jax.random.key(0), EncoderConfig("bert", 9, 8, 1, 2, 16, 4, 2))
    >>> params["layers_0"]["mlp"]["up"]["kernel"].shape
    (8, 16)
    """
    return drawn(Stack(config, dtype), key)


def mean_of_tokens(hidden: jax.Array, length: jax.Array) -> jax.Array:
    """Mean of the hidden states of each text: `sum_t h[b, t] / length[b]`.

    Args:
      hidden: `[B, T, W]`.
      length: `[B]`; a row of length 0 gives zeros.

    Returns:
      `[B, W]` float32.

    >>> mean_of_tokens(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([2])).tolist()
    [[2.0]]
    """
    real = jnp.arange(hidden.shape[1]) < length[:, None]
    total = jnp.where(real[..., None], hidden.astype(jnp.float32), 0.0).sum(axis=1)
    return total / jnp.maximum(length, 1)[:, None]


def first_token(hidden: jax.Array, length: jax.Array) -> jax.Array:
    """The hidden state of the first token of each text, `[B, W]` float32.

    Args:
      hidden: `[B, T, W]`.
      length: `[B]`, not read.

    >>> first_token(jnp.array([[[1.0], [3.0]]]), jnp.array([2])).tolist()
    [[1.0]]
    """
    del length
    return hidden[:, 0].astype(jnp.float32)


def encoder(
    config: EncoderConfig,
    taps: tuple[str, ...] = (),
    pool: Callable[[jax.Array, jax.Array], jax.Array] = mean_of_tokens,
    normalise: bool = True,
) -> Encoder:
    """The `Encoder` of a configuration (BERT arXiv:1810.04805).

    A sentence embedding is `e = pool(h) / |pool(h)|` (Sentence-BERT arXiv:1908.10084).

    Args:
      config: what the encoder is made of.
      taps: what `Features.taps` shows: "hidden.0" is the normed sum of the embeddings,
        "hidden.i" the output of layer i (counted from 1), both `[B, T, W]`;
        "attention.i" the weights of layer i, mean over heads, `[B, T, T]` float32.
      pool: `(hidden[B, T, W], length[B]) -> [B, W]`.
      normalise: whether sentence embeddings have unit length.

    Raises:
      ValueError: for an unknown tap; when called, for a text longer than the position
        table, and for a summary where there is no pooler.

    >>> config = EncoderConfig("bert", 9, 8, 1, 2, 16, 4, 2)
    >>> params = init(jax.random.key(0), config)
    >>> tokens, length = jnp.array([[1, 2, 0], [3, 4, 5]]), jnp.array([2, 3])
    >>> embeddings = encoder(config).embed_sentences(params, tokens, length)
    >>> embeddings.shape, (embeddings ** 2).sum(-1).round(4).tolist()
    ((2, 8), [1.0, 1.0])
    """
    known = [f"hidden.{i}" for i in range(config.layers + 1)]
    known += [f"attention.{i + 1}" for i in range(config.layers)]
    wrong = [tap for tap in taps if tap not in known]
    if wrong:
        raise ValueError(
            f"unknown taps {wrong}; an encoder of {config.layers} layers has "
            f"hidden.0 to hidden.{config.layers} and attention.1 to "
            f"attention.{config.layers}"
        )
    module = Stack(config)

    def features(params, tokens, length, types=None):
        if tokens.shape[1] > config.capacity:
            raise ValueError(
                f"{tokens.shape[1]} tokens exceed the {config.capacity} positions of "
                f"this {config.family} encoder; truncate the text"
            )
        return module.apply(
            {"params": params}, tokens, length, types, taps, method=Stack.features
        )

    def embed_sentences(params, tokens, length):
        embedding = pool(features(params, tokens, length).hidden, length)
        if not normalise:
            return embedding
        norm = jnp.linalg.norm(embedding, axis=-1, keepdims=True)
        return embedding / jnp.maximum(norm, 1e-12)

    def summary(params, hidden):
        if not config.pooler:
            raise ValueError("this encoder has no pooler: config.pooler is False")
        return module.apply({"params": params}, hidden, method=Stack.summary)

    return Encoder(features, embed_sentences, summary)
