"""Averages of models that were trained alike, as their papers state them.

Use: `merge(soup(), None, models)`; those that look at deltas (VaRM, SCE, Model Stock)
need the base that the models were made from.
"""

from collections.abc import Callable

import jax

from collab_jax.merge.agree import disjoint_mean, elect_sign
from collab_jax.merge.sparsify import select_varying
from collab_jax.merge.stack import Stack, Transform, chain
from collab_jax.merge.weigh import (
    by_agreement,
    by_place,
    by_square,
    cosine_of_mean_angle,
    mean,
    on_sphere,
    unweighted,
)


def soup() -> Transform:
    """Weighted average of models: `theta = sum_n w_n theta_n / sum_n w_n`.

    Source: model soups, arXiv 2203.05482 (the uniform soup, with equal weights).

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> merge(soup(), None, [{"a": jnp.zeros(2)}, {"a": jnp.ones(2)}])["a"].tolist()
    [0.5, 0.5]
    """
    return chain(mean)


def diwa() -> Transform:
    """Diverse weight averaging, uniform: the mean of all runs from one initialisation.

    The runs differ mildly in their hyperparameters. Its restricted selection is
    `greedy.diwa_restricted`.

    Source: arXiv 2205.09739.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> merge(diwa(), None, [{"a": jnp.zeros(1)}, {"a": jnp.ones(1)}])["a"].tolist()
    [0.5]
    """
    return chain(mean)


def varm() -> Transform:
    """FuseChat's merge: each matrix weighted by how far it moved.

    `theta_m = sum_n W_nm theta_nm`, `W_nm = mean(delta_nm^2) / sum_k mean(delta_km^2)`.

    Source: arXiv 2402.16107; the base is the pivot before its fine-tunes.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> experts = [{"a": jnp.array([x])} for x in (1.0, 3.0)]
    >>> round(float(merge(varm(), {"a": jnp.zeros(1)}, experts)["a"][0]), 4)
    2.8
    """
    return chain(by_square, mean)


def sce(share=0.1) -> Transform:
    """FuseChat 2's merge: select what varies, calculate weights, erase minorities.

    The weights are those of `varm`, over the selected entries; signs are elected
    without them; what is left at each position is averaged.

    Args:
      share: of the entries of each matrix to keep, in (0, 1].

    Raises:
      ValueError: for a share outside of (0, 1].

    Source: arXiv 2408.07990.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base, rows = {"a": jnp.zeros(3)}, jnp.array([[2.0, 1.0, 1.0], [-1.0, 1.0, 3.0]])
    >>> merge(sce(0.67), base, [{"a": row} for row in rows])["a"].tolist()
    [2.0, 0.0, 2.333...]
    """
    return chain(
        select_varying(share), by_square, mean, unweighted(elect_sign), disjoint_mean
    )


def prometheus(a=0.5) -> Transform:
    """Two judges become one: `a theta_direct + (1 - a) theta_pairwise`.

    Experts: the judge trained to grade single answers, the one trained to compare two.

    Args:
      a: weight of the first, a number or tracer.

    Source: Prometheus 2, arXiv 2405.01535.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> judges = [{"a": jnp.zeros(1)}, {"a": jnp.ones(1)}]
    >>> merge(prometheus(), None, judges)["a"].tolist()
    [0.5]
    """
    return chain(by_place((a, 1 - a)))


def disperse_then_merge() -> Transform:
    """The mean of models fine-tuned on disjoint random parts of the instruction data.

    Source: arXiv 2405.13432 (4 parts; against the alignment tax).

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> parts = [{"a": jnp.array([x])} for x in (1.0, 2.0, 3.0, 4.0)]
    >>> merge(disperse_then_merge(), None, parts)["a"].tolist()
    [2.5]
    """
    return chain(mean)


def model_stock(
    cosine: Callable[[Stack], jax.Array] = cosine_of_mean_angle,
) -> Transform:
    """The mean of a few models, drawn towards the base by the angle between them.

    `theta = t mean(theta_n) + (1 - t) theta_0`, `t = N cos / (1 + (N - 1) cos)`, for
    each leaf; t is negative where the deltas point apart.

    Args:
      cosine: what stands for cos when N > 2: `cosine_of_mean_angle` is the paper's
        angle per layer, `mean_cosine` is the other reading, that of mergekit.

    Source: arXiv 2403.19522.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> base, rows = {"a": jnp.zeros(2)}, jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> found = merge(model_stock(), base, [{"a": row} for row in rows])["a"]
    >>> [round(float(x), 3) for x in found]  # t = 2 / (1 + sqrt(2))
    [0.828, 0.414]
    """
    return chain(mean, by_agreement(cosine))


def karcher_mean(max_iter=100, tol=1e-6) -> Transform:
    """The mean of the models' directions on the sphere, with their mean length.

    Merged without a base, leaf by leaf.

    Args:
      max_iter: steps at most.
      tol: the length of a step that ends them, in radians.

    Source: Karcher 1977; arXiv 2603.04972 for merging.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> models = [{"a": jnp.array([2.0, 0.0])}, {"a": jnp.array([0.0, 2.0])}]
    >>> [round(float(x), 3) for x in merge(karcher_mean(), None, models)["a"]]
    [1.414, 1.414]
    """
    return chain(on_sphere(max_iter, tol))
