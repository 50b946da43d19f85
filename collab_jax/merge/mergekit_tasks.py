"""mergekit's methods that edit task vectors: sparsify, agree, weigh.

Everything is decided leaf by leaf. Counts are whole numbers that `merge.mergekit` has
worked out in double precision, so that a leaf's program sees no density.

Shapes: N experts, S the shape of a leaf, M its entries.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from collab_jax.merge import magnitude, pieces, rank, sparsify
from collab_jax.merge.agree import disjoint_mean, elect_sign
from collab_jax.merge.mergekit_vectors import reweigh
from collab_jax.merge.stack import Part, Stack, chain, lift, total
from collab_jax.merge.weigh import scale


def same_size(part: Part) -> Callable[[Stack], Stack]:
    """What a part leaves of each delta, brought back to the L1 norm from before.

    `delta'' = delta' * sum|delta| / sum|delta'|`, unless one of the sums is below 1e-7.
    This is how mergekit rescales, where the papers divide by a probability.

    Args:
      part: one without surveys.

    >>> from collab_jax.merge.sparsify import trim
    >>> stack = Stack(jnp.zeros(2), (jnp.array([1.0, 3.0]),), (1,), jax.random.key(0))
    >>> same_size(trim(0.5))(stack).deltas[0].tolist()
    [0.0, 4.0]
    """
    inner = lift(part)

    def apply(stack: Stack) -> Stack:
        after = inner.apply(stack, "", ())
        was = [abs(delta).sum() for delta in stack.deltas]
        now = [pieces.summed(abs(delta)) for delta in after.deltas]
        was, now = pieces.over_leaf([was, now])
        deltas = []
        for delta, old, new in zip(after.deltas, was, now, strict=True):
            known = (old >= 1e-7) & (new >= 1e-7)
            ratio = jnp.where(known, old / jnp.where(known, new, 1), 1)
            deltas.append(delta * ratio.astype(delta.dtype))
        return after._replace(deltas=tuple(deltas))

    marked = pieces.hosted(apply) if inner.hosted else apply
    return pieces.flat(marked) if inner.flat else marked


def arithmetic(
    sparse: Part | None = None, elect=False, normalize=False, lam=1.0
) -> Part:
    """Sum of task vectors, sparsified first and agreeing on a sign, as wanted.

    `theta = theta_0 + lam * sum_n w_n delta_n`, over the sum of the weights if
    normalised: of those that agree, or of all (1 where that is within 1e-8 of 0).

    Args:
      sparse: what thins the deltas.
      elect: whether entries must have the sign of the weighted sum; +1 where it is 0.
      normalize: whether to divide.
      lam: a number or tracer.

    Source: arXiv 2212.04089, 2306.01708; mergekit's `task_arithmetic` and its kin.

    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.ones(2)}, {"a": jnp.array([2.0, 3.0])}
    >>> merge(arithmetic(lam=0.5), base, [expert])["a"].tolist()
    [1.5, 2.0]
    """
    parts: list[Part] = [] if sparse is None else [sparse]
    if elect:
        parts.append(elect_sign)
    if normalize:
        parts.append(disjoint_mean if elect else _mean)
    return chain(*parts, scale(lam))


@pieces.flat
def _mean(stack: Stack) -> Stack:
    whole = total(stack.weights)
    whole = jnp.where(abs(whole) < 1e-8, 1, whole)
    return reweigh(stack, [weight / whole for weight in stack.weights])


def keep_band(outer: Sequence, inner: Sequence) -> Callable[[Stack], Stack]:
    """Keeps the entries among the `outer` largest, not among the `inner` largest.

    Args:
      outer: N numbers or tracers, `inner` to M.
      inner: N numbers or tracers, from 0.

    Source: Model Breadcrumbs, arXiv 2312.06795.

    >>> stack = Stack(jnp.zeros(3), (jnp.array([1.0, 9.0, 2.0]),), (1,), None)
    >>> keep_band([2], [1])(stack).deltas[0].tolist()
    [0.0, 0.0, 2.0]
    """

    @pieces.hosted
    @pieces.flat
    def apply(stack: Stack) -> Stack:
        count, ends = len(stack.deltas), [*outer, *inner]
        masks = magnitude.largest(stack.deltas * 2, ends, "first")
        deltas = tuple(
            jnp.where(masks[n] & ~masks[count + n], delta, 0)
            for n, delta in enumerate(stack.deltas)
        )
        return stack._replace(deltas=deltas)

    return apply


def drop_by_rank(lows: Sequence, highs: Sequence) -> Callable[[Stack], Stack]:
    """Keeps entries with a probability that rises with the rank of their magnitude.

    Ranks are taken along the second axis, of vectors along the only one.

    Args:
      lows: N probabilities for the least magnitude of a row.
      highs: for the largest.

    Source: DELLA, arXiv 2406.11617.

    >>> stack = Stack(jnp.zeros(2), (jnp.array([1.0, 2.0]),), (1,), jax.random.key(0))
    >>> drop_by_rank([0.0], [1.0])(stack).deltas[0].tolist()
    [0.0, 2.0]
    """

    @pieces.hosted
    @pieces.flat
    def apply(stack: Stack) -> Stack:
        chances = rank.rising(stack.deltas, lows, highs, axis=1)
        return sparsify.drop(chances, _masked)(stack)

    return apply


def _masked(delta, mask):
    return jnp.where(mask, delta, 0)


def drop_by_chance(chances: Sequence) -> Callable[[Stack], Stack]:
    """Keeps each entry with a probability.

    Args:
      chances: N probabilities.

    Source: DARE without its rescaling, arXiv 2311.03099.

    >>> stack = Stack(jnp.zeros(2), (jnp.ones(2),), (1,), jax.random.key(0))
    >>> drop_by_chance([1.0])(stack).deltas[0].tolist()
    [1.0, 1.0]
    """
    return sparsify.drop(chances, _masked)


def sce(select: bool = False, select_topk=1.0, size=None) -> Part:
    """Select, calculate, erase: weights from the energy of the task vectors.

    Of all entries with a variance over the experts, the share `select_topk` that varies
    most is kept; `c_n = mean(delta_n^2) / sum_m mean(delta_m^2)`, or 1/N where that sum
    is below 1e-6; entries that oppose the sum of the deltas are erased; the result is
    `theta_0 + sum_n c_n m_n delta_n / max(sum_n c_n m_n, 1e-6)`.

    Args:
      select: whether to select at all.
      select_topk: a number or tracer.
      size: M, where the stack may hold a piece of the leaf.

    Source: arXiv 2408.07990; mergekit's `sce`.

    >>> from collab_jax.merge.memory import merge
    >>> experts = {"a": jnp.array([1.0, 1.0])}, {"a": jnp.array([2.0, -1.0])}
    >>> merge(sce(), {"a": jnp.zeros(2)}, experts)["a"].round(4).tolist()
    [1.7143, 1.0]
    """

    @pieces.flat
    def apply(stack: Stack) -> Stack:
        if select:
            kept = _most_varied(stack.deltas, select_topk)
            deltas = tuple(jnp.where(kept, delta, 0) for delta in stack.deltas)
            stack = stack._replace(deltas=deltas)
        squares = pieces.over_leaf([(delta * delta).sum() for delta in stack.deltas])
        entries = stack.base.size if size is None else size
        energy = [jnp.asarray(x, stack.base.dtype) / entries for x in squares]
        whole, count = total(energy), len(energy)
        small = whole < 1e-6
        shares = [
            jnp.where(small, 1 / count, e / jnp.where(small, 1, whole)) for e in energy
        ]
        positive = total(stack.deltas) >= 0
        kept_shares = [
            jnp.where(jnp.where(positive, delta > 0, delta < 0), share, 0)
            for delta, share in zip(stack.deltas, shares, strict=True)
        ]
        divisor = jnp.maximum(total(kept_shares), 1e-6)
        return reweigh(stack, [share / divisor for share in kept_shares])

    return pieces.hosted(apply) if select else apply


def _most_varied(deltas: Sequence[jax.Array], share) -> jax.Array:
    """Of the entries with a variance, the share that varies most, `[*S]` bool."""
    mean, squares = deltas[0], jnp.zeros_like(deltas[0])
    for n, delta in enumerate(deltas[1:], 2):  # Welford: equal deltas vary by exactly 0
        gap = delta - mean
        mean = mean + gap / n
        squares = squares + sparsify.rounded(gap * (delta - mean))
    varies = pieces.over_leaf((squares / len(deltas) != 0).sum(dtype=jnp.int32))
    # float32, as mergekit multiplies a tensor that counts by a number
    count = jnp.floor(jnp.float32(varies) * jnp.asarray(share, jnp.float32))
    return magnitude.among_largest(squares, count.astype(jnp.int32), "first")


def ram(epsilon=1e-5) -> Part:
    """The mean of the task vectors that are not zero, entry by entry.

    `w_n = [|delta_n| > epsilon] / max(1, sum_m [|delta_m| > epsilon])`.

    Args:
      epsilon: what counts as zero; a number or tracer.

    Source: arXiv 2601.13572; mergekit's `ram`.

    >>> from collab_jax.merge.memory import merge
    >>> experts = {"a": jnp.array([1.0, 1.0])}, {"a": jnp.array([0.0, 3.0])}
    >>> merge(ram(), {"a": jnp.zeros(2)}, experts)["a"].tolist()
    [1.0, 2.0]
    """

    @pieces.flat
    def apply(stack: Stack) -> Stack:
        changed, count = _changed(stack, epsilon)
        each = 1 / jnp.maximum(count, 1).astype(stack.base.dtype)
        return reweigh(stack, [jnp.where(mask, each, 0) for mask in changed])

    return apply


def _changed(stack: Stack, epsilon) -> tuple[list[jax.Array], jax.Array]:
    """Which entries each expert has changed, and how many experts each entry."""
    changed = [abs(delta) > epsilon for delta in stack.deltas]
    return changed, total(mask.astype(jnp.int32) for mask in changed)


def ramplus_tl(r=0.1, alpha=0.2, epsilon=1e-5) -> Part:
    """`ram`, where entries that one expert alone has changed weigh more.

    They weigh `1 + r clip(rho_n, 0, alpha)`, rho_n the expert's count of entries shared
    with others over those it has alone (at least epsilon). The result has the inputs'
    type; mergekit gives float32.

    Args:
      r: a number or tracer.
      alpha: the highest ratio that counts; likewise.
      epsilon: what counts as zero; likewise.

    Source: arXiv 2601.13572, tensor by tensor; mergekit's `ramplus_tl`.

    >>> from collab_jax.merge.memory import merge
    >>> experts = {"a": jnp.array([1.0, 1.0])}, {"a": jnp.array([0.0, 3.0])}
    >>> merge(ramplus_tl(1.0, 0.5), {"a": jnp.zeros(2)}, experts)["a"].tolist()
    [1.5, 2.0]
    """

    @pieces.flat
    def apply(stack: Stack) -> Stack:
        changed, count = _changed(stack, epsilon)
        each = 1 / jnp.maximum(count, 1).astype(stack.base.dtype)
        counts = pieces.over_leaf(
            [
                [(mask & kind).sum(dtype=jnp.int32) for kind in (count > 1, count == 1)]
                for mask in changed
            ]
        )
        weights = []
        for mask, (shared, alone) in zip(changed, counts, strict=True):
            # a ratio of counts is float32 there, for float64 too
            ratio = jnp.float32(shared) / jnp.maximum(alone, jnp.float32(epsilon))
            gain = 1 + jnp.float32(r) * jnp.clip(ratio, 0, jnp.float32(alpha))
            weight = jnp.where(count == 1, gain.astype(each.dtype), each)
            weights.append(jnp.where(mask, weight, 0))
        return reweigh(stack, weights)

    return apply


def arcee_fusion() -> Part:
    """Takes a model's entries where they matter, and the base's elsewhere.

    An entry matters by `|b - a| KL(softmax b || softmax a)`, the divergence of its row
    along the last axis; it is taken at `median + 1.5 (q_3 - q_1)` or above. Quartiles
    are exact; mergekit draws a million entries of what is larger. A divergence that
    rounding leaves below zero is zero. Deltas are the base and one model; the result
    has their type, where mergekit gives float32.

    Source: mergekit's `arcee_fusion`.

    >>> from collab_jax.merge.memory import merge
    >>> base = {"a": jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}
    >>> model = {"a": jnp.array([[0.1, 0.0], [3.0, 0.0], [0.0, 0.1]])}
    >>> merge(arcee_fusion(), None, [base, model])["a"].tolist()
    [[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]]
    """

    def apply(stack: Stack) -> Stack:
        a, b = stack.deltas
        scores = abs(b - a) * _divergence(b, a)
        last = scores.size - 1
        q1, q2, q3 = (
            _from_pattern(magnitude.threshold(scores, scores.size - place), scores)
            for place in (last // 4, last // 2, 3 * last // 4)
        )
        mask = jnp.where(scores >= q2 + 1.5 * (q3 - q1), 1, 0).astype(scores.dtype)
        return reweigh(stack, [1 - mask, mask])

    return apply


def _divergence(b: jax.Array, a: jax.Array) -> jax.Array:
    if a.ndim == 0:  # a row of one entry
        return jnp.zeros_like(a)
    p, q = (jax.nn.softmax(x, axis=-1) + 1e-8 for x in (b, a))
    return jnp.maximum((p * jnp.log(p / q)).sum(-1, keepdims=True), 0)


def _from_pattern(bits: jax.Array, like: jax.Array) -> jax.Array:
    precision = jnp.float64 if like.dtype == jnp.float64 else jnp.float32
    return jax.lax.bitcast_convert_type(bits, precision)
