"""Theory of speculation against a published table, its bounds, and measured runs."""

import jax
import numpy as np
import pytest
from speculation import NEAR, PROMPTS, WARPED, draws

from collab_jax.cooperate.efficient import theory, verify
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm

FREE = (0.0, 0.05, 0.1, 0.2)
# acceptance -> best gain and its length, at most 12, for c of FREE with v = 1, and for
# the pairs (c, slope of v) of WIDE
WIDE = ((0.05, 0.1), (0.1, 0.1), (0.05, 0.25), (0.1, 0.25))
BEST = {
    0.6: "2.50(12) 1.92(4) 1.67(3) 1.40(2) 1.51(2) 1.40(2) 1.23(1) 1.19(1)",
    0.7: "3.30(12) 2.35(6) 1.98(4) 1.58(3) 1.75(3) 1.58(3) 1.37(2) 1.29(2)",
    0.8: "4.73(12) 3.09(8) 2.47(6) 1.87(4) 2.11(5) 1.87(4) 1.55(3) 1.44(3)",
    0.9: "7.46(12) 4.66(12) 3.43(10) 2.37(7) 2.78(8) 2.37(7) 1.87(5) 1.71(4)",
}


@pytest.mark.parametrize("rate", BEST)
def test_best_lengths(rate):
    settings = [(c, 0.0) for c in FREE] + [*WIDE]
    for (c, slope), cell in zip(settings, BEST[rate].split(), strict=True):
        gain, length = cell.rstrip(")").split("(")
        wide = lambda k, slope=slope: 1 + slope * k  # noqa: E731
        found = theory.draft_length(rate, c, wide, 12)
        best = theory.speedup(rate, found, c, wide)
        assert f"{best:.2f}" == gain
        assert found == int(length)


def test_speedup_is_possible_exactly_if_a_exceeds_c():
    """And then one token already gives (1 + a) / (1 + c)."""
    for a in np.arange(0.05, 1, 0.1):
        for c in np.arange(0.02, 1, 0.1):
            assert (theory.draft_length(a, c) > 0) == (a > c)
            if a > c:
                best = theory.speedup(a, theory.draft_length(a, c), c)
                assert best >= (1 + a) / (1 + c) - 1e-12


def test_one_rate_is_the_geometric_sum():
    for a, k in ((0.3, 1), (0.9, 7), (0.0, 4)):
        expected = (1 - a ** (k + 1)) / (1 - a)
        assert abs(theory.expected_tokens(a, k) - expected) < 1e-12
        assert theory.expected_tokens([a] * 3, k) == theory.expected_tokens(a, k)
    assert theory.expected_tokens(1.0, 5) == 6
    assert theory.expected_tokens(0.5, 0) == theory.speedup(0.5, 0, 9.0) == 1


def test_measured_rates_give_measured_tokens():
    """Rates by position turn into tokens per call exactly, by counting."""
    decoder = speculate(
        on_lm(WARPED), draft_lm(WARPED, 3), 200, verifier=verify.maximal()
    )
    result = draws(decoder, NEAR, PROMPTS)
    info = jax.tree.map(lambda x: np.asarray(x).sum(0), result.info)
    tokens = (result.length - result.prompt_length).sum() / info.calls
    predicted = theory.expected_tokens(info.taken / info.tried, 3)
    cut = 3 * len(PROMPTS) / info.calls  # what was cut off in the last rounds
    assert tokens <= predicted + 1e-6
    assert tokens >= predicted - cut


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: theory.expected_tokens(1.2, 3), "acceptance = 1.2"),
        (lambda: theory.expected_tokens([], 3), "acceptance"),
        (lambda: theory.speedup(0.5, -1, 0.1), "length = -1"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
