"""Merges that keep one model per expert: a shared delta, and a mask of bits for each.

Shapes: N experts, S the shape of a leaf, M its entries.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import tree
from collab_jax.io import safetensors
from collab_jax.io.layout import Layout
from collab_jax.merge.memory import check_alike, merge
from collab_jax.merge.pieces import add
from collab_jax.merge.stack import Part, Transform, chain, lift, total
from collab_jax.merge.weigh import scale


class Localized(NamedTuple):
    """N models: `theta_n = base + scale_n * mask_n * shared`."""

    base: Any  # a tree, theta_0
    shared: Any  # a tree like it; leaves of integers are empty
    masks: Any  # a tree like it, of [N, ceil(M / 8)] uint8: bits of the flat leaf
    scales: jax.Array  # [N]

    def materialise(self, n) -> Any:
        """The model of one expert, with the base's types; n may be a tracer."""

        def leaf(base, shared, masks):
            base = jnp.asarray(base)
            if shared.shape != base.shape:
                return base
            precision = jnp.promote_types(base.dtype, jnp.float32)
            bits = jnp.unpackbits(jnp.asarray(masks)[n], count=base.size)
            moved = jnp.where(bits.reshape(base.shape) == 1, shared, 0)
            factor = jnp.asarray(self.scales)[n].astype(precision)
            return (base + factor * moved.astype(precision)).astype(base.dtype)

        return jax.tree.map(leaf, self.base, self.shared, self.masks)

    def bytes(self) -> dict[str, int]:
        """Bytes of each part, and of N whole models instead (`apart`)."""
        sizes = {"base": self.base, "shared": self.shared, "masks": self.masks}
        found = {name: tree.size(part) for name, part in sizes.items()}
        return {**found, "apart": len(self.scales) * found["base"]}


def emr(base: Any, experts: Sequence[Any]) -> Localized:
    """Elects a shared delta, masks it for each expert, and rescales it.

    The sign of `sum_n tau_n` is elected, and of the entries with that sign the largest
    magnitude makes tau; `mask_n = [tau_n tau > 0]`, and `scale_n = sum |tau_n| / sum
    |mask_n tau|` over the whole model. (The authors' code adds up means of tensors
    there.) A sum of zero counts as negative, as in that code.

    Args:
      base: the tree that the experts were made from.
      experts: N trees.

    Raises:
      ValueError: without experts, or for trees that differ.

    Source: EMR-Merging, arXiv 2405.17461.

    >>> base = {"a": jnp.zeros(3)}
    >>> a, b = {"a": jnp.array([1.0, 2.0, 0.0])}, {"a": jnp.array([3.0, -1.0, 0.0])}
    >>> found = emr(base, [a, b])
    >>> found.shared["a"].tolist()
    [3.0, 2.0, 0.0]
    >>> found.materialise(0)["a"].round(3).tolist()
    [1.8, 1.2, 0.0]
    """
    columns = _columns(base, experts)
    totals, shared, masks = None, [], []
    for leaf, column in columns:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            one, bits, sums = _elect(leaf, column)
            totals = add(totals, sums)
        else:
            one, bits = _nothing(leaf, len(column))
        shared.append(one)
        masks.append(bits)
    own, kept = (jnp.asarray(x) for x in (totals or (np.ones(len(experts)),) * 2))
    scales = jnp.where(kept > 0, own / jnp.where(kept > 0, kept, 1), 1)
    return _localized(base, shared, masks, scales.astype(jnp.float32))


@jax.jit
def _elect(base, experts):
    deltas = _deltas(base, experts)
    positive = total(deltas) > 0
    agree = [jnp.where(positive, delta > 0, delta < 0) for delta in deltas]
    sizes = [jnp.where(mask, abs(d), 0) for mask, d in zip(agree, deltas, strict=True)]
    largest = functools.reduce(jnp.maximum, sizes)
    own = jnp.stack([abs(delta).sum() for delta in deltas])
    kept = jnp.stack([jnp.where(mask, largest, 0).sum() for mask in agree])
    shared = jnp.where(positive, largest, -largest).astype(base.dtype)
    return shared, _packed(agree), (own, kept)


def tall_masks(
    base: Any, experts: Sequence[Any], part: Part | None = None, threshold=0.4
) -> Localized:
    """Finds in a merged delta the entries that each expert relies on.

    `mask_n = [|tau_n| >= threshold_n |tau - tau_n|]`, where tau is the merged delta;
    all scales are 1.

    Args:
      base: the tree that the experts were made from.
      experts: N trees.
      part: makes tau; None is the sum of the deltas.
      threshold: a number, or one for each expert; 0.2 to 0.6 is typical.

    Raises:
      ValueError: without experts, for trees that differ, or for a wrong number of
        thresholds.

    Source: TALL-masks, arXiv 2405.07813.

    >>> base = {"a": jnp.zeros(3)}
    >>> a, b = {"a": jnp.array([1.0, 2.0, 0.0])}, {"a": jnp.array([3.0, -1.0, 0.5])}
    >>> tall_masks(base, [a, b]).materialise(0)["a"].tolist()
    [0.0, 1.0, 0.0]
    """
    columns = _columns(base, experts)
    limits = _thresholds(threshold, len(experts))
    whole = merge(chain() if part is None else part, *_wide((base, experts)))
    shared, masks = [], []
    for (leaf, column), merged in zip(columns, jax.tree.leaves(whole), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            one, bits = _rely(leaf, column, merged, limits)
        else:
            one, bits = _nothing(leaf, len(column))
        shared.append(one)
        masks.append(bits)
    return _localized(base, shared, masks, jnp.ones(len(experts), jnp.float32))


@jax.jit
def _rely(base, experts, merged, limits):
    tau = merged - jnp.asarray(base, merged.dtype)
    masks = _relies(_deltas(base, experts), tau, limits)
    return tau.astype(base.dtype), _packed(masks)


def _relies(deltas, tau, limits) -> list[jax.Array]:
    pairs = zip(deltas, limits, strict=True)
    return [abs(delta) >= limit * abs(tau - delta) for delta, limit in pairs]


def keep_consensus(part: Part, k: int = 2, threshold=0.4) -> Transform:
    """Merges, and keeps the entries on which at least k experts rely.

    The masks are those of `tall_masks`, with the merged delta that `part` leaves.

    Args:
      part: merges the deltas; `chain()` for their weighted sum.
      k: 0 keeps all, 1 drops what no expert relies on, 2 also what only one does.
      threshold: a number, or one for each expert.

    Raises:
      ValueError: for a negative k.

    Source: Consensus merging, arXiv 2405.07813.

    >>> base = {"a": jnp.zeros(3)}
    >>> a, b = {"a": jnp.array([1.0, 2.0, 0.0])}, {"a": jnp.array([2.0, -0.5, 0.5])}
    >>> merge(keep_consensus(chain(), 2), base, [a, b])["a"].tolist()
    [3.0, 0.0, 0.0]
    """
    if not k >= 0:
        raise ValueError(f"k = {k} was given, a number of experts is expected")
    transform = lift(part)

    def apply(stack, name, facts):
        limits = _thresholds(threshold, len(stack.deltas))
        after = transform.apply(stack, name, facts)
        tau = total(w * d for w, d in zip(after.weights, after.deltas, strict=True))
        masks = _relies(stack.deltas, tau, limits)
        kept = total(mask.astype(jnp.int32) for mask in masks) >= k
        return after._replace(
            deltas=tuple(jnp.where(kept, delta, 0) for delta in after.deltas)
        )

    return Transform(apply, transform.survey, transform.case, transform.flat)


def consensus(k: int = 2, threshold=0.4, lam=0.3) -> Transform:
    """Task arithmetic on the entries that at least k experts rely on.

    Args:
      k: see `keep_consensus`.
      threshold: a number, or one for each expert.
      lam: scale of the sum.

    Raises:
      ValueError: for a negative k.

    Source: Consensus TA, arXiv 2405.07813.

    >>> base = {"a": jnp.zeros(3)}
    >>> a, b = {"a": jnp.array([1.0, 2.0, 0.0])}, {"a": jnp.array([2.0, -0.5, 0.5])}
    >>> merge(consensus(lam=0.5), base, [a, b])["a"].tolist()
    [1.5, 0.0, 0.0]
    """
    return chain(keep_consensus(chain(), k, threshold), scale(lam))


def save(path: str | Path, localized: Localized) -> None:
    """Writes what the base lacks, shared delta, masks and scales, to one file.

    Args:
      path: a .safetensors file; it appears whole or not at all.
      localized: any.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "experts.safetensors"
    >>> base, expert = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    >>> save(path, emr(base, [expert]))
    >>> load(path, base).materialise(0)["a"].tolist()
    [1.0, 1.0]
    """
    tensors = {"scales": localized.scales}
    for kind, part in (("shared", localized.shared), ("mask", localized.masks)):
        leaves = zip(tree.paths(part), jax.tree.leaves(part), strict=True)
        tensors |= {f"{kind}/{name}": leaf for name, leaf in leaves}
    layouts = {
        name: Layout(np.dtype(x.dtype), tuple(x.shape)) for name, x in tensors.items()
    }
    safetensors.write(path, layouts, (np.asarray(x) for x in tensors.values()))


def load(path: str | Path, base: Any) -> Localized:
    """Reads what `save` wrote.

    Args:
      path: the file.
      base: the tree that it was made with.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another base, or a file that does not hold this.

    >>> load("nowhere.safetensors", {})
    Traceback (most recent call last):
    FileNotFoundError: nowhere.safetensors does not exist
    """
    file = safetensors.open_file(path)

    def read(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name in file.layouts and file.layouts[name].shape != shape:
            raise ValueError(
                f"{name} in {path} has the shape {file.layouts[name].shape}, the base "
                f"needs {shape}: was it saved with another base?"
            )
        return jnp.asarray(file.read(name))

    count = file.layouts["scales"].shape if "scales" in file.layouts else (0,)
    scales = read("scales", count)
    shared, masks = [], []
    for name, leaf in zip(tree.paths(base), jax.tree.leaves(base), strict=True):
        whole = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)
        shape = jnp.shape(leaf) if whole else (0,)
        shared.append(read(f"shared/{name}", shape))
        masks.append(read(f"mask/{name}", (*count, -(-shared[-1].size // 8))))
    return _localized(base, shared, masks, scales)


def _localized(base, shared, masks, scales) -> Localized:
    structure = jax.tree.structure(base)
    unflatten = functools.partial(jax.tree.unflatten, structure)
    return Localized(base, unflatten(shared), unflatten(masks), scales)


def _columns(base, experts):
    """Each leaf of the base with those of the experts."""
    check_alike(base, experts)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(base)]
    rows = [jax.tree.leaves(expert) for expert in experts]
    return list(zip(leaves, zip(*rows, strict=True), strict=True))


def _wide(trees):
    """In the working precision."""

    def wide(leaf):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(wide, trees)


def _deltas(base, experts) -> list[jax.Array]:
    start = _wide(base)
    return [jnp.asarray(expert, start.dtype) - start for expert in experts]


def _thresholds(threshold, count: int) -> tuple:
    if np.ndim(threshold) == 0:
        return (threshold,) * count
    if len(threshold) != count:
        raise ValueError(
            f"{len(threshold)} thresholds for {count} experts: one number is expected, "
            "or one for each"
        )
    return tuple(threshold)


def _packed(masks: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.packbits(mask.reshape(-1)) for mask in masks])


def _nothing(leaf: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Stands for a leaf of integers."""
    return jnp.zeros((0,), leaf.dtype), jnp.zeros((count, 0), jnp.uint8)
