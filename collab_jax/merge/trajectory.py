"""Averages of the checkpoints of one run: their weights follow from their places.

Use: `merge(trajectory(ema(0.9)), None, checkpoints)`, the earliest first.
"""

import itertools
from collections.abc import Callable, Sequence

from collab_jax.merge.stack import Transform, chain
from collab_jax.merge.weigh import by_place, mean

Weights = Callable[[int], Sequence[float]]  # number of checkpoints -> their weights


def trajectory(weights: Weights) -> Transform:
    """The average of the checkpoints of one run, with weights by their place.

    Weights given to `merge` multiply them.

    Args:
      weights: `ema(decay)`, `lawa(k)`, `wsm(curve)`, or any function of N. The same
        weights may be given to `merge(soup(), None, checkpoints, weights(N))`.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> run = [{"a": jnp.array([x])} for x in (0.0, 1.0, 2.0)]
    >>> merge(trajectory(lawa(2)), None, run)["a"].tolist()
    [1.5]
    """
    return chain(by_place(weights), mean)


def ema(decay: float) -> Weights:
    """The weights of an exponential moving average that starts at the first checkpoint.

    `m_0 = theta_0, m_t = decay m_{t-1} + (1 - decay) theta_t`.

    Args:
      decay: in [0, 1].

    Raises:
      ValueError: for a decay outside of [0, 1].

    Source: Polyak averaging; of checkpoints, arXiv 2505.12082.

    >>> ema(0.5)(3)
    (0.25, 0.25, 0.5)
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay = {decay} was given, a number in [0, 1] is expected")
    return lambda count: tuple(
        decay ** (count - 1 - n) * (1 - decay if n else 1) for n in range(count)
    )


def lawa(k: int) -> Weights:
    """Latest weight averaging: equal weights of the last k checkpoints, 0 before.

    Args:
      k: at least 1; where there are fewer checkpoints, all are averaged.

    Raises:
      ValueError: for k below 1.

    Source: arXiv 2209.14981; PMA's simple average, arXiv 2505.12082.

    >>> lawa(2)(4)
    (0.0, 0.0, 0.5, 0.5)
    """
    if k < 1:
        raise ValueError(f"k = {k} was given, 1 or more is expected")
    return lambda count: tuple(
        1 / min(k, count) if n >= count - k else 0.0 for n in range(count)
    )


def wsm(curve: Callable[[float], float] = lambda x: 1 - x) -> Weights:
    """The weights that turn a run at constant learning rate into one with a decay.

    Were the updates between N checkpoints scaled by `r_n = curve(n / N)`, the run would
    end at `sum_n c_n theta_n`, `c_n = r_n - r_{n+1}`, `r_N = 0`. A linear decay gives
    equal weights.

    Args:
      curve: share of the decay that is over, from 0 to 1 -> factor of the learning
        rate; `curve(0)` is 1, and it never rises.

    Raises:
      ValueError: for a curve that does not start at 1, rises, or becomes negative.

    Source: WSM (warmup, stable, merge), arXiv 2507.17634.

    >>> wsm()(4)
    (0.25, 0.25, 0.25, 0.25)
    >>> [round(c, 3) for c in wsm(lambda x: 1 - x**0.5)(4)]
    [0.5, 0.207, 0.159, 0.134]
    """

    def weights(count: int) -> tuple[float, ...]:
        rates = [curve(n / count) for n in range(count)] + [0.0]
        falls = [high - low for high, low in itertools.pairwise(rates)]
        if abs(rates[0] - 1) > 1e-6 or min(falls) < 0:
            raise ValueError(
                f"the curve gives {[round(rate, 4) for rate in rates[:-1]]}: factors "
                "that start at 1 and never rise are expected"
            )
        return tuple(falls)

    return weights


def adjacent(lam=0.7) -> Transform:
    """Two neighbouring checkpoints of a pretraining become one.

    `theta = lam theta_t + (1 - lam) theta_{t-1}`. Experts: the earlier checkpoint, the
    later one. The paper searches lam in [0.5, 1].

    Args:
      lam: weight of the later one, a number or tracer.

    Source: arXiv 2403.19390.

    >>> import jax.numpy as jnp
    >>> from collab_jax.merge.memory import merge
    >>> pair = [{"a": jnp.zeros(1)}, {"a": jnp.ones(1)}]
    >>> merge(adjacent(0.75), None, pair)["a"].tolist()
    [0.75]
    """
    return chain(by_place((1 - lam, lam)))
