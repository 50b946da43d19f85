"""The decoder transformer of every family, as a `Backbone`.

Linen makes and names the parameters; the cache is an argument, and the loop over
layers is unrolled, because a scan over stacked layers copies their weights. Layers that
are alike are one jitted function, so that a program of many is traced in the time of
one.

Shapes: B rows, T tokens of this call, N nodes of a tree, S slots, V vocabulary, W size
of the hidden states, H key-value heads, K size of a head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax import slots
from collab_jax.lm import Backbone, Features, KVCache, Params
from collab_jax.models import attention
from collab_jax.models.config import Config
from collab_jax.models.linear import Embedding, Projection, drawn, together
from collab_jax.models.moe import Mixture
from collab_jax.models.norm import Norm
from collab_jax.models.rotary import LongRope
from collab_jax.models.rotary import angles as rotary_angles

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nn.Module):
    """`down(activation(gate x) * up x)`, or `down(activation(up x))`."""

    config: Config
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the projections."""
        c = self.config
        if c.gated:
            self.gate = Projection(c.width, c.inner, c.mlp_bias, self.dtype)
        self.up = Projection(c.width, c.inner, c.mlp_bias, self.dtype)
        self.down = Projection(c.inner, c.width, c.mlp_bias, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, W]` to `[B, T, W]`."""
        activation = ACTIVATIONS[self.config.activation]
        if self.config.gated:
            gate, up = together(x, self.gate, self.up)
            return self.down(activation(gate) * up)
        return self.down(activation(self.up(x)))


class Block(nn.Module):
    """One layer: attention and MLP around a residual stream."""

    config: Config
    sparse: bool
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the sub-layers and norms."""
        c = self.config
        self.attention = attention.Attention(c, self.dtype)
        self.mlp: nn.Module
        if self.sparse:
            self.mlp = Mixture(
                c.width,
                c.expert_inner,
                c.experts,
                c.active,
                c.renormalise,
                ACTIVATIONS[c.activation],
                self.dtype,
                c.skipped,
            )
        else:
            self.mlp = MLP(c, self.dtype)
        if c.pre_norm:
            self.attention_norm = Norm(c, c.width, self.dtype)
            self.mlp_norm = Norm(c, c.width, self.dtype)
        if c.post_norm:
            self.post_attention_norm = Norm(c, c.width, self.dtype)
            self.post_mlp_norm = Norm(c, c.width, self.dtype)

    def __call__(self, x, cache, length, mask, within, angles, tapped):
        """Maps `[B, T, W]` to `[B, T, W]`, the cache, and the tapped weights."""
        c = self.config
        inner = self.attention_norm(x) if c.pre_norm else x
        attended, cache, weights = self.attention(
            inner, cache, length, mask, within, angles, tapped
        )
        if c.post_norm:
            attended = self.post_attention_norm(attended)
        # with a parallel residual the MLP reads what the attention read
        middle = x if c.parallel else x + attended
        out = self.mlp(self.mlp_norm(middle) if c.pre_norm else middle)
        if c.post_norm:
            out = self.post_mlp_norm(out)
        return (x + attended + out if c.parallel else middle + out), cache, weights


@functools.cache
def _layer(config: Config, sparse: bool, dtype: Any, tapped: bool) -> Callable:
    """A layer as a function of its parameters: traced once for all that are alike."""
    block = Block(config, sparse, dtype, parent=None)

    @jax.jit
    def layer(params, x, cache, length, mask, within, angles):
        args = x, cache, length, mask, within, angles, tapped
        return block.apply({"params": params}, *args)

    return layer


class Decoder(nn.Module):
    """Embedding, layers, last norm and head."""

    config: Config
    dtype: Any = jnp.float32

    def setup(self):
        """Declares everything that has parameters."""
        c = self.config
        self.embed = Embedding(c.vocab, c.width, self.dtype)
        if c.learned_positions:
            self.positions = Embedding(c.learned_positions, c.width, self.dtype)
        self.layers = [Block(c, sparse, self.dtype) for sparse in c.sparse]
        self.norm = Norm(c, c.width, self.dtype)
        if not c.tied:
            self.head = Projection(c.width, c.vocab, False, self.dtype)

    def embedding(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[B, T]` to `[B, T, W]`, without positions."""
        x = self.embed(tokens)
        # the factor is rounded to the type of the weights, as in training
        return x * jnp.asarray(self.config.embed_scale, x.dtype)

    def features(self, state, x, parents, taps, first, last):
        """Runs the layers first .. last - 1; see `transformer`."""
        c, count = self.config, x.shape[1]
        length = jnp.zeros(x.shape[0], jnp.int32) if state is None else state.length
        size = count if state is None else state.k[0].shape[2]
        mask = slots.visible(length, count, size, parents)
        masks = {None: mask} | {
            window: attention.windowed(mask, length, window, parents)
            for window in sorted({w for w in c.windows if w is not None})
        }
        within = {window: attention.reach(length, count, window) for window in masks}
        places = slots.positions(length, count)
        if parents is not None:
            places = length[:, None] + slots.depths(parents).astype(length.dtype)
        turns = {
            rotary: rotary_angles(rotary, c.head_size, places)
            for rotary in dict.fromkeys(c.rotary)
            if rotary is not None
        }
        if c.learned_positions and first == 0:
            x = x + self.positions(places)
        seen = {f"hidden.{first}": x}
        caches = []
        for i in range(first, last):
            block, own = self.layers[i], i - first
            cache = None if state is None else (state.k[own], state.v[own])
            rotary = c.rotary[i]
            angles = None if rotary is None else turns[rotary]
            window, tapped = c.windows[i], f"attention.{i + 1}" in taps
            given = x, cache, length, masks[window], within[window], angles
            with jax.named_scope(f"layer_{i}"):
                if self.is_initializing():
                    x, cache, weights = block(*given, tapped)
                else:
                    run = _layer(c, c.sparse[i], self.dtype, tapped)
                    x, cache, weights = run(block.variables["params"], *given)
            caches.append(cache)
            seen[f"hidden.{i + 1}"] = x
            if tapped:
                seen[f"attention.{i + 1}"] = weights.mean(axis=(1, 2))
        out = Features(self.norm(x), {name: seen[name] for name in taps})
        if state is None:
            return out, None
        keys, values = zip(*caches, strict=True)
        return out, KVCache(keys, values, state.length)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Maps `[B, T, W]` to logits `[B, T, V]` float32."""
        c = self.config
        project = self.embed.attend if c.tied else self.head.unembed
        logits = project(hidden)
        if c.logit_cap is None:
            return logits
        return c.logit_cap * jnp.tanh(logits / c.logit_cap)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter, for `init`."""
        x, count = self.embedding(tokens), self.config.layers
        features, _ = self.features(None, x, None, (), 0, count)
        return self.unembed(features.hidden)


def init(key: jax.Array, config: Config, dtype: Any = jnp.float32) -> Params:
    """Random parameters, a plain nested dict in the layout of the checkpoint's layers.

    Args:
      key: consumed.
      config: what the model is made of.
      dtype: type of every leaf.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> params = init(jax.random.key(0), config)
    >>> params["layers_0"]["attention"]["q"]["kernel"].shape
    (8, 8)
    """
    return drawn(Decoder(config, dtype), key)


def transformer(
    config: Config,
    taps: tuple[str, ...] = (),
    layers: tuple[int, int] | None = None,
) -> Backbone:
    """The `Backbone` of a decoder transformer; its LM is `language_model` of it.

    Args:
      config: what the model is made of.
      taps: what `Features.taps` shows. "hidden.0" is the embedding after scaling,
        "hidden.i" the output of layer i (counted from 1), both `[B, T, W]`;
        "attention.i" the weights of layer i, mean over heads, `[B, T, S]` float32.
      layers: (first, last) for a part of the model: the layers first + 1 to last, which
        maps "hidden.first" to the last norm of "hidden.last"; None for all. Its
        parameters are the whole model's.

    Returns:
      A Backbone. Its state is a `KVCache`, or None for a text read alone.

    Raises:
      ValueError: for layers or a tap that the model does not have.

    >>> from collab_jax.lm import language_model
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> lm = language_model(transformer(config, taps=("hidden.1",)))
    >>> params = init(jax.random.key(0), config)
    >>> out, state = lm.extend(params, lm.init(params, 1, 8), jnp.array([[1, 2, 3]]))
    >>> out.logits.shape, out.features.taps["hidden.1"].shape, state.length.tolist()
    ((1, 3, 10), (1, 3, 8), [3])
    """
    first, last = (0, config.layers) if layers is None else layers
    if not 0 <= first < last <= config.layers:
        raise ValueError(
            f"layers = {layers}: 0 <= first < last <= {config.layers} is expected, the "
            "layers that the model has"
        )
    known = [f"hidden.{i}" for i in range(first, last + 1)]
    known += [f"attention.{i + 1}" for i in range(first, last)]
    wrong = [tap for tap in taps if tap not in known]
    if wrong:
        raise ValueError(
            f"unknown taps {wrong}; a model of {config.layers} layers has "
            f"hidden.{first} to hidden.{last} and attention.{first + 1} to "
            f"attention.{last}"
        )
    module = Decoder(config)

    def apply(params: Params, method: Callable, *args: Any) -> Any:
        return module.apply({"params": params}, *args, method=method)

    def run(params: Params, state: KVCache | None, x: jax.Array, parents: Any):
        return apply(params, Decoder.features, state, x, parents, taps, first, last)

    def start(params: Params, batch: int, capacity: int) -> KVCache:
        _check_reach(config, capacity)
        shape = (batch, config.kv_heads, capacity, config.head_size)
        dtype = slots.held(params["embed"]["embedding"].dtype)

        def buffers():
            return tuple(jnp.zeros(shape, dtype) for _ in range(first, last))

        return KVCache(buffers(), buffers(), jnp.zeros(batch, jnp.int32))

    def embed(params: Params, tokens: jax.Array) -> jax.Array:
        return apply(params, Decoder.embedding, tokens)

    def features(params: Params, state: KVCache | None, x: jax.Array):
        if state is None:
            _check_reach(config, x.shape[1])
        out, state = run(params, state, x, None)
        if state is not None:
            state = state._replace(length=state.length + x.shape[1])
        return out, state

    def branch(params: Params, state: KVCache, x: jax.Array, parents: jax.Array):
        return run(params, state, x, parents)

    def unembed(params: Params, hidden: jax.Array) -> jax.Array:
        return apply(params, Decoder.unembed, hidden)

    return Backbone(
        start,
        embed,
        features,
        unembed,
        KVCache.rewind,
        KVCache.take,
        branch,
        KVCache.prune,
    )


def _check_reach(config: Config, tokens: int) -> None:
    """Raises where the model cannot number that many tokens."""
    if config.learned_positions and tokens > config.learned_positions:
        raise ValueError(
            f"{tokens} tokens exceed the {config.learned_positions} learned positions "
            f"of this {config.family} model; shorten the text or the capacity"
        )
    for rotary in config.rotary:
        scaling = None if rotary is None else rotary.scaling
        if (
            isinstance(scaling, LongRope)
            and not scaling.use_long
            and tokens > scaling.original
        ):
            raise ValueError(
                f"{tokens} tokens exceed the first context of {scaling.original} of "
                f"this {config.family} model; build it from config.long_context"
            )
