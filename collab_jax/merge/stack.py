"""The algebra of merging: `Stack`, `Transform`, `chain`, `merge`.

Every merge is `theta = base + sum_n w_n * delta_n`, leaf by leaf. A transform edits the
weights and deltas of one leaf at a time, so that any merge is a chain of small parts
and streams through memory. What a part must know of the whole model, it asks for in a
survey: one more pass, whose summaries are added up over the leaves.

Shapes: N experts, S the shape of a leaf.
"""

import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import tree

Summary = Any  # a tree of arrays that add up over leaves
Facts = tuple[Summary, ...]  # the results of the surveys so far, in order


class Stack(NamedTuple):
    """One leaf of all experts, in the working precision."""

    base: jax.Array  # [*S]
    deltas: jax.Array  # [N, *S], expert minus base
    weights: jax.Array  # [N], or [N, *S]
    key: jax.Array  # [] typed key, folded from the leaf's name


class Transform(NamedTuple):
    """A part of a merge."""

    # (stack, name of the leaf, facts) -> stack
    apply: Callable[[Stack, str, Facts], Stack]
    # passes over the model before: (stack, name, facts of the passes before) -> summary
    survey: tuple[Callable[[Stack, str, Facts], Summary], ...] = ()


Part = Transform | Callable[[Stack], Stack]


def lift(part: Part) -> Transform:
    """A transform as it is, and a function of the stack alone as a transform.

    >>> halved = lift(lambda stack: stack._replace(weights=stack.weights / 2))
    >>> halved.survey
    ()
    """
    if isinstance(part, Transform):
        return part
    return Transform(lambda stack, name, facts: part(stack))


def chain(*parts: Part) -> Transform:
    """Parts in order: each edits what those before it have made.

    `chain()` changes nothing: its merge is the weighted sum of the deltas.

    Args:
      *parts: transforms, or functions from Stack to Stack.

    Returns:
      A transform. The surveys of a part see the stack as the parts before it leave it.

    >>> double = lambda stack: stack._replace(weights=2 * stack.weights)
    >>> merge(chain(double, double), {"a": jnp.zeros(2)}, [{"a": jnp.ones(2)}])
    {'a': Array([4., 4.], dtype=float32)}
    """
    transforms = [lift(part) for part in parts]
    starts = [0]
    for transform in transforms:
        starts.append(starts[-1] + len(transform.survey))

    def own(i: int, facts: Facts) -> Facts:
        return facts[starts[i] : starts[i + 1]]

    def upto(count: int, stack: Stack, name: str, facts: Facts) -> Stack:
        for i, transform in enumerate(transforms[:count]):
            stack = transform.apply(stack, name, own(i, facts))
        return stack

    def surveyor(i: int, ask):
        return lambda stack, name, facts: ask(
            upto(i, stack, name, facts), name, own(i, facts)
        )

    return Transform(
        lambda stack, name, facts: upto(len(transforms), stack, name, facts),
        tuple(surveyor(i, ask) for i, t in enumerate(transforms) for ask in t.survey),
    )


def where(pattern: str, part: Part) -> Transform:
    """A part that edits only the leaves whose whole name matches an expression.

    Its surveys see those leaves alone.

    Args:
      pattern: regular expression for `re.fullmatch`.
      part: what happens to them.

    >>> nothing = lambda stack: stack._replace(weights=0 * stack.weights)
    >>> base, expert = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.ones(1)}
    >>> merge(where("b", nothing), base, [expert | {"b": jnp.ones(1)}])
    {'a': Array([1.], dtype=float32), 'b': Array([0.], dtype=float32)}
    """
    transform = lift(part)

    def matches(name: str) -> bool:
        return bool(tree.select({name: 0}, pattern))

    def apply(stack, name, facts):
        return transform.apply(stack, name, facts) if matches(name) else stack

    def surveyor(ask):
        def seen(stack, name, facts):
            summary = ask(stack, name, facts)
            if matches(name):
                return summary
            return jax.tree.map(lambda leaf: leaf * 0, summary)

        return seen

    return Transform(apply, tuple(surveyor(ask) for ask in transform.survey))


def spread(stack: Stack) -> jax.Array:
    """The weights with an axis for each of the leaf's, to multiply deltas by.

    >>> weights = jnp.ones(2)
    >>> spread(Stack(jnp.zeros(3), jnp.ones((2, 3)), weights, jax.random.key(0))).shape
    (2, 1)
    """
    missing = stack.deltas.ndim - stack.weights.ndim
    return stack.weights.reshape(stack.weights.shape + (1,) * missing)


def combine(stack: Stack) -> jax.Array:
    """The merged leaf, `base + sum_n w_n * delta_n`, `[*S]`.

    >>> deltas, weights = jnp.array([[1.0], [2.0]]), jnp.array([0.5, 1.0])
    >>> combine(Stack(jnp.array([10.0]), deltas, weights, jax.random.key(0))).tolist()
    [12.5]
    """
    return stack.base + (spread(stack) * stack.deltas).sum(0)


def merge(
    part: Part,
    base: Any,
    experts: Sequence[Any],
    weights: Any = None,
    key: jax.Array | None = None,
) -> Any:
    """Merges trees of one structure: models, adapters, heads, updates of clients.

    Each leaf is merged in float32 (float64 if it is that) and rounded to the base's
    type. Random parts draw from the key and the leaf's name alone, so that the same
    key makes the same masks whatever the order, the sharding, or the jit.

    Args:
      part: what edits weights and deltas; `chain()` for a plain weighted sum.
      base: the tree that the experts were made from, or None to merge without one:
        the deltas are then the experts themselves.
      experts: N trees.
      weights: `[N]` numbers or tracers; None is 1 for each.
      key: one typed key for random parts; None is `jax.random.key(0)`.

    Returns:
      A tree with the base's structure and types. A leaf of integers is the base's, and
      must be equal everywhere.

    Raises:
      ValueError: without experts, for a wrong number of weights, or for trees that
        differ, naming the first path.

    Source: arXiv 2212.04089 for the form.

    >>> base, expert = {"a": jnp.zeros(2)}, {"a": jnp.array([1.0, 2.0])}
    >>> merge(chain(), base, [expert, expert], weights=[0.5, 1.0])["a"].tolist()
    [1.5, 3.0]
    """
    experts = list(experts)
    if not experts:
        raise ValueError("no expert was given, at least one is expected")
    weights = (
        jnp.ones(len(experts))
        if weights is None
        else jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    )
    if weights.shape != (len(experts),):
        raise ValueError(
            f"weights of shape {weights.shape} for {len(experts)} experts: one number "
            "each is expected"
        )
    first = experts[0] if base is None else base
    _check_alike(first, experts)
    key = jax.random.key(0) if key is None else key
    columns = [jax.tree.leaves(expert) for expert in experts]
    transform = lift(part)

    def stack(i: int, name: str, leaf: jax.Array) -> Stack:
        precision = jnp.promote_types(leaf.dtype, jnp.float32)
        start = jnp.zeros(leaf.shape, precision) if base is None else leaf
        start = jnp.asarray(start, precision)
        deltas = [jnp.asarray(column[i], precision) - start for column in columns]
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return Stack(start, jnp.stack(deltas), weights.astype(precision), leaf_key)

    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(first)]
    _check_integers(tree.paths(first), leaves, columns)
    merged = [
        (i, name, leaf)
        for i, (name, leaf) in enumerate(zip(tree.paths(first), leaves, strict=True))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    merged.sort(key=lambda entry: entry[1])
    facts: Facts = ()
    for ask in transform.survey:
        summaries = [ask(stack(*entry), entry[1], facts) for entry in merged]
        total = summaries[0]
        for summary in summaries[1:]:
            total = jax.tree.map(operator.add, total, summary)
        facts = (*facts, total)
    result = list(leaves)
    for i, name, leaf in merged:
        edited = transform.apply(stack(i, name, leaf), name, facts)
        result[i] = combine(edited).astype(leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(first), result)


def _check_alike(first: Any, experts: Sequence[Any]) -> None:
    """Refuses trees whose paths or shapes differ."""
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
