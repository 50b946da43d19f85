"""Models that read a text for numbers: rewards, values, scores.

Shapes: B rows, T tokens, V vocabulary, W width of the hidden states, O outputs.
"""

from typing import Any

import jax

from collab_jax.lm import LM, Backbone, Features, Out, Params
from collab_jax.models.heads import Head


def outputs(
    backbone: Backbone, head: Head, params: tuple[Params, Params], tokens: jax.Array
) -> jax.Array:
    """What the model says of every beginning of a text, read without a cache.

    `y[b, t] = head(hidden(tokens[b, :t + 1]))`, and nothing behind t is seen.

    Args:
      backbone: hidden states of the text.
      head: from a hidden state to O numbers.
      params: of both.
      tokens: `[B, T]`.

    Returns:
      `[B, T, O]` float32.

    >>> from collab_jax.models import heads, transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> backbone, head = transformer.transformer(config), heads.linear(8)
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = transformer.init(keys[0], config), head.init(keys[1])
    >>> outputs(backbone, head, params, jax.numpy.array([[1, 2, 3]])).shape
    (1, 3, 1)
    """
    x = backbone.embed(params[0], tokens)
    return head.apply(params[1], backbone.features(params[0], None, x)[0].hidden)


def reward_model(backbone: Backbone, head: Head) -> LM:
    """A model of rewards with the six functions of an LM, its outputs for the logits.

    `logits[b, t] = head(hidden(tokens[b, :t + 1]))`, O numbers at every token. It obeys
    the laws of an LM, so that it has a cache, trees and rows like one; but its outputs
    are no law, and it is not decoded from. With a head of V outputs it is a member of a
    `combine.product`: the value of every continuation at once.

    Args:
      backbone: hidden states of the text; attention looks back only.
      head: from a hidden state to O numbers, e.g. `heads.linear(W)`.

    Returns:
      An LM whose parameters are (the backbone's, the head's).

    Source: the unidirectional reward model of arXiv 2310.09520.

    >>> from collab_jax.models import heads, transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> head = heads.linear(8)
    >>> model = reward_model(transformer.transformer(config), head)
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = transformer.init(keys[0], config), head.init(keys[1])
    >>> text = jax.numpy.array([[1, 2, 3]])
    >>> model.extend(params, model.init(params, 1, 4), text)[0].logits.shape
    (1, 3, 1)
    """

    def read(params: Any, result: tuple[Features, Any]) -> tuple[Out, Any]:
        features, state = result
        return Out(head.apply(params[1], features.hidden), features), state

    def init(params: Any, batch: int, capacity: int) -> Any:
        return backbone.init(params[0], batch, capacity)

    def extend(params: Any, state: Any, tokens: jax.Array) -> tuple[Out, Any]:
        x = backbone.embed(params[0], tokens)
        return read(params, backbone.features(params[0], state, x))

    def branch(
        params: Any, state: Any, tokens: jax.Array, parents: jax.Array
    ) -> tuple[Out, Any]:
        x = backbone.embed(params[0], tokens)
        return read(params, backbone.branch(params[0], state, x, parents))

    return LM(init, extend, backbone.rewind, backbone.take, branch, backbone.prune)
