"""Parts that set small, or random, entries of the deltas to zero.

Shapes: N experts, S the shape of a leaf.
"""

import jax
import jax.numpy as jnp

from collab_jax import order
from collab_jax.merge.stack import Stack, Transform

_LOW = 16  # bits of the magnitude that the second survey decides


def _check_share(name: str, value) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0 < float(value) <= 1:
        raise ValueError(f"{name} = {value} was given, a number in (0, 1] is expected")


def trim(density):
    """Keeps each delta's entries of largest magnitude, leaf by leaf; the rest is zero.

    Of M entries `max(1, int(density * M))` are kept, and whatever is tied with the
    last of them.

    Args:
      density: share of the entries to keep, in (0, 1].

    Raises:
      ValueError: for a density outside of (0, 1].

    Source: arXiv 2306.01708 (there over the whole model: `trim_whole`).

    >>> stack = Stack(jnp.zeros(4), jnp.array([[1.0, -3.0, 2.0, 0.5]]), jnp.ones(1),
    ...               jax.random.key(0))
    >>> trim(0.5)(stack).deltas.tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """
    _check_share("density", density)

    def apply(stack: Stack) -> Stack:
        size = jnp.abs(stack.deltas).reshape(len(stack.deltas), -1)
        kept = order.among_largest(size, _kept(density, size.shape[1])).reshape(
            stack.deltas.shape
        )
        return stack._replace(deltas=jnp.where(kept, stack.deltas, 0))

    return apply


def trim_whole(density) -> Transform:
    """Keeps each delta's entries of largest magnitude over the whole model.

    The k-th magnitude is exact: a histogram of the upper bits of all magnitudes finds
    its bin, one of the lower bits inside that bin finds the number. The two histograms
    are surveys and add up over leaves, so the model may stream through memory; counts
    are exact below 2 ** 32 entries.

    Args:
      density: share of the entries to keep, in (0, 1].

    Raises:
      ValueError: for a density outside of (0, 1].

    Source: arXiv 2306.01708.

    >>> from collab_jax.merge.stack import merge
    >>> base = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    >>> expert = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 0.5])}
    >>> merged = merge(trim_whole(0.5), base, [expert])
    >>> merged["a"].tolist(), merged["b"].tolist()
    ([0.0, 4.0], [3.0, 0.0])
    """
    _check_share("density", density)

    def bits(stack: Stack) -> jax.Array:
        """Magnitudes as `[N, M]` uint32 below 2 ** 31, of the same order."""
        size = jnp.abs(stack.deltas).reshape(len(stack.deltas), -1)
        return order.ordered(size) - jnp.uint32(1 << 31)

    def histogram(index, counted, bins: int) -> jax.Array:
        rows = jnp.arange(len(index))[:, None]
        zeros = jnp.zeros((len(index), bins), jnp.uint32)
        return zeros.at[rows, index].add(counted.astype(jnp.uint32))

    def upper(stack, name, facts):
        magnitude = bits(stack)
        every = jnp.ones(magnitude.shape, bool)
        counts = histogram(magnitude >> _LOW, every, 1 << (31 - _LOW))
        return counts, magnitude.shape[1]  # a number of Python: exact, and no tracer

    def lower(stack, name, facts):
        magnitude = bits(stack)
        inside = magnitude >> _LOW == found(facts[0])[0][:, None]
        return histogram(magnitude & ((1 << _LOW) - 1), inside, 1 << _LOW)

    def found(fact) -> tuple[jax.Array, jax.Array]:
        """The bin of the k-th largest, and its rank inside, `[N]` each."""
        counts, size = fact
        rank = jnp.full(len(counts), _kept(density, size), jnp.uint32)
        return _at_rank(counts, rank)

    def apply(stack, name, facts):
        bin_, rest = found(facts[0])
        digit, _ = _at_rank(facts[1], rest)
        least = (bin_ << _LOW) | digit
        kept = (bits(stack) >= least[:, None]).reshape(stack.deltas.shape)
        return stack._replace(deltas=jnp.where(kept, stack.deltas, 0))

    return Transform(apply, (upper, lower))


def _kept(density, size: int):
    """`max(1, int(density * size))`, exact unless the density is a tracer."""
    if isinstance(density, jax.core.Tracer):
        return jnp.maximum(1, jnp.floor(density * size)).astype(jnp.uint32)
    return max(1, int(density * size))


def _at_rank(counts: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bin of the rank-th largest of a histogram `[N, bins]`, and the rank inside it."""
    above = jnp.cumsum(counts[:, ::-1], axis=-1)[:, ::-1]  # that lie in it or higher
    found = (above >= rank[:, None]).sum(-1) - 1
    rows = jnp.arange(len(counts))
    higher = above[rows, found] - counts[rows, found]
    return found.astype(jnp.uint32), rank - higher


def drop_and_rescale(p):
    """Drops each entry with probability p and divides the others by 1 - p.

    `delta' = m * delta / (1 - p)`, `m ~ Bernoulli(1 - p)`; the mean is kept.

    Args:
      p: probability of a drop, in [0, 1).

    Raises:
      ValueError: for p outside of [0, 1).

    Source: DARE, arXiv 2311.03099.

    >>> stack = Stack(jnp.zeros(1000), jnp.ones((1, 1000)), jnp.ones(1),
    ...               jax.random.key(0))
    >>> sorted(set(drop_and_rescale(0.5)(stack).deltas[0].tolist()))
    [0.0, 2.0]
    """
    if not isinstance(p, jax.core.Tracer) and not 0 <= float(p) < 1:
        raise ValueError(f"p = {p} was given, a number in [0, 1) is expected")

    def apply(stack: Stack) -> Stack:
        key, rest = jax.random.split(stack.key)
        kept = jax.random.bernoulli(key, 1 - p, stack.deltas.shape)
        deltas = jnp.where(kept, stack.deltas / (1 - p), 0)
        return stack._replace(deltas=deltas, key=rest)

    return apply
