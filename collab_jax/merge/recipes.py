"""Merges as their papers state them, each a line over public parts.

Use: `merge(ties(), base, experts)`; a soup is merged without a base.
"""

from collab_jax.merge.agree import disjoint_mean, elect_sign
from collab_jax.merge.sparsify import drop_and_rescale, trim_whole
from collab_jax.merge.stack import Transform, chain
from collab_jax.merge.weigh import mean, scale


def soup() -> Transform:
    """Weighted average of models: `theta = sum_n w_n theta_n / sum_n w_n`.

    Source: model soups, arXiv 2203.05482 (the uniform soup, with equal weights).

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> merge(soup(), None, [{"a": jnp.zeros(2)}, {"a": jnp.ones(2)}])["a"].tolist()
    [0.5, 0.5]
    """
    return chain(mean)


def task_arithmetic(lam=0.3) -> Transform:
    """Sum of task vectors: `theta = theta_0 + lam * sum_n w_n (theta_n - theta_0)`.

    A negative weight forgets a task; `theta_0 + (B - A)` with weights 1 and -1 is an
    analogy.

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
