"""A merge as an optax transformation: the aggregator of many updates.

Use: `optax.chain(as_optax(ties(0.2)), optax.sgd(1.0))` takes updates whose leaves have
a leading axis N, as `jax.vmap` over clients makes them, and applies their merge.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from collab_jax.merge.memory import merge
from collab_jax.merge.stack import Part


class AggregateState(NamedTuple):
    """What an aggregator remembers."""

    step: jax.Array  # [] int32, updates so far


def as_optax(
    part: Part, weights: Sequence[Any] | None = None, key: jax.Array | None = None
) -> optax.GradientTransformation:
    """Turns a merge into a transformation from `[N, *S]` updates to `[*S]` updates.

    The N updates of a leaf are the deltas of a stack without a base. A whole round may
    be jitted: surveys and masks are traced with it.

    Args:
      part: what edits weights and deltas, as `merge` takes it; `chain()` with weights
        1 / N is FedAvg.
      weights: N, each a number, a tracer, or a tree like the parameters; None is 1 for
        each.
      key: for random parts, which draw anew at every step; None is `jax.random.key(0)`.

    Returns:
      A transformation for `optax.chain`; it does not look at the parameters. Its update
      raises a ValueError for leaves whose leading axes differ.

    Source: FedAvg, arXiv 1602.05629, for the mean.

    >>> from collab_jax.merge.stack import chain
    >>> server = optax.chain(as_optax(chain(), [0.5, 0.5]), optax.sgd(1.0))
    >>> state = server.init({"a": jnp.zeros(2)})
    >>> moves = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> updates, state = server.update(moves, state)
    >>> updates["a"].tolist()
    [-2.0, -3.0]
    """

    def init(params: Any) -> AggregateState:
        del params
        return AggregateState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: AggregateState, params: Any = None):
        del params
        start = jax.random.key(0) if key is None else key
        merged = merge(
            part, None, _rows(updates), weights, jax.random.fold_in(start, state.step)
        )
        return merged, AggregateState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)


def _rows(updates: Any) -> list[Any]:
    """One tree for every index of the leading axis."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(updates)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            f"updates of shapes {sorted(set(shapes))[:4]} were given: leaves with one "
            "leading axis of the same size, the number of updates, are expected"
        )
    (count,) = counts.pop()
    return [jax.tree.map(lambda leaf, n=n: leaf[n], updates) for n in range(count)]
