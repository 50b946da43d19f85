"""Parallel heads: several next tokens from one hidden state.

The model's own head reads the next token, t + 1, off the hidden state of token t. Head
i = 1 .. K reads token t + 1 + i off the same state, without knowing the tokens between.
A new head is the model's own: it says what the model says, i tokens too early.

Shapes: `...` any leading axes, K heads, W width of the hidden states, V vocabulary, R
tokens of a draft vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.lm import Backbone, Params
from collab_jax.models.draft_vocabulary import DraftVocabulary, output_matrix
from collab_jax.models.heads import Head, feed_forward, residual
from collab_jax.models.linear import unembed

Body = Callable[[int], Head]  # from W to a map of hidden states, [..., W] -> [..., W]


class Heads(NamedTuple):
    """K heads as pure functions; `base` are the parameters of the model below them."""

    # (key, base) -> a plain nested dict, "head_1" to "head_K"
    init: Callable[[jax.Array, Params], Params]
    # (params, base, hidden [..., W]) -> [..., K, V] float32, or [..., K, R]
    apply: Callable[[Params, Params, jax.Array], jax.Array]
    # (base, batch) -> [B, W], zeros of the type of the model's hidden states
    blank: Callable[[Params, int], jax.Array]
    size: int  # K
    vocabulary: DraftVocabulary | None = None  # the R tokens; all unless given


def medusa(
    backbone: Backbone,
    size: int,
    blocks: int = 1,
    output: Callable[[Backbone, Body, int], Heads] | None = None,
) -> Heads:
    """Heads of residual blocks, `h <- h + silu(W h + c)`, that start at W = 0.

    Args:
      backbone: the model.
      size: K.
      blocks: how many in every head.
      output: `shared`, the model's own output matrix for all heads, unless given;
        `separate` is one for each head, as published: K times the memory;
        `narrowed(vocabulary)` is one of few tokens.

    Raises:
      ValueError: for fewer than 1 head or 0 blocks.

    Source: arXiv 2401.10774.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(transformer.transformer(config), 3)
    >>> params = heads.init(jax.random.key(1), base)
    >>> sorted(params), params["head_1"]["block_0"]["kernel"].shape
    (['head_1', 'head_2', 'head_3'], (8, 8))
    >>> heads.apply(params, base, jnp.ones((2, 8))).shape
    (2, 3, 10)
    """
    if blocks < 1:
        raise ValueError(
            f"blocks = {blocks}: 1 or more are expected; without a block every head is "
            "the model's own"
        )
    output = shared if output is None else output
    return output(backbone, lambda width: residual(width, None, blocks), size)


def blockwise(backbone: Backbone, size: int, inner: int) -> Heads:
    """Heads of one feed-forward layer, `h + W2 relu(W1 h + c1) + c2`, W2 = 0 at first.

    The published next-token head has such a layer too, and is trained with the model;
    here it stays the model's own.

    Args:
      backbone: the model.
      size: K; the published k is K + 1, the next token included.
      inner: width inside the layer, e.g. that of the model's own.

    Raises:
      ValueError: for sizes below 1.

    Source: blockwise parallel decoding, arXiv 1811.03115.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone = transformer.transformer(config)
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = blockwise(backbone, 2, inner=16)
    >>> params, h = heads.init(jax.random.key(1), base), jnp.ones((1, 8))
    >>> own = backbone.unembed(base, h)
    >>> bool(jnp.allclose(heads.apply(params, base, h), own[:, None], rtol=1e-5))
    True
    """
    feed_forward(1, inner)  # refused now and not when W is known
    return shared(backbone, lambda width: feed_forward(width, inner), size)


def shared(backbone: Backbone, body: Body, size: int) -> Heads:
    """Heads over the model's own output matrix: `logits_i = unembed(body_i(hidden))`.

    Args:
      backbone: the model; its `unembed` reads what the heads make of its hidden states.
      body: of every head.
      size: K.

    Raises:
      ValueError: for fewer than 1 head.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> base = transformer.init(jax.random.key(0), config)
    >>> body = lambda width: residual(width, None, blocks=2)
    >>> heads = shared(transformer.transformer(config), body, 2)
    >>> sorted(heads.init(jax.random.key(1), base)["head_2"])
    ['block_0', 'block_1']
    """

    def one(key, base, width):
        del base
        return body(width).init(key)

    def read(own, base, hidden):
        states = [body(hidden.shape[-1]).apply(params, hidden) for params in own]
        return backbone.unembed(base, jnp.stack(states, axis=1))

    return _heads(backbone, size, one, read)


def separate(backbone: Backbone, body: Body, size: int) -> Heads:
    """Heads with an output matrix each, which start as copies of the model's.

    `logits_i = body_i(hidden) @ out_i`: K more matrices `[W, V]`. A cap on the model's
    logits is left out.

    Args:
      backbone: the model.
      body: of every head.
      size: K.

    Raises:
      ValueError: for fewer than 1 head.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> base = transformer.init(jax.random.key(0), config)
    >>> heads = medusa(transformer.transformer(config), 2, output=separate)
    >>> heads.init(jax.random.key(1), base)["head_2"]["out"]["kernel"].shape
    (8, 10)
    """

    return _own(backbone, body, size, None)


def narrowed(
    vocabulary: DraftVocabulary,
) -> Callable[[Backbone, Body, int], Heads]:
    """Heads with small output matrices `[W, R]`, which start as columns of the model's.

    A draft costs K R W products instead of K V W, and so does a step of training, which
    learns nothing from tokens outside the vocabulary.

    Args:
      vocabulary: the tokens that are drafted.

    Returns:
      The `output` of `medusa`: a function of a backbone, a body and K.

    Source: FR-Spec, arXiv 2502.14856.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.draft_vocabulary import draft_vocabulary
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> base = transformer.init(jax.random.key(0), config)
    >>> few = narrowed(draft_vocabulary([1, 5, 7], config.vocab))
    >>> heads = medusa(transformer.transformer(config), 2, output=few)
    >>> params = heads.init(jax.random.key(1), base)
    >>> heads.apply(params, base, jnp.ones((4, 8))).shape
    (4, 2, 3)
    """

    def output(backbone: Backbone, body: Body, size: int) -> Heads:
        return _own(backbone, body, size, vocabulary)

    return output


def _own(
    backbone: Backbone, body: Body, size: int, vocabulary: DraftVocabulary | None
) -> Heads:
    """Heads with an output matrix each, of all tokens or of some."""

    def one(key, base, width):
        kernel = output_matrix(backbone, base)
        if vocabulary is not None:
            kernel = kernel[:, jnp.asarray(vocabulary.tokens)]
        return {"body": body(width).init(key), "out": {"kernel": kernel}}

    def read(own, base, hidden):
        del base
        states = [body(hidden.shape[-1]).apply(each["body"], hidden) for each in own]
        logits = [
            unembed(state, each["out"]["kernel"])
            for state, each in zip(states, own, strict=True)
        ]
        return jnp.stack(logits, axis=1)

    return _heads(backbone, size, one, read)._replace(vocabulary=vocabulary)


def _heads(
    backbone: Backbone,
    size: int,
    one: Callable[[jax.Array, Params, int], Params],
    read: Callable[[list[Params], Params, jax.Array], jax.Array],
) -> Heads:
    """Heads of (key, base, W) -> one's parameters, and of a reading of `[N, W]`."""
    if size < 1:
        raise ValueError(f"size = {size}: 1 or more heads are expected")
    names = [f"head_{i}" for i in range(1, size + 1)]

    def blank(base, batch):
        tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        like = jax.eval_shape(backbone.embed, base, tokens)
        return jnp.zeros((batch, like.shape[-1]), like.dtype)

    def init(key, base):
        width = blank(base, 1).shape[-1]
        keys = jax.random.split(key, size)
        return {name: one(k, base, width) for name, k in zip(names, keys, strict=True)}

    def apply(params, base, hidden):
        own = [params[name] for name in names]
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits: Any = read(own, base, flat)
        return logits.reshape(*hidden.shape[:-1], *logits.shape[1:])

    return Heads(init, apply, blank, size)
