"""kNN-LM: what followed in similar places of a text, joined to what the model says.

A datastore holds the hidden state of every place of a text and the token that followed.
`nearest` asks it at each token for the places whose states are nearest. The search is
exact: one product with the keys, block by block, and the best k so far.

Shapes: B rows, T tokens, V vocabulary, M entries, W width of a key, Q queries, K
neighbours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.lm import LM, Out, Params, padded
from collab_jax.pool import Pool

# where in an LM's features a key is found: the hidden states after the last norm
Key = Callable[[Any], jax.Array]  # features -> [B, T, W]


class Datastore(NamedTuple):
    """Places of a text, in any order; part of the parameters of `nearest`."""

    keys: jax.Array  # [M, W] float32, less the centre
    tokens: jax.Array  # [M] int32, what followed; -1 for no entry
    centre: jax.Array  # [W]
    size: jax.Array  # [M], the squared lengths of the keys


def datastore(keys: jax.Array, tokens: jax.Array) -> Datastore:
    """A datastore of keys and what followed them.

    The keys are kept less their mean: hidden states have much in common, which would
    cost the products of the search their precision.

    Args:
      keys: `[M, W]`.
      tokens: `[M]`; -1 for no entry.

    >>> store = datastore(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([5, 6, -1]))
    >>> store.centre.tolist(), store.keys[:2].tolist()
    ([2.0], [[-1.0], [1.0]])
    """
    keys, tokens = jnp.asarray(keys, jnp.float32), jnp.asarray(tokens, jnp.int32)
    exists = (tokens >= 0)[:, None]
    count = jnp.maximum(exists.sum(), 1)
    centre = jnp.where(exists, keys, 0.0).sum(0) / count
    keys = jnp.where(exists, keys - centre, 0.0)
    return Datastore(keys, tokens, centre, (keys**2).sum(-1))


def hidden(features: Any) -> jax.Array:
    """The usual key: the hidden states that the head reads, `[B, T, W]`.

    The paper's key is the input of the last feed-forward layer. Other states are had by
    taps, with `lambda features: features.taps["hidden.7"]`.

    Raises:
      ValueError: for features that have no hidden states.

    >>> from collab_jax.lm import Features
    >>> hidden(Features(jnp.zeros((1, 2, 3)))).shape
    (1, 2, 3)
    """
    found = getattr(features, "hidden", None)
    if found is None:
        raise ValueError(
            f"features of type {type(features).__name__} have no hidden states: give a "
            "function of the features as `key`, e.g. that of one member"
        )
    return found


def remember(
    lm: LM,
    params: Params,
    tokens: jax.Array,
    length: jax.Array,
    key: Key = hidden,
    chunk: int = 128,
) -> Datastore:
    """The datastore of a text: one entry for every token that has another before it.

    Args:
      lm: the LM whose states are the keys.
      params: its parameters.
      tokens: `[B, T]` int32, right-padded.
      length: `[B]` int32.
      key: from features to keys.
      chunk: tokens consumed by one call.

    Returns:
      `M = B * T` entries; those of padding, and of the last tokens, are none.

    >>> from collab_jax.lm import language_model
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> lm = language_model(transformer.transformer(config))
    >>> params = transformer.init(jax.random.key(0), config)
    >>> text = jnp.array([[1, 2, 3], [4, 5, 0]]), jnp.array([3, 2])
    >>> store = remember(lm, params, *text)
    >>> store.keys.shape, store.tokens.tolist()
    ((6, 8), [2, 3, -1, 5, -1, -1])
    """
    batch, width = tokens.shape
    total = padded(width, chunk)
    chunk = min(chunk, total)
    text = jnp.pad(tokens, ((0, 0), (0, total - width)), mode="edge")

    def read(state: Any, piece: jax.Array) -> tuple[Any, jax.Array]:
        out, state = lm.extend(params, state, piece)
        return state, key(out.features).astype(jnp.float32)

    pieces = jnp.moveaxis(text.reshape(batch, -1, chunk), 1, 0)
    _, keys = jax.lax.scan(read, lm.init(params, batch, total), pieces)
    keys = jnp.moveaxis(keys, 0, 1).reshape(batch, total, -1)[:, :width]
    following = jnp.roll(tokens, -1, axis=1)
    known = jnp.arange(width) + 1 < length[:, None]
    return datastore(
        keys.reshape(batch * width, -1), jnp.where(known, following, -1).reshape(-1)
    )


def search(
    store: Datastore, queries: jax.Array, k: int, block: int = 65536
) -> tuple[jax.Array, jax.Array]:
    """The k entries nearest to each query, by exact search.

    `d[q, i] = ||query[q] - key[i]||^2`, the k smallest in rising order; of equals the
    first. The search compares `||key||^2 - 2 query . key`; the distances of those that
    are found are computed anew, from the differences.

    Args:
      store: M entries.
      queries: `[Q, W]`.
      k: K.
      block: entries that are compared at a time; `[Q, block]` numbers exist.

    Returns:
      Distances and tokens, `[Q, K]`; for lack of entries infinite and -1.

    >>> store = datastore(jnp.array([[0.0], [2.0], [5.0]]), jnp.array([7, 8, 9]))
    >>> distance, token = search(store, jnp.array([[1.5]]), 2)
    >>> distance.tolist(), token.tolist()
    ([[0.25, 2.25]], [[8, 7]])
    """
    count = len(store.keys)
    block = max(1, min(block, count))
    queries = queries - store.centre

    def nearer(best: tuple[jax.Array, jax.Array], start: jax.Array):
        # the last block begins earlier, so that the store is not padded: a copy
        begin = jnp.minimum(start, count - block)
        keys, size, tokens = (
            jax.lax.dynamic_slice_in_dim(leaf, begin, block)
            for leaf in (store.keys, store.size, store.tokens)
        )
        product = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
        place = begin + jnp.arange(block)
        new = (tokens >= 0) & (place >= start)
        score = jnp.where(new, 2 * product - size, -jnp.inf)  # high is near
        place = jnp.broadcast_to(place, score.shape)
        scores = jnp.concatenate([best[0], score], axis=1)
        places = jnp.concatenate([best[1], place], axis=1)
        score, pick = jax.lax.top_k(scores, k)
        return (score, jnp.take_along_axis(places, pick, axis=1)), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), int)
    starts = jnp.arange(0, count, block)
    (score, place), _ = jax.lax.scan(nearer, none, starts)
    distance = ((queries[:, None] - store.keys[place]) ** 2).sum(-1)
    found = (score > -jnp.inf) | jnp.isnan(score)  # a NaN in a query stays one
    distance = jnp.where(found, distance, jnp.inf)
    order = jnp.argsort(distance, axis=1, stable=True)
    token = jnp.where(found, store.tokens[place], -1)
    near, token = (jnp.take_along_axis(x, order, axis=1) for x in (distance, token))
    return near, token


def vote(
    distance: jax.Array, tokens: jax.Array, vocab: int, temperature=1.0
) -> jax.Array:
    """The law of the neighbours' tokens, as logits `[Q, V]`.

    `p[v]` proportional to `sum_i [token_i = v] exp(-d_i / temperature)`; -inf for a
    token that no neighbour has.

    Args:
      distance: `[Q, K]`; infinite for no entry.
      tokens: `[Q, K]`.
      vocab: V.
      temperature: > 0; 1 in the paper.

    >>> law = vote(jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[1, 2, 2]]), 4)
    >>> jnp.exp(law)[0].round(4).tolist()
    [0.0, 0.3333, 0.6667, 0.0]
    """
    nearest = jnp.min(distance, axis=-1, keepdims=True)
    nearest = jnp.where(jnp.isposinf(nearest), 0.0, nearest)
    exists = ~jnp.isposinf(distance)
    gap = jnp.where(exists, distance - nearest, 0.0)
    weight = jnp.where(exists, jnp.exp(-gap / temperature), 0.0)
    rows = jnp.arange(len(distance))[:, None]
    total = jnp.zeros((len(distance), vocab)).at[rows, tokens].add(weight, mode="drop")
    none = total == 0.0
    law = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1.0, total)))
    return law - jnp.log(jnp.maximum(weight.sum(-1, keepdims=True), 1e-30))


def nearest(
    lm: LM,
    pool: Pool,
    k: int,
    *,
    temperature=1.0,
    key: Key = hidden,
    block: int = 65536,
) -> LM:
    """An LM that also reads a datastore: `pool([log p, log p_kNN])`.

    kNN-LM is `nearest(lm, mixture(0.75, 0.25), 1024)`. Where no entry is near, because
    there is none at all, the law of the neighbours forbids everything, and `mixture`
    leaves the model's.

    Args:
      lm: any LM with features.
      pool: of (model, neighbours); the neighbours' law is -inf for most tokens, which
        `pool.mixture` reads as probability 0.
      k: K, neighbours of a token.
      temperature: of the distances, > 0; may be a tracer.
      key: from features to keys, as the datastore was made.
      block: entries that are compared at a time.

    Returns:
      An LM whose parameters are (the model's, a `Datastore`).

    Raises:
      ValueError: for k < 1, or a known temperature that is not above 0; when first
        called, for keys of another width.

    Source: arXiv 1911.00172.

    >>> from collab_jax.lm import language_model
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.pool import mixture
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> model = language_model(transformer.transformer(config))
    >>> own = transformer.init(jax.random.key(0), config)
    >>> text = jnp.array([[1, 2, 3]]), jnp.array([3])
    >>> params = own, remember(model, own, *text)
    >>> lm = nearest(model, mixture(0.0, 1.0), 1)
    >>> out, _ = lm.extend(params, lm.init(params, 1, 3), text[0])
    >>> out.logits.argmax(-1)[0, :2].tolist()  # what followed there
    [2, 3]
    """
    if k < 1:
        raise ValueError(f"k = {k}: at least one neighbour is expected")
    if not isinstance(temperature, jax.core.Tracer) and not float(temperature) > 0:
        raise ValueError(f"temperature = {temperature}: a number above 0 is expected")

    def joined(result: tuple[Out, Any], store: Datastore) -> tuple[Out, Any]:
        out, state = result
        queries = key(out.features).astype(jnp.float32)
        if queries.shape[-1] != store.keys.shape[-1]:
            raise ValueError(
                f"keys of width {store.keys.shape[-1]} in the datastore and of width "
                f"{queries.shape[-1]} of this LM: make the store with this LM and `key`"
            )
        flat = queries.reshape(-1, queries.shape[-1])
        found = search(store, flat, k, block)
        law = vote(*found, out.logits.shape[-1], temperature)
        return Out(
            pool([out.logits, law.reshape(out.logits.shape)]), out.features
        ), state

    def init(params: Params, batch: int, capacity: int) -> Any:
        return lm.init(params[0], batch, capacity)

    def extend(params: Params, state: Any, tokens: jax.Array) -> tuple[Out, Any]:
        return joined(lm.extend(params[0], state, tokens), params[1])

    def branch(
        params: Params, state: Any, tokens: jax.Array, parents: jax.Array
    ) -> tuple[Out, Any]:
        return joined(lm.branch(params[0], state, tokens, parents), params[1])

    return lm._replace(init=init, extend=extend, branch=branch)
