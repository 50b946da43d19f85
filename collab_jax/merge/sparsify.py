"""Parts that set small, or random, entries of the deltas to zero.

Shapes: N experts, S the shape of a leaf, M its entries.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from collab_jax.merge import magnitude, noise
from collab_jax.merge.magnitude import kept
from collab_jax.merge.stack import Stack, Survey, Transform


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

    def apply(stack: Stack) -> Stack:
        deltas = tuple(
            jnp.where(magnitude.among_largest(delta, count, ties), delta, 0)
            for delta, count in zip(stack.deltas, counts, strict=True)
        )
        return stack._replace(deltas=deltas)

    return apply


def trim_whole(density) -> Transform:
    """Keeps each delta's entries of largest magnitude over the whole model.

    The k-th magnitude is exact (of float64, as float32 has it): a histogram of the
    upper bits of all magnitudes finds its bin, one of the lower bits inside that bin
    finds the number. The two histograms are surveys and add up over leaves, so the
    model may stream through memory. Inside `jit`, counts are exact below 2 ** 31
    entries; outside always.

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
    upper, lower = magnitude.digits(jnp.float32)

    def patterns(stack: Stack) -> list[jax.Array]:
        return [magnitude.pattern(jnp.float32(delta)) for delta in stack.deltas]

    def ask_upper(stack, name, facts):
        return [magnitude.histogram(values, upper) for values in patterns(stack)]

    def bins(totals, facts, size):
        """For each expert, the bin of the k-th largest, and its rank inside."""
        return [magnitude.at_rank(counts, kept(density, size)) for counts in totals]

    def ask_lower(stack, name, facts):
        return [
            magnitude.histogram(values, lower, jnp.uint32(bin_))
            for values, (bin_, _) in zip(patterns(stack), facts[0], strict=True)
        ]

    def thresholds(totals, facts, size):
        return [
            (bin_ << upper.shift) | magnitude.at_rank(counts, rank)[0]
            for counts, (bin_, rank) in zip(totals, facts[0], strict=True)
        ]

    def apply(stack, name, facts):
        deltas = tuple(
            jnp.where(values >= jnp.uint32(least), delta, 0)
            for values, delta, least in zip(
                patterns(stack), stack.deltas, facts[1], strict=True
            )
        )
        return stack._replace(deltas=deltas)

    survey = Survey(ask_upper, bins), Survey(ask_lower, thresholds)
    return Transform(apply, survey, lambda name, shape: ())


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

    def apply(stack: Stack) -> Stack:
        drawn, rest = jax.random.split(stack.key)
        shares = list(keep) * (len(stack.deltas) if len(keep) == 1 else 1)
        deltas = tuple(
            rescale(
                delta, noise.bernoulli(jax.random.fold_in(drawn, n), q, delta.shape)
            )
            for n, (delta, q) in enumerate(zip(stack.deltas, shares, strict=True))
        )
        return stack._replace(deltas=deltas, key=rest)

    return apply
