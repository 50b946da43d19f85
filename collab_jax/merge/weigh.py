"""Parts that set the weights.

Shapes: N experts, S the shape of a leaf.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from collab_jax.merge import spherical
from collab_jax.merge.pieces import flat, over_leaf
from collab_jax.merge.stack import Part, Stack, Survey, Transform, lift, total


def scale(factor):
    """Multiplies the weights.

    Args:
      factor: a number or tracer; negative to forget.

    >>> one = jnp.ones(1)
    >>> stack = Stack(one, (one, one), (1.0, 3.0), jax.random.key(0))
    >>> scale(0.5)(stack).weights
    (0.5, 1.5)
    """

    @flat
    def apply(stack: Stack) -> Stack:
        return stack._replace(weights=tuple(factor * w for w in stack.weights))

    return apply


@flat
def mean(stack: Stack) -> Stack:
    """Divides the weights by their sum: `w'_n = w_n / sum_m w_m`.

    Args:
      stack: one leaf.

    >>> one = jnp.ones(1)
    >>> mean(Stack(one, (one, one), (1.0, 3.0), jax.random.key(0))).weights
    (0.25, 0.75)
    """
    whole = total(stack.weights)
    return stack._replace(weights=tuple(weight / whole for weight in stack.weights))


def by_place(factors: Sequence | Callable[[int], Sequence]) -> Callable[[Stack], Stack]:
    """Multiplies the weights by factors of the experts' places: first, second, ...

    Args:
      factors: N numbers or tracers, or a function from N to them.

    Raises:
      ValueError: when it meets a stack with another number of experts.

    >>> one = jnp.ones(1)
    >>> stack = Stack(one, (one, one), (1.0, 1.0), jax.random.key(0))
    >>> by_place([0.25, 0.75])(stack).weights
    (0.25, 0.75)
    """

    @flat
    def apply(stack: Stack) -> Stack:
        count = len(stack.weights)
        given = list(factors(count) if callable(factors) else factors)
        if len(given) != count:
            raise ValueError(
                f"{count} experts were given, this merge takes {len(given)}: it has a "
                "weight for each place"
            )
        weights = zip(given, stack.weights, strict=True)
        return stack._replace(weights=tuple(f * w for f, w in weights))

    return apply


@flat
def by_square(stack: Stack) -> Stack:
    """Multiplies the weights by the squared norm of each delta of this leaf.

    `w'_n = w_n ||delta_n||^2`; where all deltas are zero the weights stay.

    Args:
      stack: one leaf.

    Source: FuseChat's VaRM, arXiv 2402.16107.

    >>> deltas = jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (1.0, 1.0), jax.random.key(0))
    >>> [float(weight) for weight in by_square(stack).weights]
    [2.0, 4.0]
    """
    squares = [jnp.square(delta).sum() for delta in stack.deltas]
    found = over_leaf(squares, _or_ones)
    return _times(stack, [jnp.asarray(x, stack.base.dtype) for x in found])


def by_norm() -> Transform:
    """Multiplies the weights by the squared norm of each delta over the whole model.

    `w'_n = w_n ||delta_n||^2`; where all deltas are zero the weights stay.

    Source: MetaGPT, arXiv 2406.11385.

    >>> from collab_jax.merge.memory import merge
    >>> base = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    >>> expert = {"a": jnp.ones(1), "b": jnp.full(1, 2.0)}
    >>> merge(by_norm(), base, [expert])["a"].tolist()
    [5.0]
    """

    def ask(stack, name, facts):
        return [jnp.square(delta).sum() for delta in stack.deltas]

    def apply(stack, name, facts):
        return _times(stack, [jnp.asarray(x, stack.base.dtype) for x in facts[0]])

    survey = Survey(ask, lambda totals, facts, size: _or_ones(totals))
    return Transform(apply, (survey,), lambda name, shape: (), flat=True)


def cosines(stack: Stack) -> list[jax.Array]:
    """The cosine between each pair of deltas, `N (N - 1) / 2` of `[]`.

    A delta that is zero has cosine 0 to every other.

    Args:
      stack: one leaf.

    >>> deltas = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]), jnp.array([0.0, 0.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (1.0, 1.0, 1.0), jax.random.key(0))
    >>> [round(float(cosine), 3) for cosine in cosines(stack)]
    [0.707, 0.0, 0.0]
    """
    norms = spherical.norms(stack.deltas)
    units = [d / _above_zero(n) for d, n in zip(stack.deltas, norms, strict=True)]
    pairs = list(itertools.combinations(units, 2))
    products = spherical.inner(pairs) if pairs else []
    return [jnp.clip(product, -1, 1) for product in products]


def _above_zero(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > 0, norm, 1)


def mean_cosine(stack: Stack) -> jax.Array:
    """The mean of the cosines between the deltas, `[]`; 1 for a single expert.

    Args:
      stack: one leaf.

    >>> deltas = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (1.0, 1.0), jax.random.key(0))
    >>> float(mean_cosine(stack))
    0.0
    """
    found = cosines(stack)
    return total(found) / len(found) if found else jnp.ones((), stack.base.dtype)


def cosine_of_mean_angle(stack: Stack) -> jax.Array:
    """The cosine of the mean angle between the deltas, `[]`; 1 for a single expert.

    Args:
      stack: one leaf.

    >>> deltas = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (1.0, 1.0, 1.0), jax.random.key(0))
    >>> round(float(cosine_of_mean_angle(stack)), 3)  # of 60 degrees
    0.5
    """
    angles = [jnp.arccos(cosine) for cosine in cosines(stack)]
    if not angles:
        return jnp.ones((), stack.base.dtype)
    return jnp.cos(total(angles) / len(angles))


def by_agreement(
    cosine: Callable[[Stack], jax.Array],
) -> Callable[[Stack], Stack]:
    """Multiplies the weights by a ratio that is smaller the less the deltas agree.

    `w'_n = t w_n`, `t = N cos / (1 + (N - 1) cos)`, and 0 where the divisor is.

    Args:
      cosine: of the angle between the deltas of a stack: `mean_cosine` or
        `cosine_of_mean_angle`.

    Source: Model Stock, arXiv 2403.19522.

    >>> deltas = jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (0.5, 0.5), jax.random.key(0))
    >>> [float(weight) for weight in by_agreement(mean_cosine)(stack).weights]
    [0.5, 0.5]
    """

    @flat
    def apply(stack: Stack) -> Stack:
        count, found = len(stack.deltas), cosine(stack)
        divisor = 1 + (count - 1) * found
        safe = jnp.where(divisor > 1e-6, divisor, 1)
        return scale(jnp.where(divisor > 1e-6, count * found / safe, 0))(stack)

    return apply


def on_sphere(max_iter=100, tol=1e-6) -> Callable[[Stack], Stack]:
    """The weights of a mean of directions, on the sphere, with the mean length.

    `sum_n w'_n delta_n = (sum_n a_n ||delta_n||) u`, `a_n = w_n / sum_m w_m`, and u the
    Karcher mean of `delta_n / ||delta_n||` with weights a. A delta that is zero counts
    with its length alone. The weights are one number each.

    Args:
      max_iter: steps at most.
      tol: the length of a step that ends them, in radians.

    Source: Karcher 1977; arXiv 2603.04972 for merging.

    >>> deltas = jnp.array([2.0, 0.0]), jnp.array([0.0, 4.0])
    >>> stack = Stack(jnp.zeros(2), deltas, (1.0, 1.0), jax.random.key(0))
    >>> [round(float(w), 3) for w in on_sphere()(stack).weights]  # length 3, 45 degrees
    [1.061, 0.53]
    """

    @flat
    def apply(stack: Stack) -> Stack:
        norms = jnp.stack(spherical.norms(stack.deltas))
        lengths = _above_zero(norms)
        units = [delta / lengths[n] for n, delta in enumerate(stack.deltas)]
        shares = jnp.stack(mean(stack).weights)
        known = jnp.where(norms > 0, shares, 0)
        known = jnp.where((known > 0).any(), known, 1)
        around = spherical.karcher_weights(
            spherical.squared_distances(units), known, max_iter, tol
        )
        weights = (shares * norms).sum() * around / lengths
        return stack._replace(weights=tuple(weights))

    return apply


def unweighted(part: Part) -> Transform:
    """A part that sees equal weights of 1, and leaves the weights as they were.

    Args:
      part: edits the deltas.

    >>> from collab_jax.merge.agree import elect_sign
    >>> from collab_jax.merge.memory import merge
    >>> experts = [{"a": jnp.array([2.0])}, {"a": jnp.array([-1.0])}]
    >>> merge(unweighted(elect_sign), None, experts, [1.0, 9.0])["a"].tolist()
    [2.0]
    """
    inner = lift(part)

    def ones(stack: Stack) -> Stack:
        one = jnp.ones((), stack.base.dtype)
        return stack._replace(weights=(one,) * len(stack.weights))

    def apply(stack, name, facts):
        return inner.apply(ones(stack), name, facts)._replace(weights=stack.weights)

    def seen(entry):
        if not isinstance(entry, Survey):
            return entry
        return entry._replace(
            ask=lambda stack, name, facts: entry.ask(ones(stack), name, facts)
        )

    return inner._replace(apply=apply, survey=tuple(seen(e) for e in inner.survey))


def _times(stack: Stack, factors: Sequence) -> Stack:
    weights = zip(factors, stack.weights, strict=True)
    return stack._replace(weights=tuple(f * w for f, w in weights))


def _or_ones(values: Sequence) -> list:
    """The values, or ones where all are zero."""
    nothing = total(values) == 0
    return [jnp.where(nothing, 1, value) for value in values]
