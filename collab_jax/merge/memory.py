"""Merging trees in memory: on one device, or sharded as the trees are.

Leaves are compiled one by one, equal shapes once. Nothing is gathered: elementwise
parts stay on their devices, whole-leaf statistics are sums that the compiler shards.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from collab_jax import tree
from collab_jax.merge import split
from collab_jax.merge.pieces import add
from collab_jax.merge.program import Leaf, programs
from collab_jax.merge.stack import Facts, Part, Survey, lift


def merge(
    part: Part,
    base: Any,
    experts: Sequence[Any],
    weights: Sequence[Any] | None = None,
    key: jax.Array | None = None,
) -> Any:
    """Merges trees of one structure: models, adapters, heads, updates of clients.

    Each leaf is merged in float32 (float64 if it is that) and rounded to the base's
    type. Random parts draw from the key and the leaf's name alone, so that the same
    key makes the same masks whatever the order, the sharding, or the jit. Names are
    the paths of the tree: to draw what a merge of the checkpoint draws, and to have
    rows where it has them, merge `collab_jax.io.names.to_checkpoint(config, params)`.

    Args:
      part: what edits weights and deltas; `chain()` for a plain weighted sum.
      base: the tree that the experts were made from, or None to merge without one:
        the deltas are then the experts themselves.
      experts: N trees.
      weights: N, each a number, a tracer, or a tree like the base with the weights of
        every leaf, `[]` or `[*S]`; None is 1 for each.
      key: one typed key for random parts; None is `jax.random.key(0)`.

    Returns:
      A tree with the base's structure and types. A leaf of integers is the base's, and
      must be equal everywhere.

    Raises:
      ValueError: without experts, for a wrong number of weights, or for trees that
        differ, naming the first path.

    Source: arXiv 2212.04089 for the form.

    >>> from collab_jax.merge.stack import chain
    >>> base, expert = {"a": jnp.zeros(2)}, {"a": jnp.array([1.0, 2.0])}
    >>> merge(chain(), base, [expert, expert], weights=[0.5, 1.0])["a"].tolist()
    [1.5, 3.0]
    """
    experts = list(experts)
    first = next(iter(experts), None) if base is None else base
    check_alike(first, experts)
    names = tree.paths(first)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(first)]
    columns = [jax.tree.leaves(expert) for expert in experts]
    _check_integers(names, leaves, columns)
    rows = _weights(weights, first, len(experts))
    transform, start = lift(part), jax.random.key(0) if key is None else key
    run = programs(transform)

    def leaf(i: int) -> Leaf:
        return Leaf(
            names[i],
            None if base is None else leaves[i],
            tuple(column[i] for column in columns),
            tuple(row[i] for row in rows),
            start,
        )

    floating = [
        i for i, each in enumerate(leaves) if jnp.issubdtype(each.dtype, jnp.inexact)
    ]
    floating.sort(key=lambda i: names[i])
    facts: Facts = ()
    for i, entry in enumerate(transform.survey):
        if isinstance(entry, Survey):
            total = None
            for j in floating:
                total = add(total, run.ask(i, leaf(j), facts))
            size = sum(entry.size(names[j], leaves[j].shape) for j in floating)
            facts = (*facts, entry.settle(total, facts, size))
        else:
            facts = (*facts, entry)
    on_host = transform.hosted and _here((first, experts, rows, key))
    for j in floating:
        if on_host:
            leaves[j] = jnp.asarray(split.run(run, None, leaf(j), facts, whole=True))
        else:
            leaves[j] = run.merge(leaf(j), facts)
    return jax.tree.unflatten(jax.tree.structure(first), leaves)


def _here(trees: Any) -> bool:
    """Whether all arrays are concrete, and on one CPU."""
    leaves = jax.tree.leaves(trees)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return False
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    devices = {str(device) for a in arrays for device in a.sharding.device_set}
    return len(devices) < 2 and jax.default_backend() == "cpu"


def _weights(weights: Sequence[Any] | None, first: Any, count: int) -> list[list[Any]]:
    """For each expert, the weight of every leaf."""
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise ValueError(
            f"{len(given)} weights for {count} experts: one number each is expected, "
            "or one tree"
        )
    size, structure = len(jax.tree.leaves(first)), jax.tree.structure(first)
    rows = []
    for n, weight in enumerate(given):
        if jax.tree.structure(weight) == structure:  # type: ignore[operator]
            rows.append(jax.tree.leaves(weight))
        elif jnp.ndim(weight) == 0:
            rows.append([weight] * size)
        else:
            raise ValueError(
                f"weight {n} is neither a number nor a tree like the base: an array of "
                f"shape {jnp.shape(weight)} was given"
            )
    return rows


def check_alike(first: Any, experts: Sequence[Any]) -> None:
    """Refuses no experts, packed ones, and trees whose paths or shapes differ.

    Args:
      first: the base, or the first expert where there is none.
      experts: N trees.

    Raises:
      ValueError: naming the first path.

    >>> check_alike({"a": 1.0}, [])
    Traceback (most recent call last):
    ValueError: no expert was given, at least one is expected
    """
    if not experts:
        raise ValueError("no expert was given, at least one is expected")
    for each in (first, *experts):
        tree.refuse_packed(each, "merged")
    for n, expert in enumerate(experts):
        if gap := tree.difference(first, expert):
            path, wanted, found = gap
            raise ValueError(
                f"expert {n} has {'nothing' if found is None else found} at {path}, "
                f"the base has {'nothing' if wanted is None else wanted}: equal trees "
                "are expected"
            )


def _check_integers(paths: Sequence[str], leaves: Sequence[Any], columns) -> None:
    """Refuses leaves that cannot be averaged and are not equal everywhere."""
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        traced = isinstance(leaf, jax.core.Tracer)
        if traced or jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        if not all(bool((jnp.asarray(column[i]) == leaf).all()) for column in columns):
            raise ValueError(
                f"{path} holds integers that differ between the trees: they cannot be "
                "averaged; take the leaf out, or make it equal"
            )
