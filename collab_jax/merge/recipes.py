"""Merges of task vectors as their papers state them, each a line over public parts.

Use: `merge(ties(), base, experts)`. Averages of models are in `averages`.
"""

from collab_jax.merge.agree import disjoint_mean, elect_sign, largest
from collab_jax.merge.schedule import knobs, linear_by_layer
from collab_jax.merge.sparsify import (
    drop_and_rescale,
    drop_by_rank,
    keep_band,
    trim_whole,
)
from collab_jax.merge.stack import Transform, chain, scheduled
from collab_jax.merge.weigh import by_norm, by_place, mean, scale


def task_arithmetic(lam=0.3) -> Transform:
    """Sum of task vectors: `theta = theta_0 + lam * sum_n w_n (theta_n - theta_0)`.

    Args:
      lam: scale of the sum; 0.3 to 0.4 is typical for 8 tasks.

    Source: arXiv 2212.04089.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.ones(2)}, {"a": jnp.array([2.0, 3.0])}
    >>> merge(task_arithmetic(0.5), base, [expert])["a"].tolist()
    [1.5, 2.0]
    """
    return chain(scale(lam))


def forget(lam=1.0) -> Transform:
    """Task vectors are taken away: `theta = theta_0 - lam * sum_n w_n tau_n`.

    Args:
      lam: scale of the sum.

    Source: arXiv 2212.04089.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.ones(2)}, {"a": jnp.array([2.0, 3.0])}
    >>> merge(forget(0.5), base, [expert])["a"].tolist()
    [0.5, 0.0]
    """
    return chain(scale(-lam))


def analogy(lam=1.0) -> Transform:
    """A is to B as C is to the result: `theta = theta_0 + lam (tau_C + tau_B - tau_A)`.

    Experts: A, B, C.

    Args:
      lam: scale of the sum.

    Source: arXiv 2212.04089.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> experts = [{"a": jnp.array([x])} for x in (1.0, 3.0, 10.0)]
    >>> merge(analogy(), {"a": jnp.zeros(1)}, experts)["a"].tolist()
    [12.0]
    """
    return chain(by_place((-1, 1, 1)), scale(lam))


def ties(density=0.2, lam=1.0) -> Transform:
    """Trim, elect a sign, and average what agrees: TIES-Merging.

    Args:
      density: share of each task vector to keep, over the whole model.
      lam: scale of the merged task vector.

    Raises:
      ValueError: for a density outside of (0, 1].

    Source: arXiv 2306.01708.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base = {"a": jnp.zeros(3)}
    >>> deltas = jnp.array([[3.0, 0.1, 2.0], [1.0, 0.1, -3.0]])
    >>> merge(ties(density=0.67), base, [{"a": d} for d in deltas])["a"].tolist()
    [2.0, 0.0, -3.0]
    """
    return chain(trim_whole(density), elect_sign, disjoint_mean, scale(lam))


def dare(p=0.9, lam=1.0) -> Transform:
    """Drop and rescale, then the sum of task vectors: DARE with task arithmetic.

    Args:
      p: probability of a drop, in [0, 1).
      lam: scale of the sum.

    Raises:
      ValueError: for p outside of [0, 1).

    Source: arXiv 2311.03099.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> merged = merge(dare(p=0.5), {"a": jnp.zeros(1000)}, [{"a": jnp.ones(1000)}])
    >>> bool(abs(merged["a"].mean() - 1) < 0.1)
    True
    """
    return chain(drop_and_rescale(p), scale(lam))


def dare_ties(p=0.9, density=0.2, lam=1.0) -> Transform:
    """Drop and rescale, then TIES.

    Args:
      p: probability of a drop, in [0, 1).
      density: share of each dropped task vector to keep, over the whole model.
      lam: scale of the merged task vector.

    Source: arXiv 2311.03099 over arXiv 2306.01708.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> merged = merge(dare_ties(), {"a": jnp.zeros(100)}, [{"a": jnp.ones(100)}])
    >>> float(merged["a"].max())
    10.0
    """
    return chain(drop_and_rescale(p), ties(density, lam))


def breadcrumbs(beta=0.85, gamma=0.01, alpha=0.3) -> Transform:
    """Sum of task vectors without their small entries and without their outliers.

    Args:
      beta: share of the smallest entries of each leaf to drop.
      gamma: share of the largest to drop.
      alpha: scale of the sum.

    Raises:
      ValueError: for shares below 0 or whose sum is not below 1.

    Source: Model Breadcrumbs, arXiv 2312.06795.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base, expert = {"a": jnp.zeros(4)}, {"a": jnp.array([1.0, 9.0, 4.0, 2.0])}
    >>> merge(breadcrumbs(0.5, 0.25, 0.5), base, [expert])["a"].tolist()
    [0.0, 0.0, 2.0, 0.0]
    """
    return chain(keep_band(beta, gamma), scale(alpha))


def della(density=0.5, epsilon=0.1, lam=1.0) -> Transform:
    """Drop by magnitude rank and rescale each entry, elect a sign, average: DELLA.

    Args:
      density: mean share of the entries to keep.
      epsilon: what the largest of a row have more than that, and the smallest less.
      lam: scale of the merged task vector.

    Raises:
      ValueError: for probabilities outside of (0, 1].

    Source: arXiv 2406.11617.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> merged = merge(della(), {"a": jnp.zeros(1000)}, [{"a": jnp.ones(1000)}])
    >>> bool(abs(merged["a"].mean() - 1) < 0.2)
    True
    """
    return chain(drop_by_rank(density, epsilon), elect_sign, disjoint_mean, scale(lam))


def metagpt() -> Transform:
    """Task arithmetic whose scales follow from the sizes of the task vectors.

    `lam_t = ||tau_t||^2 / sum_k ||tau_k||^2`, norms over the whole model.

    Source: MetaGPT, arXiv 2406.11385.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> experts = [{"a": jnp.array([x])} for x in (1.0, 3.0)]
    >>> round(float(merge(metagpt(), {"a": jnp.zeros(1)}, experts)["a"][0]), 4)
    2.8
    """
    return chain(by_norm(), mean)


def lines(alpha, beta, layers: int) -> Transform:
    """Scales the task vectors by depth: shallow layers stay near the base.

    `lam_l = alpha + beta l / (L - 1)` for layer l = 0, ..., L - 1; alpha outside of the
    layers. It may end another recipe, as in `chain(ties(), lines(0.2, 0.8, 12))`.

    Args:
      alpha: at the first layer; a number or tracer.
      beta: what the last layer has more.
      layers: L, as `schedule.count_layers(names)` finds it.

    Raises:
      ValueError: for fewer than 1 layer, or for a leaf of a layer beyond the last.

    Source: LiNeS, arXiv 2410.17146.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base = {"layers_0": jnp.zeros(1), "layers_1": jnp.zeros(1)}
    >>> expert = {"layers_0": jnp.ones(1), "layers_1": jnp.ones(1)}
    >>> merge(lines(0.25, 0.5, layers=2), base, [expert])["layers_1"].tolist()
    [0.75]
    """
    slope = linear_by_layer(alpha, beta, layers)
    return scheduled(lambda given: scale(given["by"]), knobs(by=slope))


def magmax(lam=0.5) -> Transform:
    """At each position the task vector of largest magnitude: MagMax.

    Args:
      lam: scale of the merged task vector.

    Source: arXiv 2407.06322.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> experts = [{"a": jnp.array(row)} for row in ([2.0, -1.0], [1.0, -3.0])]
    >>> merge(magmax(1.0), {"a": jnp.zeros(2)}, experts)["a"].tolist()
    [2.0, -3.0]
    """
    return chain(largest, scale(lam))


def expo(alpha=0.3) -> Transform:
    """Goes on beyond an aligned model: `theta_1 + alpha (theta_1 - theta_0)`.

    The base is the model before the alignment, the one expert that after it.

    Args:
      alpha: how far, 0.1 to 0.5 in the paper.

    Source: ExPO, arXiv 2404.16792.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> merge(expo(0.5), {"a": jnp.ones(1)}, [{"a": jnp.full(1, 3.0)}])["a"].tolist()
    [4.0]
    """
    return chain(scale(1 + alpha))
