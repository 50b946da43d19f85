"""Parts that set small, or random, entries of the deltas to zero.

Shapes: N experts, S the shape of a leaf, M its entries.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from collab_jax.merge import magnitude, noise, rank, ranked
from collab_jax.merge.magnitude import kept
from collab_jax.merge.pieces import flat, hosted
from collab_jax.merge.stack import Stack, Transform, total


def check_share(name: str, value) -> None:
    """Refuses a number outside of (0, 1]; a tracer passes.

    >>> check_share("density", 0.0)
    Traceback (most recent call last):
    ValueError: density = 0.0 was given, a number in (0, 1] is expected
    """
    if not isinstance(value, jax.core.Tracer) and not 0 < float(value) <= 1:
        raise ValueError(f"{name} = {value} was given, a number in (0, 1] is expected")


def trim(density, ties: str = "all") -> Callable[[Stack], Stack]:
    """Keeps each delta's entries of largest magnitude, leaf by leaf; the rest is zero.

    Of M entries `max(1, int(density * M))` are kept.

    Args:
      density: share of the entries to keep, in (0, 1].
      ties: "all" keeps whatever is tied with the last of them too, "first" those that
        come first.

    Raises:
      ValueError: for a density outside of (0, 1].

    Source: arXiv 2306.01708 (there over the whole model: `trim_whole`).

    >>> deltas = (jnp.array([1.0, -3.0, 2.0, 0.5]),)
    >>> stack = Stack(jnp.zeros(4), deltas, (1.0,), jax.random.key(0))
    >>> trim(0.5)(stack).deltas[0].tolist()
    [0.0, -3.0, 2.0, 0.0]
    """
    check_share("density", density)

    @hosted
    def apply(stack: Stack) -> Stack:
        count = kept(density, stack.base.size)
        return keep_largest([count] * len(stack.deltas), ties)(stack)

    return apply


def keep_largest(counts: Sequence, ties: str = "all") -> Callable[[Stack], Stack]:
    """Keeps so many entries of largest magnitude of each delta; the rest is zero.

    Args:
      counts: N numbers or tracers, at most M each.
      ties: see `trim`.

    >>> deltas = jnp.array([1.0, -3.0, 2.0]), jnp.array([1.0, 2.0, 3.0])
    >>> stack = Stack(jnp.zeros(3), deltas, (1.0, 1.0), jax.random.key(0))
    >>> [delta.tolist() for delta in keep_largest([1, 2])(stack).deltas]
    [[0.0, -3.0, 0.0], [0.0, 2.0, 3.0]]
    """

    @hosted
    @flat
    def apply(stack: Stack) -> Stack:
        masks = magnitude.largest(stack.deltas, counts, ties)
        deltas = tuple(
            jnp.where(mask, delta, 0)
            for mask, delta in zip(masks, stack.deltas, strict=True)
        )
        return stack._replace(deltas=deltas)

    return apply


def trim_whole(density) -> Transform:
    """Keeps each delta's entries of largest magnitude over the whole model.

    The k-th magnitude is exact (of float64, as float32 has it) and found digit by
    digit, see `ranked`. The model may stream through memory, and unless the density is
    a tracer it may have more entries than an int32 counts.

    Args:
      density: share of the entries to keep, in (0, 1].

    Raises:
      ValueError: for a density outside of (0, 1].

    Source: arXiv 2306.01708.

    >>> from collab_jax.merge.memory import merge
    >>> base = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    >>> expert = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 0.5])}
    >>> merged = merge(trim_whole(0.5), base, [expert])
    >>> merged["a"].tolist(), merged["b"].tolist()
    ([0.0, 4.0], [3.0, 0.0])
    """
    check_share("density", density)

    def patterns(stack: Stack) -> list[jax.Array]:
        return [magnitude.pattern(jnp.float32(delta)) for delta in stack.deltas]

    def ranks(counts, size):
        return [kept(density, size)]

    survey = ranked.surveys(patterns, ranks, ranked.digits(31))

    def apply(stack, name, facts):
        deltas = tuple(
            jnp.where(values >= jnp.uint32(least), delta, 0)
            for values, delta, ((least, _),) in zip(
                patterns(stack), stack.deltas, facts[len(survey) - 1], strict=True
            )
        )
        return stack._replace(deltas=deltas)

    return Transform(apply, survey, lambda name, shape: (), flat=True)


def drop_and_rescale(p) -> Callable[[Stack], Stack]:
    """Drops each entry with probability p and divides the others by 1 - p.

    `delta' = m * delta / (1 - p)`, `m ~ Bernoulli(1 - p)`; the mean is kept.

    Args:
      p: probability of a drop, in [0, 1).

    Raises:
      ValueError: for p outside of [0, 1).

    Source: DARE, arXiv 2311.03099.

    >>> deltas = (jnp.ones(1000),)
    >>> stack = Stack(jnp.zeros(1000), deltas, (1.0,), jax.random.key(0))
    >>> sorted(set(drop_and_rescale(0.5)(stack).deltas[0].tolist()))
    [0.0, 2.0]
    """
    if not isinstance(p, jax.core.Tracer) and not 0 <= float(p) < 1:
        raise ValueError(f"p = {p} was given, a number in [0, 1) is expected")
    return drop([1 - p], lambda delta, mask: jnp.where(mask, delta / (1 - p), 0))


def drop(
    keep: Sequence, rescale: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[Stack], Stack]:
    """Draws a mask for each delta, and lets `rescale` apply it.

    Args:
      keep: probabilities to keep an entry, one for all deltas or N; each `[]` or
        `[*S]`.
      rescale: (delta, mask) -> the new delta.

    >>> half = drop([0.5], lambda delta, mask: jnp.where(mask, delta, 0))
    >>> stack = Stack(jnp.zeros(8), (jnp.ones(8),), (1.0,), jax.random.key(0))
    >>> half(stack).deltas[0].shape
    (8,)
    """

    @flat
    def apply(stack: Stack) -> Stack:
        drawn, rest = (noise.fold_in(stack.key, n) for n in range(2))
        shares = list(keep) * (len(stack.deltas) if len(keep) == 1 else 1)
        deltas = tuple(
            rescale(delta, noise.bernoulli(noise.fold_in(drawn, n), q, delta.shape))
            for n, (delta, q) in enumerate(zip(stack.deltas, shares, strict=True))
        )
        return stack._replace(deltas=deltas, key=rest)

    return apply


def select_varying(share) -> Callable[[Stack], Stack]:
    """Keeps the entries in which the experts differ most; the rest is zero.

    Of M entries `max(1, int(share * M))` of largest variance over the experts are kept,
    and those that are tied with the last of them. The variance of N numbers is, up to a
    factor, the sum of the squared differences of all pairs.

    Args:
      share: of the entries to keep, in (0, 1].

    Raises:
      ValueError: for a share outside of (0, 1].

    Source: the selection of SCE, arXiv 2408.07990.

    >>> deltas = jnp.array([1.0, -3.0, 2.0]), jnp.array([1.0, 3.0, 1.0])
    >>> stack = Stack(jnp.zeros(3), deltas, (1.0, 1.0), jax.random.key(0))
    >>> [delta.tolist() for delta in select_varying(0.67)(stack).deltas]
    [[0.0, -3.0, 2.0], [0.0, 3.0, 1.0]]
    """
    check_share("share", share)

    @hosted
    def apply(stack: Stack) -> Stack:
        pairs = itertools.combinations(stack.deltas, 2)
        spread = total(
            [
                jnp.zeros_like(stack.base),
                *(rounded(jnp.square(a - b)) for a, b in pairs),
            ]
        )
        mask = magnitude.among_largest(spread, kept(share, spread.size))
        return stack._replace(
            deltas=tuple(jnp.where(mask, delta, 0) for delta in stack.deltas)
        )

    return apply


def rounded(product: jax.Array) -> jax.Array:
    """A product that no compiler fuses with a sum that follows.

    Where a threshold and what is compared with it are computed in two loops, a product
    that is rounded in one of them alone loses the entry that the threshold is.

    Args:
      product: finite, or infinity, which becomes the largest number.

    >>> rounded(jnp.array([2.0, jnp.inf]))[0].item()
    2.0
    """
    return jnp.minimum(product, jnp.finfo(product.dtype).max)


def keep_band(beta, gamma) -> Callable[[Stack], Stack]:
    """Drops the entries of smallest and of largest magnitude of each delta.

    Of M entries those with ranks from `int(beta M)` up to `M - int(gamma M)` are kept;
    ties are ranked by position.

    Args:
      beta: share of the smallest to drop, at least 0.
      gamma: share of the largest to drop, at least 0; `beta + gamma < 1`.

    Raises:
      ValueError: for shares outside of that.

    Source: Model Breadcrumbs, arXiv 2312.06795.

    >>> deltas = (jnp.array([1.0, -3.0, 2.0, 0.5]),)
    >>> stack = Stack(jnp.zeros(4), deltas, (1.0,), jax.random.key(0))
    >>> keep_band(0.5, 0.25)(stack).deltas[0].tolist()
    [0.0, 0.0, 2.0, 0.0]
    """
    traced = any(isinstance(share, jax.core.Tracer) for share in (beta, gamma))
    if not traced and not (beta >= 0 and gamma >= 0 and beta + gamma < 1):
        raise ValueError(
            f"beta = {beta} and gamma = {gamma} were given: shares from 0 that sum to "
            "less than 1 are expected"
        )

    def floor(share, size: int):
        if isinstance(share, jax.core.Tracer):
            return jnp.floor(share * size).astype(jnp.int32)
        return int(share * size)

    def apply(stack: Stack) -> Stack:
        size = stack.base.size
        low, high = floor(beta, size), size - floor(gamma, size)
        return stack._replace(
            deltas=tuple(
                jnp.where(rank.band(delta, low, high), delta, 0)
                for delta in stack.deltas
            )
        )

    return apply


def drop_by_rank(density, epsilon) -> Callable[[Stack], Stack]:
    """Drops entries at random, small ones of a row more often, and rescales the rest.

    `delta'_i = m_i delta_i / p_i`, `m_i ~ Bernoulli(p_i)`; p_i rises from
    `density - epsilon` for the smallest magnitude of a row (the last axis) to
    `density + epsilon` for the largest; the mean is kept. A row of one has p = density.

    Args:
      density: mean share of the entries to keep.
      epsilon: at least 0; `0 < density - epsilon`, `density + epsilon <= 1`.

    Raises:
      ValueError: for numbers outside of that.

    Source: MagPrune of DELLA, arXiv 2406.11617.

    >>> stack = Stack(jnp.zeros(2), (jnp.array([1.0, 3.0]),), (1.0,), jax.random.key(0))
    >>> [float(x) for x in drop_by_rank(0.5, 0.5 - 1e-6)(stack).deltas[0]]  # p: 0 and 1
    [0.0, 3.0]
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in (density, epsilon))
    if not traced and not 0 <= epsilon < density <= 1 - epsilon:
        raise ValueError(
            f"density = {density} and epsilon = {epsilon} were given: density - "
            "epsilon > 0 and density + epsilon <= 1 are expected"
        )

    @hosted
    @flat
    def apply(stack: Stack) -> Stack:
        count = len(stack.deltas)
        lows, highs = [density - epsilon] * count, [density + epsilon] * count
        shares = rank.rising(stack.deltas, lows, highs)
        larger = (d / p for d, p in zip(stack.deltas, shares, strict=True))
        dropped = drop(shares, lambda delta, mask: jnp.where(mask, delta, 0))
        return dropped(stack._replace(deltas=tuple(larger)))

    return apply
