"""Statistics against their defining equations and against enumeration."""

import itertools
import math

import numpy as np
import pytest

from collab_jax import uncertainty

Z = 1.959963984540054  # the 97.5% point of the normal law, from a table


@pytest.mark.parametrize(("correct", "total"), [(1, 7), (8, 10), (999, 1319)])
def test_wilson_ends_solve_the_score_equation(correct, total):
    interval = uncertainty.wilson(correct, total)
    for p in interval[1:]:
        seen = abs(correct / total - p)
        assert seen == pytest.approx(Z * math.sqrt(p * (1 - p) / total), rel=1e-12)
    assert interval.low < interval.estimate < interval.high


def test_wilson_at_the_borders():
    none, every = uncertainty.wilson(0, 20), uncertainty.wilson(20, 20)
    assert none.low == 0
    assert none.high == pytest.approx(Z**2 / (20 + Z**2))
    assert every.high == 1
    assert every.low == pytest.approx(20 / (20 + Z**2))


def coverage(interval, total, p):
    """Exact probability that the interval covers p, by the binomial law."""
    return sum(
        math.comb(total, k) * p**k * (1 - p) ** (total - k)
        for k in range(total + 1)
        if interval(k, total)[1] <= p <= interval(k, total)[2]
    )


def wald(correct, total):
    p = correct / total
    half = Z * math.sqrt(p * (1 - p) / total)
    return p, p - half, p + half


def test_wilson_covers_and_the_plain_interval_does_not():
    grid = np.linspace(0.02, 0.98, 49)
    mean = np.mean([coverage(uncertainty.wilson, 20, p) for p in grid])
    assert 0.94 < mean < 0.97
    assert np.mean([coverage(wald, 20, p) for p in grid]) < 0.91


def test_bootstrap_against_all_resamples():
    values = np.array([0.0, 1.0, 2.5, 7.0])
    every = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    low, high = np.quantile(every, [0.025, 0.975])
    interval = uncertainty.bootstrap(values, resamples=40_000)
    assert interval.estimate == values.mean()
    # the exact law has steps; the sampled quantile falls on one of the neighbours
    steps = np.unique(every)
    assert abs(interval.low - low) <= np.diff(steps).max()
    assert abs(interval.high - high) <= np.diff(steps).max()
    assert interval == uncertainty.bootstrap(values, resamples=40_000)
    assert interval != uncertainty.bootstrap(values + values**2, resamples=40_000)


def test_bootstrap_spread_is_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    interval = uncertainty.bootstrap(values, seed=1)
    error = values.std() / math.sqrt(values.size)
    assert (interval.high - interval.low) / 2 == pytest.approx(Z * error, rel=0.03)


@pytest.mark.parametrize(("only_one", "only_two"), [(0, 0), (3, 0), (5, 2), (4, 4)])
def test_mcnemar_against_all_signs(only_one, only_two):
    m = only_one + only_two
    first = [1] * only_one + [0] * only_two + [1, 0]
    second = [0] * only_one + [1] * only_two + [1, 0]
    # under the null either system is equally likely to have it right
    far = abs(only_one - only_two)
    signs = list(itertools.product([-1, 1], repeat=m))
    p = np.mean([abs(sum(sign)) >= far for sign in signs])
    assert uncertainty.mcnemar(first, second) == pytest.approx(p)
    assert uncertainty.mcnemar(second, first) == pytest.approx(p)


def test_mcnemar_with_many_records():
    first, second = np.zeros(5000, bool), np.ones(5000, bool)
    second[:2400] = False
    first[:2400] = True
    # normal approximation with continuity correction
    z = (2600 - 2400 - 1) / math.sqrt(5000)
    p = math.erfc(z / math.sqrt(2))
    assert uncertainty.mcnemar(first, second) == pytest.approx(p, rel=1e-2)
    assert 0 <= uncertainty.mcnemar(np.ones(5000), np.zeros(5000)) < 1e-290


def test_paired_bootstrap_sees_pairs():
    random = np.random.default_rng(0)
    hard = random.normal(size=300) * 5  # how hard a record is, the same for both
    first, second = hard + 0.3 + random.normal(size=300), hard + random.normal(size=300)
    paired = uncertainty.paired_bootstrap(first, second, resamples=2000)
    assert paired.p < 0.01
    assert paired.difference.low > 0
    broken = uncertainty.paired_bootstrap(first, second[::-1], resamples=2000)
    assert broken.p > 0.05
    same = uncertainty.paired_bootstrap(first, first, resamples=100)
    assert same.p == 1
    assert same.difference == (0, 0, 0)


def test_paired_bootstrap_against_all_resamples():
    first, second = np.array([1.0, 0, 1, 1]), np.array([0.0, 0, 1, 0])
    d = first - second
    means = np.array([np.mean(x) for x in itertools.product(d, repeat=4)])
    p = np.mean(np.abs(means - d.mean()) >= abs(d.mean()) - 1e-12)
    found = uncertainty.paired_bootstrap(first, second, resamples=40_000).p
    assert found == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda: uncertainty.wilson(3, 2),
        lambda: uncertainty.wilson(0, 0),
        lambda: uncertainty.wilson(1, 2, level=95),
        lambda: uncertainty.bootstrap([]),
        lambda: uncertainty.bootstrap([[1.0]]),
        lambda: uncertainty.bootstrap([1.0], resamples=0),
        lambda: uncertainty.mcnemar([1, 0], [1]),
        lambda: uncertainty.paired_bootstrap([1, 0], [1]),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"found|records"):
        call()
