"""An ensemble in which every row has weights of its own: `weighted`.

Shapes: B rows, T tokens of this call, N members, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from collab_jax.combine import product
from collab_jax.lm import LM, State
from collab_jax.pool import Pool, linear


class WeightedState(NamedTuple):
    """State of `weighted`."""

    inner: State  # of the members
    weights: jax.Array  # [B, N]


def weighted(members: Sequence[LM], pool: Callable[..., Pool] = linear) -> LM:
    """Members pooled with weights that differ from row to row.

        logits[b] = pool(w[b, 0], ..., w[b, N - 1])([z_0[b], ..., z_{N - 1}[b]])

    What has a row axis lives in the state: `init` puts the weights there, and `take`
    moves them with the rows.

    Args:
      members: N LMs.
      pool: from N weights, `[B, 1, 1]` each, to a pool, such as `pool.mixture`.

    Returns:
      An LM whose parameters are `(params, weights[B, N])`, with the tuple of the
      members' parameters.

    Raises:
      ValueError: without members; when a state is made, for weights of another shape.

    >>> import jax.numpy as jnp
    >>> from collab_jax import pool
    >>> from collab_jax.models import table
    >>> lm = weighted([table.language_model(0)] * 2, pool.mixture)
    >>> params = jnp.log(jnp.array([[0.9, 0.1]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> own = params, jnp.array([[1.0, 0.0], [0.5, 0.5]])
    >>> out, _ = lm.extend(own, lm.init(own, 2, 1), jnp.array([[0], [0]]))
    >>> jnp.exp(out.logits[:, 0]).round(3).tolist()
    [[0.9, 0.1], [0.7, 0.3]]
    """
    members = tuple(members)
    count = len(members)

    def at(weights: jax.Array) -> LM:
        return product(
            members, pool(*(weights[:, n, None, None] for n in range(count)))
        )

    def init(params, batch, capacity):
        params, weights = params
        if weights.shape != (batch, count):
            raise ValueError(
                f"weights of shape {weights.shape} for {batch} rows and {count} "
                f"members: [{batch}, {count}] is expected"
            )
        return WeightedState(at(weights).init(params, batch, capacity), weights)

    def extend(params, state, tokens):
        lm = at(state.weights)
        out, inner = lm.extend(params[0], state.inner, tokens)
        return out, state._replace(inner=inner)

    def rewind(state, count):
        return state._replace(inner=at(state.weights).rewind(state.inner, count))

    def take(state, rows):
        inner = at(state.weights).take(state.inner, rows)
        return WeightedState(inner, state.weights[rows])

    def branch(params, state, tokens, parents):
        lm = at(state.weights)
        out, inner = lm.branch(params[0], state.inner, tokens, parents)
        return out, state._replace(inner=inner)

    def prune(state, path, count):
        return state._replace(inner=at(state.weights).prune(state.inner, path, count))

    return LM(init, extend, rewind, take, branch, prune)
