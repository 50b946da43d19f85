"""Training of rewards: losses by loops, fixed points, what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rewarding
import transferring as own
from rewarding import BACKBONE, HEAD
from transferring import TABLE, TABLES, VOCAB, log_softmax, logits

from collab_jax import finetune
from collab_jax.cooperate.transfer import preference_training as pairs
from collab_jax.cooperate.transfer import reward_training as training
from collab_jax.models import heads
from collab_jax.models.reward import outputs
from collab_jax.packing import Batch

RNG = np.random.default_rng(0)
SAID = RNG.normal(size=(3, 5, 2))
LABELS = RNG.normal(size=(3, 2))
WEIGHTS = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], np.float64)
ONE = heads.linear(16)
read = jax.jit(lambda params, texts: outputs(BACKBONE, HEAD, params, texts))


def naive_cumulative():
    total = []
    for said, labels, weights in zip(SAID, LABELS, WEIGHTS, strict=True):
        judged = [one for one, w in zip(said, weights, strict=True) if w]
        if judged:
            length = len(judged)
            terms = [
                t * ((one - labels) ** 2).mean() for t, one in enumerate(judged, 1)
            ]
            total.append(2 * sum(terms) / (length * (length + 1)))
    return np.mean(total)


def test_the_loss_of_rad():
    given = jnp.asarray(SAID), jnp.asarray(LABELS), jnp.asarray(WEIGHTS)
    found = float(training.cumulative(*given))
    np.testing.assert_allclose(found, naive_cumulative(), rtol=1e-5)
    # the control: every beginning counts alike
    even = training.fudge(*given) * 2 / WEIGHTS.sum(1)[:2].mean()
    assert abs(float(even) - found) > 1e-2
    bad = jnp.asarray(np.where(WEIGHTS[..., None], SAID, np.nan))
    slope = jax.grad(training.cumulative)(bad, *given[1:])
    assert np.isfinite(slope).all()


def test_the_loss_of_fudge_and_its_minimum():
    given = jnp.asarray(SAID), jnp.asarray(LABELS), jnp.asarray(WEIGHTS)
    expected = np.mean(
        [
            0.5 * (((said - r) ** 2).mean(1) * w).sum()
            for said, r, w in zip(SAID[:2], LABELS[:2], WEIGHTS[:2], strict=True)
        ]
    )
    np.testing.assert_allclose(training.fudge(*given), expected, rtol=1e-5)
    # texts that begin alike: the best value is their mean reward
    labels, ones = jnp.array([0.0, 1.0, 5.0]), jnp.ones((3, 1))

    def loss(v):
        return training.fudge(jnp.full((3, 1, 1), v), labels, ones)

    assert abs(float(jax.grad(loss)(2.0))) < 1e-6


def naive_targets(params, policy, text, label, k):
    """u_t of CD-Q: every continuation read as a text of its own."""
    found = []
    for t in range(1, len(text)):
        law = log_softmax(logits(TABLE, policy, text[:t]))
        best = np.argsort(-law, kind="stable")[:k]
        share = np.exp(law[best]) / np.exp(law[best]).sum()
        texts = jnp.array([[*text[:t], int(c)] for c in best])
        values = np.asarray(read(params, texts))[:, -1, 0]
        found.append(share @ values)
    return [*found, label]


@pytest.mark.parametrize("k", [3, VOCAB])
def test_the_loss_of_q_learning(k):
    texts, labels = [[1, 2, 3, 4], [5, 0, 6, 0]], np.array([0.7, -1.0])
    lengths = [4, 3]
    weights = np.array([[0, 1, 1, 1], [1, 1, 1, 0]], np.float32)
    data = training.Labelled(np.array(texts), weights, labels)
    params = rewarding.rewards_of()
    tuner = training.q_learning(TABLE, BACKBONE, HEAD, optax.sgd(0.1), k, width=3)
    tuned, info = jax.jit(tuner.step)(TABLES[0], tuner.init(params), data)
    said = np.asarray(read(params, jnp.array(texts)), np.float64)
    losses = []
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        should = naive_targets(params, TABLES[0], text[:length], labels[row], k)
        gaps = (said[row, :length, 0] - should) ** 2
        losses.append(0.5 * (gaps * weights[row, :length]).sum())
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-4)
    # the targets are held fixed: the bias of the head moves by the plain errors
    moved = np.asarray(tuned.params[1]["out"]["bias"] - params[1]["out"]["bias"])
    errors = [
        (
            weights[row, :n]
            * (
                said[row, :n, 0]
                - naive_targets(params, TABLES[0], text[:n], labels[row], k)
            )
        ).sum()
        for row, (text, n) in enumerate(zip(texts, lengths, strict=True))
    ]
    np.testing.assert_allclose(moved[0], -0.1 * np.mean(errors), rtol=1e-3)


def counted(texts):
    """A reward that a beginning can be judged by: the share of the token 3."""
    return (texts == 3).mean(1).astype(np.float32)


@pytest.mark.parametrize("loss", [training.cumulative, training.fudge])
def test_a_reward_is_learned_and_its_arguments_stay(loss):
    texts = RNG.integers(0, VOCAB, (24, 8)).astype(np.int32)
    data = training.Labelled(texts, np.ones(texts.shape, np.float32), counted(texts))
    params = own.weights(1), ONE.init(jax.random.key(1))
    before = jax.tree.map(np.array, params)
    tuner = training.judging(BACKBONE, ONE, optax.adam(0.01), loss)
    tuned, history = finetune.fit(
        tuner, params, data, batch_size=8, epochs=25, progress=False
    )
    assert np.mean(history[-3:]) < 0.3 * np.mean(history[:3])
    jax.tree.map(np.testing.assert_array_equal, before, params)
    said = np.asarray(outputs(BACKBONE, ONE, tuned, jnp.asarray(texts)))[:, -1, 0]
    assert np.corrcoef(said, counted(texts))[0, 1] > 0.8


def preferred(count=16):
    """Pairs behind one prompt of two tokens: the first has more of the token 3."""
    texts = RNG.integers(0, VOCAB, (count, 2, 6)).astype(np.int32)
    texts[:, 1, :2] = texts[:, 0, :2]
    texts[:, 0, 2:4], texts[:, 1, 2:][texts[:, 1, 2:] == 3] = 3, 1
    weights = np.ones(texts.shape, np.float32)
    weights[:, :, :2] = 0
    weights[:, 1, 5] = 0  # of unequal lengths
    return Batch(texts, weights)


def test_the_losses_of_pairs():
    data, params = preferred(3), rewarding.rewards_of()
    tuner = pairs.ranking(BACKBONE, HEAD, optax.sgd(0.1))
    _, info = jax.jit(tuner.step)((), tuner.init(params), data)
    margins = []
    for first, second in data.tokens:
        ends = [
            rewarding.said(rewarding.REWARDS, params, text)[0]
            for text in (first.tolist(), second[:5].tolist())
        ]
        margins.append(ends[0] - ends[1])
    expected = np.mean(np.log1p(np.exp(-np.array(margins))))
    np.testing.assert_allclose(info.loss, expected, rtol=1e-4)

    lm, beta = own.models()[0], 0.3
    tuner = pairs.autoregressive(BACKBONE, optax.sgd(0.1), beta, chunk=2)
    _, info = jax.jit(tuner.step)((), tuner.init(lm), data)
    margins = []
    for texts in data.tokens:
        sums = []
        for text, length in zip(texts, (6, 5), strict=True):
            text = text.tolist()
            laws = [log_softmax(logits(own.MODEL, lm, text[:t])) for t in range(2, 6)]
            steps = [z[text[t]] for t, z in enumerate(laws, 2)]
            sums.append(sum(steps[: length - 2]))
        margins.append(beta * (sums[0] - sums[1]))
    expected = np.mean(np.log1p(np.exp(-np.array(margins))))
    np.testing.assert_allclose(info.loss, expected, rtol=1e-4)


@pytest.mark.parametrize("form", ["ranking", "autoregressive"])
def test_a_preference_is_learned(form):
    data = preferred()
    if form == "ranking":
        tuner = pairs.ranking(BACKBONE, ONE, optax.adam(0.01))
        params = own.weights(1), ONE.init(jax.random.key(1))
    else:
        tuner = pairs.autoregressive(BACKBONE, optax.adam(0.01), 0.5)
        params = own.weights(1)
    rest = {"batch_size": 8, "epochs": 12, "progress": False}
    _, history = finetune.fit(tuner, params, data, **rest)
    assert np.mean(history[-3:]) < 0.4 * np.mean(history[:3])


def test_rows_without_weight_are_left_out():
    data = preferred(3)
    empty = Batch(
        np.concatenate([data.tokens, data.tokens[:1] * 0]),
        np.concatenate([data.weights, data.weights[:1] * 0]),
    )
    tuner = pairs.ranking(BACKBONE, HEAD, optax.sgd(0.1))
    state = tuner.init(rewarding.rewards_of())
    step = jax.jit(tuner.step)
    one, other = (step((), state, batch)[1].loss for batch in (data, empty))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match="labels of shape"):
        training.cumulative(jnp.zeros((2, 3, 2)), jnp.zeros(2), jnp.ones((2, 3)))
    tuner = pairs.ranking(BACKBONE, HEAD, optax.sgd(0.1))
    flat = Batch(np.zeros((2, 3), np.int32), np.ones((2, 3)))
    with pytest.raises(ValueError, match="pairs of shape"):
        tuner.step((), tuner.init(rewarding.rewards_of()), flat)
