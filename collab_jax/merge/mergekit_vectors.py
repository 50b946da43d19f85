"""mergekit's methods that see a leaf as a vector: means, arcs and mixtures of models.

Where a docstring says "deltas are the models" the stack is made without a base, and a
base model is the first of the deltas. Weights come with the stack.

Shapes: N experts, S the shape of a leaf.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from collab_jax.merge import spherical
from collab_jax.merge.pieces import flat
from collab_jax.merge.stack import Part, Stack, chain, total
from collab_jax.merge.weigh import mean


def reweigh(stack: Stack, weights: Sequence) -> Stack:
    """The stack with these weights.

    Args:
      stack: one leaf.
      weights: N numbers or arrays that broadcast to `[*S]`.

    >>> import jax
    >>> one = jnp.ones(1)
    >>> reweigh(Stack(one, (one, one), (1, 1), jax.random.key(0)), [2, 3]).weights
    (2, 3)
    """
    return stack._replace(weights=tuple(weights))


def linear(normalize=True) -> Part:
    """Weighted sum of the models: `sum_n w_n theta_n`, over `sum_n w_n` if normalised.

    Deltas are the models.

    Args:
      normalize: whether to divide.

    Source: arXiv 2203.05482; mergekit's `linear`.

    >>> from collab_jax.merge.memory import merge
    >>> merge(linear(), None, [{"a": jnp.zeros(1)}, {"a": jnp.ones(1)}], [1, 3])
    {'a': Array([0.75], dtype=float32)}
    """
    return mean if normalize else chain()


def slerp(t) -> Part:
    """The arc from the base to a model: `(sin((1-t)θ) a + sin(tθ) b) / sin(θ)`.

    θ is the angle between the leaves as vectors, which keep their norms; where its
    cosine is beyond 0.9995 the way is straight. Deltas are the base and one model.

    Args:
      t: 0 is the base, 1 the model; a number or tracer.

    Source: Shoemake 1985; mergekit's `slerp`.

    >>> from collab_jax.merge.memory import merge
    >>> a, b = {"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([0.0, 1.0])}
    >>> merge(slerp(0.5), None, [a, b])["a"].round(4).tolist()
    [0.7071, 0.7071]
    """

    @flat
    def apply(stack: Stack) -> Stack:
        a, b = stack.deltas
        cosine = spherical.cosine(a, b)
        return reweigh(stack, spherical.arc(cosine, t, abs(cosine) > 0.9995))

    return apply


def nuslerp(row_wise=False, flatten=True) -> Part:
    """The arc between two models, or two deltas where there is a base.

    As `slerp`, with `t = w_2 / (w_1 + w_2)`, 1/2 where that sum is within 1e-6 of 0.
    The way is straight only where `1 - cos^2 <= 1e-16`. A norm below 1e-7 counts as
    that.

    Args:
      row_wise: without `flatten`, arcs along the first axis; else along the last.
      flatten: one arc for the whole leaf.

    Source: mergekit's `nuslerp`.

    >>> from collab_jax.merge.memory import merge
    >>> a, b = {"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([0.0, 1.0])}
    >>> merge(nuslerp(), None, [a, b], [1, 1])["a"].round(4).tolist()
    [0.7071, 0.7071]
    """
    axis = None if flatten else 0 if row_wise else -1

    def apply(stack: Stack) -> Stack:
        whole = total(stack.weights)
        none = abs(whole) < 1e-6
        t = jnp.where(none, 0.5, stack.weights[1] / jnp.where(none, 1, whole))
        a, b = stack.deltas
        cosine = spherical.cosine(a, b, axis, lambda n: jnp.maximum(n, 1e-7))
        return reweigh(stack, spherical.arc(cosine, t, 1 - cosine**2 <= 1e-16))

    return flat(apply) if flatten else apply


def multislerp(normalize_weights=True, eps=1e-8) -> Part:
    """The mean direction with the mean norm: `(sum_n w_n ||x_n||) m / ||m||`.

    `m = sum_n w_n x_n / (||x_n|| + eps)`; x are the models, or the deltas where there
    is a base. mergekit's way through the tangent space at m comes to that times
    `cos(eps)`, which is kept, for the mean of the tangents is zero. One input is taken
    as it is. Where `||m|| < eps` the result is `sum_n w_n x_n`; mergekit refuses that
    for more than two inputs.

    Args:
      normalize_weights: divide the weights by their sum.
      eps: a number or tracer.

    Source: mergekit's `multislerp`.

    >>> from collab_jax.merge.memory import merge
    >>> trees = {"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([0.0, 3.0])}
    >>> merge(multislerp(), None, trees, [1, 1])["a"].round(4).tolist()
    [1.4142, 1.4142]
    """

    @flat
    def apply(stack: Stack) -> Stack:
        if len(stack.deltas) == 1:
            return reweigh(stack, [jnp.ones_like(stack.weights[0])])
        if normalize_weights:
            stack = mean(stack)
        norms = spherical.norms(stack.deltas)
        shares = [w / (n + eps) for w, n in zip(stack.weights, norms, strict=True)]
        pairs = zip(shares, stack.deltas, strict=True)
        (length,) = spherical.norms([total(share * delta for share, delta in pairs)])
        size = total(w * n for w, n in zip(stack.weights, norms, strict=True))
        balanced = length < eps
        by = size * jnp.cos(eps) / jnp.where(balanced, 1, length)
        pairs = zip(stack.weights, shares, strict=True)
        return reweigh(stack, [jnp.where(balanced, w, by * s) for w, s in pairs])

    return apply


def karcher(max_iter=10, tol=1e-5) -> Part:
    """The Karcher mean of the models on the sphere, with their mean norm.

    Deltas are the models, the base model too. One input is taken as it is. Angles are
    exact here; mergekit takes those below 3e-4 from a cosine in float32, where they
    round to zero.

    Args:
      max_iter: steps at most; a number or tracer.
      tol: see `spherical.karcher`; a number or tracer.

    Source: arXiv 2603.04972; mergekit's `karcher`.

    >>> from collab_jax.merge.memory import merge
    >>> trees = {"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([0.0, 3.0])}
    >>> merge(karcher(), None, trees)["a"].round(4).tolist()
    [1.4142, 1.4142]
    """

    @flat
    def apply(stack: Stack) -> Stack:
        if len(stack.deltas) == 1:
            return reweigh(stack, [jnp.ones_like(stack.weights[0])])
        return reweigh(stack, spherical.karcher(stack.deltas, max_iter, tol))

    return apply


def nearswap(t) -> Part:
    """Takes a model's entries where they are near the base's.

    `theta = (1 - w) a + w b`, `w = clip(t / max(|a - b|, 1e-6), 0, 1)`. Deltas are the
    base and one model.

    Args:
      t: the distance up to which an entry is taken whole; a number or tracer.

    Source: mergekit's `nearswap`.

    >>> from collab_jax.merge.memory import merge
    >>> a, b = {"a": jnp.array([0.0, 0.0])}, {"a": jnp.array([0.1, 2.0])}
    >>> merge(nearswap(0.5), None, [a, b])["a"].tolist()
    [0.10000000149011612, 0.5]
    """

    @flat
    def apply(stack: Stack) -> Stack:
        a, b = stack.deltas
        share = jnp.clip(t / jnp.maximum(abs(a - b), 1e-6), 0, 1)
        return reweigh(stack, [1 - share, share])

    return apply


def passthrough(scale=None) -> Part:
    """One model, times a number.

    Args:
      scale: a number, a tracer or None for 1.

    Source: mergekit's `passthrough`.

    >>> from collab_jax.merge.memory import merge
    >>> merge(passthrough(2), None, [{"a": jnp.ones(1)}])
    {'a': Array([2.], dtype=float32)}
    """
    return flat(
        lambda stack: reweigh(stack, [jnp.ones(()) if scale is None else scale])
    )


def model_stock(filter_wise=False) -> Part:
    """Between the base and the mean of the models, by the angle between the deltas.

    `theta = theta_0 + t mean_n(delta_n)`, `t = N c / (1 + (N - 1) c)`, c the mean of
    the pairwise cosines; t = 0 where that denominator is within 1e-6 of 0.

    Args:
      filter_wise: one t for each row (along the last axis) rather than for the leaf.

    Source: arXiv 2403.19522; mergekit's `model_stock`.

    >>> from collab_jax.merge.memory import merge
    >>> experts = {"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([1.0, 1.0])}
    >>> merge(model_stock(), {"a": jnp.zeros(2)}, experts)["a"].round(4).tolist()
    [0.8284, 0.4142]
    """

    def apply(stack: Stack) -> Stack:
        axis = -1 if filter_wise and stack.base.ndim > 1 else None
        deltas, count = stack.deltas, len(stack.deltas)
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        both = [(d, d) for d in deltas] + [(deltas[i], deltas[j]) for i, j in pairs]
        products = spherical.inner(both, axis)
        norms = [spherical.root(square) for square in products[:count]]
        cosines = [
            jnp.clip(product / jnp.maximum(norms[i] * norms[j], 1e-6), -1, 1)
            for (i, j), product in zip(pairs, products[count:], strict=True)
        ]
        c = total(cosines) / len(cosines)
        denominator = 1 + (count - 1) * c
        singular = abs(denominator) < 1e-6
        t = jnp.where(singular, 0, count * c / jnp.where(singular, 1, denominator))
        return reweigh(stack, [t / count] * count)

    return apply if filter_wise else flat(apply)
