"""A next-token law, carried as logits: normalise it, measure it, draw from it.

A law is an array of logits over the last axis; -inf is probability 0. A law without any
possible token stays all -inf, and a NaN stays a NaN: neither is hidden.

Shapes: B rows, V vocabulary; `...` any leading axes.
"""

import jax
import jax.numpy as jnp

# The streams of randomness at one position: every draw has one of its own.
TOKEN, DRAFT, ACCEPT, RESIDUAL = range(4)
LEAST = -104.0  # nats; the exponential of less is 0 in float32


def log_probs(logits: jax.Array) -> jax.Array:
    """Log-probabilities, `logits - log sum_v exp(logits[v])`.

    Unlike `jax.nn.log_softmax`, a row that is all -inf stays -inf and has gradient 0.

    Args:
      logits: `[..., V]`, in nats up to a constant.

    >>> log_probs(jnp.array([0.0, 0.0, -jnp.inf])).tolist()
    [-0.6931, -0.6931, -inf]
    """
    below, _, total = _shares(logits)
    return below - jnp.log(total)[..., None]


def entropy(logits: jax.Array) -> jax.Array:
    """Shannon entropy in nats, `-sum_v p[v] log p[v]`, with 0 log 0 = 0.

    Args:
      logits: `[..., V]`.

    Returns:
      `[...]`.

    >>> round(float(entropy(jnp.array([0.0, 0.0, -jnp.inf]))), 4)
    0.6931
    """
    below, share, total = _shares(logits)
    below = jnp.maximum(below, LEAST)  # 0 times this is 0, and times -inf a NaN
    exact = jax.lax.Precision.HIGHEST
    mean = jnp.einsum("...v,...v->...", share, below, precision=exact) / total
    return jnp.log(total) - mean


def _shares(logits):
    """`z - max z`, its exponential, and the sum of that: the same in both users, so
    that a program which asks for both has it once."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    below = logits - jnp.where(jnp.isneginf(top), 0.0, top)
    share = jnp.exp(below)
    total = jnp.sum(share, axis=-1)
    return below, share, jnp.where(total == 0.0, 1.0, total)


def best(logits: jax.Array) -> jax.Array:
    """The likeliest token, `argmax_v logits[v]`: the first of equals.

    Args:
      logits: `[..., V]`.

    Returns:
      `[...]` int32; some token where a logit is NaN.

    >>> best(jnp.array([1.0, 3.0, 3.0])).item()
    1
    """
    # two plain reductions are several times as fast as one that carries an index; both
    # must see the same numbers, whatever is fused with them
    logits = jax.lax.optimization_barrier(jax.lax.stop_gradient(logits))
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    found = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(found, places, logits.shape[-1] - 1), axis=-1)


def row_keys(key: jax.Array, batch: int) -> jax.Array:
    """One key a row: a key array `[B]` as it is, one key k as `fold_in(k, b)`.

    Args:
      key: typed, from `jax.random.key`; `[]` or `[B]`.
      batch: B.

    Raises:
      ValueError: for a raw uint32 key, or for another number of keys than rows.

    >>> row_keys(jax.random.key(0), 3).shape
    (3,)
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"a key of dtype {key.dtype} was given, a typed key is expected: "
            "make it with jax.random.key(seed)"
        )
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"keys of shape {key.shape} for {batch} rows: give [{batch}]")
    return key


def noise(
    key: jax.Array, position: jax.Array, vocab: int, stream: int = TOKEN
) -> jax.Array:
    """Gumbel noise that depends on (row key, position, stream) alone, `[B, V]`.

    Args:
      key: `[B]` row keys; not consumed, position and stream are folded in.
      position: `[B]`, where the token will stand.
      vocab: V.
      stream: which draw at this position.

    >>> key = row_keys(jax.random.key(0), 2)
    >>> noise(key, jnp.array([4, 4]), 5).shape
    (2, 5)
    """

    def one_row(key, position):
        key = jax.random.fold_in(jax.random.fold_in(key, position), stream)
        return jax.random.gumbel(key, (vocab,))

    return jax.vmap(one_row)(key, position)


def draw(
    logits: jax.Array, key: jax.Array, position: jax.Array, stream: int = TOKEN
) -> jax.Array:
    """Draws a token a row by the Gumbel-max rule, `argmax_v logits[v] + g[v]`.

    Args:
      logits: `[B, V]`.
      key: `[B]` row keys; not consumed.
      position: `[B]`, where the token will stand.
      stream: which draw at this position.

    Returns:
      `[B]` int32.

    Source: the Gumbel-max trick; keyed by position as in arXiv 2408.07978.

    >>> key = row_keys(jax.random.key(0), 2)
    >>> sure = jnp.array([[-jnp.inf, 0.0], [0.0, -jnp.inf]])
    >>> draw(sure, key, jnp.array([1, 1])).tolist()
    [1, 0]
    """
    perturbed = logits + noise(key, position, logits.shape[-1], stream)
    return best(perturbed)
