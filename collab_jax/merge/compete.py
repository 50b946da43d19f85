"""Parameters that compete: PCB-Merging, whose weights come from products of deltas.

All statistics are over the whole model, so they are surveys: those of `ranked` to find
the extremes of all products exactly (extremes do not add up over leaves, histograms do)
and the threshold, one for the denominators of the softmaxes.

Shapes: N experts, S the shape of a leaf, D the entries of the model.
"""

from typing import Any

import jax
import jax.numpy as jnp

from collab_jax import order
from collab_jax.merge import magnitude, ranked
from collab_jax.merge.sparsify import trim_whole
from collab_jax.merge.stack import Stack, Survey, Transform, chain, total
from collab_jax.merge.weigh import scale


def compete() -> Transform:
    """Weighs each entry of a delta by its size, and by its agreement with the others.

    `w_i = softmax(N norm(tau_i tau_i)) * sum_j softmax(norm(tau_i tau_j))`, entry by
    entry, up to one factor for all; softmaxes and `norm(x) = (x - min x) / (max x - min
    x)` are over the whole model. The weights before it are multiplied into the deltas,
    once these have competed.

    Source: PCB-Merging, arXiv 2410.02396, equations 1 and 2. The authors' code takes
    `exp(N norm(|tau_i|)^2) * tanh(tau_i sum_j tau_j)` instead.

    >>> from collab_jax.merge.memory import merge
    >>> base, ones = {"a": jnp.zeros(2)}, {"a": jnp.array([1.0, 0.0])}
    >>> merge(compete(), base, [ones])["a"].round(4).tolist()  # (2 e / (1 + e)) ** 2
    [2.1377, 0.0]
    """

    def products(stack: Stack) -> dict[tuple[int, int], jax.Array]:
        """Those of each pair, in single precision."""
        deltas = [delta.astype(jnp.float32) for delta in stack.deltas]
        pairs = [(i, j) for i in range(len(deltas)) for j in range(i, len(deltas))]
        # bounded, so that no program fuses the product with what follows, and rounds
        # otherwise than the one that found the extremes
        most = jnp.finfo(jnp.float32).max
        return {(i, j): jnp.minimum(deltas[i] * deltas[j], most) for i, j in pairs}

    def ordered(stack: Stack) -> list[jax.Array]:
        return [order.ordered(x) for x in products(stack).values()]

    def ends(counts, size):
        """The smallest and the largest product."""
        return [magnitude.entries(counts), 1]

    search = ranked.surveys(ordered, ends, ranked.digits(32))

    def normal(stack, facts):
        found = {}
        extremes = facts[len(search) - 1]
        for (pair, x), own in zip(products(stack).items(), extremes, strict=True):
            low, high = (_number(jnp.uint32(bits)) for bits, _ in own)
            found[pair] = (x - low) / jnp.where(high > low, high - low, 1)
        return found

    def inner(stack, facts):
        """Numerators: of each expert with itself, and of each pair."""
        found, count = normal(stack, facts), len(stack.deltas)
        own = [jnp.exp(count * found[i, i]) for i in range(count)]
        return own, {pair: jnp.exp(x) for pair, x in found.items()}

    def ask_sums(stack, name, facts):
        return jax.tree.map(jnp.sum, inner(stack, facts))

    def means(sums, facts, size):
        return jax.tree.map(lambda x: x / float(size), sums)

    def apply(stack: Stack, name: str, facts: Any) -> Stack:
        own, cross = inner(stack, facts)
        own_mean, cross_mean = facts[len(search)]
        shares = {pair: x / jnp.float32(cross_mean[pair]) for pair, x in cross.items()}
        weights = tuple(
            own[i] / jnp.float32(own_mean[i])
            * total(shares[min(i, j), max(i, j)] for j in range(len(own)))
            for i in range(len(own))
        )  # fmt: skip
        moved = (w * d for w, d in zip(stack.weights, stack.deltas, strict=True))
        precision = stack.base.dtype
        return stack._replace(
            deltas=tuple(moved), weights=tuple(w.astype(precision) for w in weights)
        )

    survey = *search, Survey(ask_sums, means)
    return Transform(apply, survey, lambda name, shape: ())


def _number(bits: jax.Array) -> jax.Array:
    """The float32 of a uint32 of `order.ordered`."""
    plain = jnp.where(bits >> 31 == 1, bits ^ jnp.uint32(1 << 31), ~bits)
    return jax.lax.bitcast_convert_type(plain, jnp.float32)


def keep_heaviest(density) -> Transform:
    """Keeps each expert's largest weights over the whole model; the rest is zero.

    What is tied with the last of them is kept too, and weights whose first 16 bits
    agree count as tied: the program that compares need not round as that one did which
    found the threshold.

    Args:
      density: share of the entries to keep, in (0, 1].

    Raises:
      ValueError: for a density outside of (0, 1].

    Source: PCB-Merging, arXiv 2410.02396.

    >>> from collab_jax.merge.memory import merge
    >>> zero, ones = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    >>> weight = {"a": jnp.array([1.0, 3.0])}
    >>> merge(keep_heaviest(0.5), zero, [ones], [weight])["a"].tolist()
    [0.0, 3.0]
    """
    inner = trim_whole(density)

    def turned(stack: Stack) -> Stack:
        weights = (jnp.broadcast_to(w, stack.base.shape) for w in stack.weights)
        return stack._replace(
            deltas=tuple(jax.lax.reduce_precision(w, 8, 15) for w in weights)
        )

    def turn(entry):
        return entry._replace(
            ask=lambda stack, name, facts: entry.ask(turned(stack), name, facts)
        )

    def apply(stack, name, facts):
        found = inner.apply(turned(stack), name, facts).deltas
        return stack._replace(
            weights=tuple(
                jnp.where(mark != 0, w, 0)
                for mark, w in zip(found, stack.weights, strict=True)
            )
        )

    return Transform(apply, tuple(turn(e) for e in inner.survey), inner.case)


def share(stack: Stack) -> Stack:
    """Divides the weights by their sum, entry by entry; where it is zero they stay so.

    Args:
      stack: one leaf.

    >>> one, w = jnp.ones(2), (jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0]))
    >>> [w.tolist() for w in share(Stack(one, (one, one), w, None)).weights]
    [[0.25, 0.0], [0.75, 0.0]]
    """
    whole = total(stack.weights)
    whole = jnp.where(whole == 0, 1, whole)
    return stack._replace(weights=tuple(w / whole for w in stack.weights))


def pcb(density=0.1, lam=1.0) -> Transform:
    """Parameter competition balancing: PCB-Merging.

    `delta = sum_i b_i tau_i / sum_i b_i`, where b_i are the weights of `compete`, each
    expert's largest kept and the rest zero.

    Args:
      density: share of each expert's entries to keep, over the whole model.
      lam: scale of the merged delta.

    Raises:
      ValueError: for a density outside of (0, 1].

    Source: arXiv 2410.02396.

    >>> from collab_jax.merge.memory import merge
    >>> base, a = {"a": jnp.zeros(4)}, {"a": jnp.array([3.0, 0.1, 0.2, -1.0])}
    >>> merge(pcb(0.25), base, [a])["a"].tolist()
    [3.0, 0.0, 0.0, 0.0]
    """
    return chain(compete(), keep_heaviest(density), share, scale(lam))
