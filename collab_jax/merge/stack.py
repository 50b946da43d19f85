"""The algebra of merging: `Stack`, `Transform`, `chain`, and what drivers run.

Every merge is `theta = base + sum_n w_n * delta_n`, leaf by leaf. A transform edits the
weights and deltas of one leaf at a time, so that any merge is a chain of small parts
and streams through memory. What a part must know beyond its leaf stands in its
`survey`: a `Survey` is one more pass over the model, whose summaries are added up over
the leaves; a `Schedule` gives the numbers that belong to a leaf's name.

The N deltas of a leaf are a tuple of arrays, not one array with an axis N: so XLA fuses
a whole chain into one loop over the leaf, without a temporary array.

Shapes: N experts, S the shape of a leaf.
"""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import tree

Summary = Any  # a tree of arrays that add up over leaves
Facts = tuple[Any, ...]  # what the entries of a survey gave, in order
Shape = tuple[int, ...]


class Stack(NamedTuple):
    """One leaf of all experts, in the working precision."""

    base: jax.Array  # [*S]
    deltas: tuple[jax.Array, ...]  # N of [*S], expert minus base
    weights: tuple[jax.Array, ...]  # N of [] or [*S]
    key: jax.Array  # [] typed key, folded from the leaf's name


class Survey(NamedTuple):
    """A question to the whole model."""

    # (stack, name of the leaf, facts of the entries before) -> summary
    ask: Callable[[Stack, str, Facts], Summary]
    # (sum of the summaries, facts of the entries before, entries counted) -> the fact;
    # outside of jit the sum is in 64 bits of NumPy
    settle: Callable[[Summary, Facts, int], Any] = lambda total, facts, size: total
    # (name, shape) -> entries of the leaf that count
    size: Callable[[str, Shape], int] = lambda name, shape: math.prod(shape)


class Schedule(NamedTuple):
    """Numbers that belong to a leaf's name."""

    at: Callable[[str, Shape], Any]  # (name, shape) -> a tree of numbers or tracers


def _alike(name: str, shape: Shape) -> Hashable:
    return ()


class Transform(NamedTuple):
    """A part of a merge."""

    # (stack, name of the leaf, facts) -> stack
    apply: Callable[[Stack, str, Facts], Stack]
    survey: tuple[Survey | Schedule, ...] = ()
    # what of a leaf's name `apply` and `ask` look at: leaves with equal cases and
    # shapes share one compiled program; None: at all of it
    case: Callable[[str, Shape], Hashable] | None = None
    # whether it works on any stretch of the flattened leaf, see `pieces`
    flat: bool = False
    # whether it has steps that a CPU's host takes faster, see `pieces.on_host`
    hosted: bool = False


Part = Transform | Callable[[Stack], Stack]


def lift(part: Part) -> Transform:
    """A transform as it is, and a function of the stack alone as a transform.

    >>> halved = lift(lambda s: s._replace(weights=tuple(w / 2 for w in s.weights)))
    >>> halved.survey
    ()
    """
    if isinstance(part, Transform):
        return part
    return Transform(
        lambda stack, name, facts: part(stack),
        case=_alike,
        flat=getattr(part, "flat", False),
        hosted=getattr(part, "hosted", False),
    )


def chain(*parts: Part) -> Transform:
    """Parts in order: each edits what those before it have made.

    `chain()` changes nothing: its merge is the weighted sum of the deltas.

    Args:
      *parts: transforms, or functions from Stack to Stack.

    Returns:
      A transform. The surveys of a part see the stack as the parts before it leave it.

    >>> from collab_jax.merge.memory import merge
    >>> from collab_jax.merge.weigh import scale
    >>> merge(chain(scale(2), scale(2)), {"a": jnp.zeros(2)}, [{"a": jnp.ones(2)}])
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

    def behind(i: int, entry: Survey | Schedule) -> Survey | Schedule:
        if isinstance(entry, Schedule):
            return entry

        def ask(stack, name, facts):
            return entry.ask(upto(i, stack, name, facts), name, own(i, facts))

        def settle(total, facts, size):
            return entry.settle(total, own(i, facts), size)

        return entry._replace(ask=ask, settle=settle)

    cases = [t.case for t in transforms if t.case is not _alike]
    return Transform(
        lambda stack, name, facts: upto(len(transforms), stack, name, facts),
        tuple(behind(i, e) for i, t in enumerate(transforms) for e in t.survey),
        _cases(cases),
        all(transform.flat for transform in transforms),
        any(transform.hosted for transform in transforms),
    )


def _cases(cases: Sequence[Callable[[str, Shape], Hashable] | None]):
    known = [case for case in cases if case is not None]
    if len(known) < len(cases):
        return None
    return (
        (lambda name, shape: tuple(c(name, shape) for c in known))
        if known
        else (_alike)
    )


def where(pattern: str, part: Part) -> Transform:
    """A part that edits only the leaves whose whole name matches an expression.

    Its surveys see those leaves alone.

    Args:
      pattern: regular expression for `re.fullmatch`.
      part: what happens to them.

    >>> from collab_jax.merge.memory import merge
    >>> from collab_jax.merge.weigh import scale
    >>> base, expert = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.ones(1)}
    >>> merge(where("b", scale(0)), base, [expert | {"b": jnp.ones(1)}])
    {'a': Array([1.], dtype=float32), 'b': Array([0.], dtype=float32)}
    """
    transform = lift(part)

    def matches(name: str) -> bool:
        return bool(tree.select({name: 0}, pattern))

    def apply(stack, name, facts):
        return transform.apply(stack, name, facts) if matches(name) else stack

    def inside(entry):
        if isinstance(entry, Schedule):
            return entry

        def ask(stack, name, facts):
            summary = entry.ask(stack, name, facts)
            return summary if matches(name) else jax.tree.map(jnp.zeros_like, summary)

        def size(name, shape):
            return entry.size(name, shape) if matches(name) else 0

        return entry._replace(ask=ask, size=size)

    def case(name, shape):
        inner = transform.case
        return matches(name) and (True if inner is None else inner(name, shape))

    survey = tuple(inside(entry) for entry in transform.survey)
    seen = None if transform.case is None else case
    return Transform(apply, survey, seen, transform.flat, transform.hosted)


def scheduled(
    make: Callable[[dict[str, Any]], Part],
    at: Callable[[str, Shape], dict[str, Any]],
    flat: bool = False,
    hosted: bool = False,
) -> Transform:
    """A part whose knobs depend on the leaf: per layer, per name, learned per leaf.

    Numbers are arguments of the compiled program, so that a schedule over a hundred
    layers compiles no more than one number does.

    Args:
      make: from the knobs of a leaf to a part without surveys.
      at: (name, shape) -> knobs by name: numbers, tracers or trees of them; and
        booleans, strings or None, which choose the program.
      flat: whether every part that `make` returns is flat.
      hosted: whether one of them has steps on the host.

    >>> from collab_jax.merge.memory import merge
    >>> from collab_jax.merge.weigh import scale
    >>> later = scheduled(lambda knobs: scale(knobs["by"]),
    ...                   lambda name, shape: {"by": 0.5 if name == "a" else 2.0})
    >>> base, expert = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.ones(1)}
    >>> merge(later, base, [expert | {"b": jnp.ones(1)}])
    {'a': Array([0.5], dtype=float32), 'b': Array([2.], dtype=float32)}
    """

    def split(name, shape):
        knobs = at(name, shape)
        words = {k: v for k, v in knobs.items() if v is None or type(v) in (bool, str)}
        return words, {k: v for k, v in knobs.items() if k not in words}

    def apply(stack, name, facts):
        words, _ = split(name, stack.base.shape)
        part = lift(make(words | facts[0]))
        if part.survey:
            raise ValueError("a part with surveys was scheduled: put it into the chain")
        return part.apply(stack, name, ())

    def case(name, shape):
        words, numbers = split(name, shape)
        return tuple(sorted(words.items())), jax.tree.structure(numbers)

    numbers = Schedule(lambda name, shape: split(name, shape)[1])
    return Transform(apply, (numbers,), case, flat, hosted)


def total(terms: Iterable[Any]) -> Any:
    """The sum of arrays, in order: `x_0 + x_1 + ...`, how parts sum over experts.

    >>> total([1, 2, 3])
    6
    """
    return functools.reduce(operator.add, terms)


def combine(stack: Stack) -> jax.Array:
    """The merged leaf, `base + sum_n w_n * delta_n`, `[*S]`.

    >>> deltas, weights = (jnp.array([1.0]), jnp.array([2.0])), (0.5, 1.0)
    >>> combine(Stack(jnp.array([10.0]), deltas, weights, jax.random.key(0))).tolist()
    [12.5]
    """
    moved = (w * d for w, d in zip(stack.weights, stack.deltas, strict=True))
    return stack.base + total(moved)


def stack_leaf(base: Any, experts: Sequence[Any], weights: Sequence[Any], key) -> Stack:
    """One leaf of all experts as a `Stack`, in the working precision.

    Args:
      base: `[*S]`, or None: the deltas are then the experts.
      experts: N of `[*S]`.
      weights: N of `[]` or `[*S]`.
      key: of the leaf.

    >>> found = stack_leaf(jnp.ones(1), [jnp.full(1, 3.0)], [1.0], jax.random.key(0))
    >>> found.deltas[0].tolist()
    [2.0]
    """
    first = jnp.asarray(experts[0] if base is None else base)
    precision = jnp.promote_types(first.dtype, jnp.float32)
    wide = tuple(jnp.asarray(expert, precision) for expert in experts)
    if base is None:
        start, deltas = jnp.zeros(first.shape, precision), wide
    else:
        start = jnp.asarray(base, precision)
        deltas = tuple(expert - start for expert in wide)
    return Stack(start, deltas, tuple(jnp.asarray(w, precision) for w in weights), key)
