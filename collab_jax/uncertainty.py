"""How sure a measured accuracy is: intervals, and paired comparison of two systems.

Every function takes plain arrays with one entry per record, on the host and in float64,
so that it runs on recorded results without any model.

Shapes: n records, R resamples.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """An estimate with the interval around it."""

    estimate: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two systems on the same records; the difference is the first less the second."""

    difference: Interval  # of the means
    p: float  # two-sided p-value of "no difference"


def _quantile_of_normal(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, found {level}; usual: 0.95")
    return NormalDist().inv_cdf(0.5 + level / 2)


def _records(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"expected one value per record, at least one; found shape {array.shape}"
        )
    return array


def wilson(correct: int, total: int, level: float = 0.95) -> Interval:
    """Wilson's score interval: every p with `|k/n - p| <= z sqrt(p (1 - p) / n)`.

    `centre = (k + z^2/2) / (n + z^2)`,
    `half = z / (n + z^2) * sqrt(k (n - k) / n + z^2 / 4)`.

    Args:
      correct: k, number of records answered rightly.
      total: n, number of records.
      level: probability that such an interval covers the true proportion.

    Raises:
      ValueError: unless 0 <= k <= n and n >= 1.

    References:
      E. B. Wilson, Probable inference, the law of succession, and statistical
      inference, JASA 22 (1927).

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.8, 0.49, 0.943]
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(
            f"expected 0 <= correct <= total and total >= 1, found {correct} of {total}"
        )
    z = _quantile_of_normal(level)
    centre = (correct + z * z / 2) / (total + z * z)
    spread = correct * (total - correct) / total + z * z / 4
    half = z / (total + z * z) * math.sqrt(spread)
    # at 0 and n the formula gives 0 and 1 up to rounding
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return Interval(correct / total, low, high)


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of R resamples with replacement, `[R]`, a bounded block at a time."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    random = np.random.default_rng(seed)
    block = max(1, 4_000_000 // values.size)
    means = [
        values[random.integers(values.size, size=(count, values.size))].mean(1)
        for start in range(0, resamples, block)
        if (count := min(block, resamples - start))
    ]
    return np.concatenate(means)


def bootstrap(
    values: ArrayLike, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of a mean: the middle part of the means of resamples.

    Args:
      values: `[n]`, one score per record.
      seed: makes the resamples; the same seed gives the same interval.
      resamples: R, how often the records are drawn again with replacement.
      level: probability mass between the two ends.

    Raises:
      ValueError: for no records or a matrix of them.

    References:
      B. Efron, Bootstrap methods: another look at the jackknife, Ann. Stat. 7 (1979).

    >>> [round(x, 2) for x in bootstrap([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])]
    [0.75, 0.38, 1.0]
    """
    values = _records(values)
    _quantile_of_normal(level)
    means = _resampled_means(values, resamples, seed)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(values.mean()), float(low), float(high))


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Exact McNemar test: two-sided p-value that neither system is right more often.

    Of the m records that only one system has right, each is equally likely to be the
    one's or the other's: `p = min(1, 2 sum_{i <= min(b, c)} C(m, i) / 2^m)`.

    Args:
      first: `[n]` bool, which records the first system has right.
      second: `[n]` bool, the same records for the second.

    Raises:
      ValueError: when the two do not have the same length.

    References:
      Q. McNemar, Psychometrika 12 (1947); the exact form is the sign test.

    >>> mcnemar([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1])
    0.0625
    """
    one, two = _pair(first, second)
    only_one = int((one.astype(bool) & ~two.astype(bool)).sum())
    only_two = int((two.astype(bool) & ~one.astype(bool)).sum())
    m = only_one + only_two
    tail = sum(math.comb(m, i) for i in range(min(only_one, only_two) + 1))
    # whole numbers until the last division: exact for any number of records
    return min(1.0, 2 * tail / 2**m)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    one, two = _records(first), _records(second)
    if one.size != two.size:
        raise ValueError(
            f"the systems have {one.size} and {two.size} records; a paired comparison "
            "needs the same records in the same order"
        )
    return one, two


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Comparison:
    """Bootstrap of the mean difference of two systems over the same records.

    The p-value is the share of resamples of the centred differences whose mean is at
    least as far from 0 as the one seen, `p = (1 + #{|m*| >= |m|}) / (1 + R)`.

    Args:
      first: `[n]`, scores of the first system.
      second: `[n]`, scores of the second on the same records.
      seed: makes the resamples.
      resamples: R.
      level: probability mass inside the interval.

    Raises:
      ValueError: when the two do not have the same length.

    References:
      P. Koehn, Statistical significance tests for machine translation evaluation,
      EMNLP 2004; the p-value with the added one follows Davison and Hinkley (1997).

    >>> difference, p = paired_bootstrap([1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 1])
    >>> round(difference.estimate, 3), p < 0.05
    (0.667, True)
    """
    one, two = _pair(first, second)
    _quantile_of_normal(level)
    difference = one - two
    mean = float(difference.mean())
    means = _resampled_means(difference, resamples, seed)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    # a hair of slack, so that equal means do not differ by rounding
    far = np.abs(means - mean) >= abs(mean) - 1e-12
    p = (1 + int(far.sum())) / (1 + resamples)
    return Comparison(Interval(mean, float(low), float(high)), p)
