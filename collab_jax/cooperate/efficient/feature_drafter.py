"""A proposer that goes on from the target's features: EAGLE.

A layer reads each token together with the target's feature of the token before it, and
guesses the token's own feature (`models.extrapolator`). The target computes the true
features of all tokens that it scores, so what the layer has read of the text always
stems from true features; only behind the pending token it reads its own guesses.

After a round in which a row became n tokens longer, the target has said n features: at
the pending token and at the accepted ones. Feature i precedes the new token i, so these
n pairs are read at once; what was read of the draft is forgotten. Nodes of a tree are
read level by level, each once.

Shapes: B rows, P longest prompt, W width of the features, N nodes of the draft, D of
its longest path, M nodes that are read, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import slots
from collab_jax.cooperate.efficient.draft import Proposer, Verified, along, of_one_model
from collab_jax.cooperate.efficient.growth import Growth
from collab_jax.lm import Backbone, Features, KVCache, padded, piece
from collab_jax.models.extrapolator import Extrapolator


class FeatureState(NamedTuple):
    """State of `feature_drafter`."""

    cache: KVCache  # of the layer; has read all tokens, the pending one included
    guess: jax.Array  # [B, W], its feature of the pending token


class Reading(NamedTuple):
    """What is known while a tree grows."""

    cache: KVCache
    guesses: jax.Array  # [B, 1 + M, W], of the pending token and of the nodes read


def feature_drafter(
    backbone: Backbone,
    layer: Extrapolator,
    growth: Growth,
    *warps: Callable[[jax.Array], jax.Array],
    read: Callable[[Any], Features] = of_one_model,
    chunk: int | None = None,
) -> Proposer:
    """Proposes what a layer over the target's features makes of its own guesses.

    The first law is `unembed(f')` at the pending token; behind a node it is the law of
    the guess at that node. Each level costs one call of the layer and of the model's
    head, over its new nodes alone.

    Its `init` runs the model over the prompt once more, for the features: the prompt
    costs twice as much as without a draft, and for that time a second cache.

    Args:
      backbone: of the model whose features the layer knows: the target, or a member.
      layer: the extrapolator of this model.
      growth: `chain(K)` for verifiers of chains; `ranked(paths)` or `expanded(depth,
        width, nodes)` for `tree.sampled`; `drawn(paths)` for `tree.recursive`.
      *warps: functions of logits `[B, T, V]`, e.g. `warp.temperature(0.7)`; the first
        is applied first. They make the draft's law like that of a warped target.
      read: from the target's features to this model's.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      A proposer. Its parameters are the pair of the layer's and of the model's.

    Raises:
      ValueError: when first called, for parameters that are no pair, or a target
        without such features.

    Source: EAGLE, arXiv 2401.15077; EAGLE-2, arXiv 2406.16858; EAGLE-3, arXiv
    2503.01840.

    >>> from collab_jax.cooperate.efficient.growth import chain
    >>> from collab_jax.cooperate.efficient.speculate import speculate
    >>> from collab_jax.cooperate.efficient.target import on_lm
    >>> from collab_jax.decoder import pad, run
    >>> from collab_jax.lm import language_model
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.extrapolator import extrapolator
    >>> from collab_jax.models.transformer import init, transformer
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, layer = transformer(config), extrapolator(config)
    >>> base = init(jax.random.key(0), config)
    >>> params = base, (layer.init(jax.random.key(1), base), base)
    >>> target = on_lm(language_model(backbone))
    >>> decoder = speculate(target, feature_drafter(backbone, layer, chain(3)), 6)
    >>> run(decoder, params, *pad([[1, 2]]), jax.random.key(2)).length.tolist()
    [8]
    """

    def logits_of(own, base, guesses):
        logits = layer.unembed(own, base, guesses)
        if layer.vocabulary is not None:
            logits = layer.vocabulary.widen(logits)
        for function in warps:
            logits = function(logits)
        return logits

    def init(params, prompt, prompt_length, room):
        own, base = _pair(params)
        batch, width = prompt.shape
        total = padded(width, piece(chunk, batch))
        size = min(piece(chunk, batch), total)
        prompt = jnp.pad(prompt, ((0, 0), (0, total - width)), mode="edge")
        capacity = max(width + room + growth.reads, total)
        target = backbone.init(base, batch, total)
        cache = layer.start(own, batch, capacity)
        last = prompt_length - 1

        def consume(i, carry):
            target, cache, before, guess = carry
            tokens = jax.lax.dynamic_slice_in_dim(prompt, i * size, size, axis=1)
            x = backbone.embed(base, tokens)
            features, target = backbone.features(base, target, x)
            seen = layer.see(own, features)
            shifted = jnp.concatenate([before[:, None], seen[:, :-1]], axis=1)
            guesses, cache = layer.read(own, cache, x, shifted)
            place = last - i * size
            found = _at(guesses, jnp.clip(place, 0, size - 1))
            here = (place >= 0) & (place < size)
            guess = jnp.where(here[:, None], found, guess)
            return target, cache, seen[:, -1], guess

        like = jax.eval_shape(backbone.embed, base, prompt[:, :1])
        blank = jnp.zeros((batch, layer.width), like.dtype)
        carry = target, cache, blank, blank
        if total == size:
            carry = consume(0, carry)
        else:
            carry = jax.lax.fori_loop(0, total // size, consume, carry)
        _, cache, _, guess = carry
        return FeatureState(cache.rewind(total - prompt_length), guess)

    def propose(params, state, tokens, length, key):
        own, base = _pair(params)

        def read_nodes(reading, nodes, parents, new):
            count = nodes.shape[1]
            above = parents[:, count - new :, None] + 1
            before = jnp.take_along_axis(reading.guesses, above, axis=1)
            begin, size = state.cache.length, reading.cache.k[0].shape[2]
            mask = slots.visible(begin, count, size, parents)
            places = begin[:, None] + slots.depths(parents)
            guesses, cache = layer.read(
                own,
                reading.cache,
                backbone.embed(base, nodes[:, count - new :]),
                before,
                mask[:, count - new :],
                places[:, count - new :],
            )
            every = jnp.concatenate([reading.guesses, guesses], axis=1)
            return logits_of(own, base, guesses), Reading(cache, every)

        guess = state.guess[:, None]
        draft, _, reading = growth.grow(
            read_nodes,
            Reading(state.cache, guess),
            logits_of(own, base, guess)[:, 0],
            key,
            length,
        )
        cache = reading.cache._replace(length=state.cache.length)
        return draft, FeatureState(cache, state.guess)

    def observe(params, state, verified: Verified):
        own, base = _pair(params)
        features = read(verified.out.features)
        features = jax.tree.map(lambda leaf: along(verified, leaf), features)
        seen = layer.see(own, features)
        if seen.shape[-1] != layer.width:
            raise ValueError(
                f"features of width {seen.shape[-1]} for a layer of width "
                f"{layer.width}: let read give those of the layer's own model"
            )
        # feature i was there when token i was drawn: the pairs need no shift
        x = backbone.embed(base, verified.tokens)
        guesses, cache = layer.read(own, state.cache, x, seen)
        count = verified.count
        found = _at(guesses, jnp.maximum(count - 1, 0))
        guess = jnp.where((count > 0)[:, None], found, state.guess)
        return FeatureState(cache.rewind(x.shape[1] - count), guess)

    return Proposer(init, propose, observe, growth.size, growth.depth)


def _at(x: jax.Array, place: jax.Array) -> jax.Array:
    """One entry of each row: `[B, T, W]` at `[B]`."""
    return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]


def _pair(params):
    if not isinstance(params, tuple | list) or len(params) != 2:
        raise ValueError(
            f"a feature drafter got parameters of type {type(params).__name__}: the "
            "pair (parameters of the layer, parameters of the model) is expected"
        )
    return params
