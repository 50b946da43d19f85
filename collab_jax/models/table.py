"""The exact toy language model: a table of logits, looked up by the last tokens.

Its next-token law is `softmax(table[context])`, where the context is the last `order`
tokens, so every distribution over short strings can be enumerated and every claim about
a decoder checked without noise. It is an LM like any other, bitwise exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import slots
from collab_jax.lm import LM, Out


class TableState(NamedTuple):
    """The history that the context is read from."""

    tokens: jax.Array  # [B, S] int32
    length: jax.Array  # [B] int32


def init(key: jax.Array, vocab: int, order: int, scale: float = 1.0) -> jax.Array:
    """Random table: `[(V + 1) ** order, V]` logits, normally distributed.

    Args:
      key: consumed.
      vocab: V, number of tokens; the context symbol V stands for "before the start".
      order: number of tokens that the law depends on.
      scale: standard deviation of the logits.

    >>> init(jax.random.key(0), vocab=3, order=2).shape
    (16, 3)
    """
    return scale * jax.random.normal(key, ((vocab + 1) ** order, vocab))


def language_model(order: int) -> LM:
    """The LM over a table of `order` tokens of context.

    `logits[b, t] = table[sum_k context[b, t, k] * (V + 1) ** k]`; `context[b, t, 0]` is
    the token just consumed. Trees are read along their paths.

    Args:
      order: number of tokens that the law depends on; 0 for a unigram law.

    >>> lm = language_model(order=1)
    >>> params = init(jax.random.key(0), vocab=3, order=1)
    >>> out, state = lm.extend(params, lm.init(params, 1, 4), jnp.array([[2, 0]]))
    >>> bool((out.logits[0] == params[jnp.array([2, 0])]).all())
    True
    """

    def start(params, batch, capacity):
        del params
        return TableState(
            jnp.zeros((batch, capacity), jnp.int32), jnp.zeros(batch, jnp.int32)
        )

    def read(params, tokens, length, count, parents):
        vocab = params.shape[1]
        size = tokens.shape[1]
        seen = slots.visible(length, count, size, parents)  # [B, T, S]
        # rank slots by how recent they are on the path of each token
        recency = jnp.flip(jnp.cumsum(jnp.flip(seen, -1), -1), -1)  # 1 = most recent
        index = jnp.zeros(seen.shape[:2], jnp.int32)
        for k in range(order):
            here = seen & (recency == k + 1)
            token = jnp.where(here, tokens[:, None, :], 0).sum(-1)
            token = jnp.where(here.any(-1), token, vocab)
            index = index + token * (vocab + 1) ** k
        return params[index]

    def consume(params, state, tokens, parents):
        buffer = slots.write(state.tokens, tokens, state.length)
        logits = read(params, buffer, state.length, tokens.shape[1], parents)
        return Out(logits.astype(jnp.float32)), buffer

    def extend(params, state, tokens):
        out, buffer = consume(params, state, tokens, None)
        return out, TableState(buffer, state.length + tokens.shape[1])

    def branch(params, state, tokens, parents):
        out, buffer = consume(params, state, tokens, parents)
        return out, TableState(buffer, state.length)

    def rewind(state, count):
        return state._replace(length=state.length - count)

    def take(state, rows):
        return TableState(state.tokens[rows], state.length[rows])

    def prune(state, path, count):
        buffer = slots.compact(state.tokens, state.length, path)
        return TableState(buffer, state.length + count)

    return LM(start, extend, rewind, take, branch, prune)
