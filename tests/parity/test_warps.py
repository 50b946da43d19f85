"""Warps against the logits processors of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import warp

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

VOCAB, ROWS = 1_000, 64
MARGIN = 1e-4  # a cut decided by less may fall either way


def laws(scale):
    rng = np.random.default_rng(int(scale))
    logits = scale * rng.standard_normal((ROWS, VOCAB)).astype(np.float32)
    logits[:, ::7] = -np.inf
    return logits


def reference(processor, logits, tokens=None):
    tokens = np.zeros((ROWS, 1), np.int64) if tokens is None else tokens
    return processor(torch.tensor(tokens), torch.tensor(logits)).numpy()


def undecided_top_p(logits, p):
    """Rows whose cumulative probability comes within the margin of the cut."""
    probs = np.exp(logits.astype(np.float64))
    probs = np.sort(probs / probs.sum(-1, keepdims=True), -1)[:, ::-1]
    return (np.abs(probs.cumsum(-1) - p) < MARGIN).any(-1)


@pytest.mark.parametrize("scale", [5, 8])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p(scale, p):
    logits = laws(scale)
    expected = reference(processors.TopPLogitsWarper(p), logits)
    found = np.asarray(warp.top_p(p)(jnp.asarray(logits)))
    owed = ~undecided_top_p(logits, p) if p < 1 else np.ones(ROWS, bool)
    assert owed.sum() >= ROWS // 4
    np.testing.assert_array_equal(found[owed], expected[owed])
    wrong = np.asarray(warp.top_p(0.8 * p)(jnp.asarray(logits)))
    same = np.array_equal(wrong[owed], expected[owed])
    assert not same or p == 0.1  # the control; at 0.1 one token is enough for both


@pytest.mark.parametrize("scale", [1, 5])
@pytest.mark.parametrize("k", [1, 2, 50, 999, 1_000])
def test_top_k(scale, k):
    logits = laws(scale)
    expected = reference(processors.TopKLogitsWarper(k), logits)
    found = warp.top_k(k)(jnp.asarray(logits))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5])
def test_min_p(p):
    logits = laws(2)
    expected = reference(processors.MinPLogitsWarper(p), logits)
    found = np.asarray(warp.min_p(p)(jnp.asarray(logits)))
    least = logits.max(-1, keepdims=True) + np.log(p)
    owed = ~(np.abs(logits - least) < MARGIN).any(-1)
    assert owed.sum() >= ROWS // 2
    np.testing.assert_array_equal(found[owed], expected[owed])


@pytest.mark.parametrize("r", [0.8, 1.3])
def test_repetition_penalty(r):
    logits = laws(3)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, 40))
    processor = processors.RepetitionPenaltyLogitsProcessor(r)
    expected = reference(processor, logits, tokens)
    history = warp.History(jnp.asarray(tokens), jnp.ones((ROWS, 1, 40), bool))
    found = warp.repetition_penalty(r).apply(jnp.asarray(logits)[:, None], history)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


def test_the_customary_order():
    """Penalty, temperature, top-k, top-p, as `generate` applies them."""
    logits = laws(4)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 40))
    expected = reference(
        processors.RepetitionPenaltyLogitsProcessor(1.2), logits, tokens
    )
    for processor in (
        processors.TemperatureLogitsWarper(0.7),
        processors.TopKLogitsWarper(60),
        processors.TopPLogitsWarper(0.9),
    ):
        expected = reference(processor, expected)
    history = warp.History(jnp.asarray(tokens), jnp.ones((ROWS, 1, 40), bool))
    found = warp.repetition_penalty(1.2).apply(jnp.asarray(logits)[:, None], history)
    for function in (warp.temperature(0.7), warp.top_k(60), warp.top_p(0.9)):
        found = function(found)
    kept = jnp.isfinite(found[:, 0])
    same = (kept == np.isfinite(expected)).all(-1)
    assert same.sum() >= ROWS - 2  # rows decided by rounding
    np.testing.assert_allclose(
        jax.nn.softmax(found[:, 0])[same],
        jax.nn.softmax(expected)[same],
        atol=1e-6,
    )
