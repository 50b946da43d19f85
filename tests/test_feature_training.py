"""Training of a feature drafter: steps against drafting, the loss against numpy."""

import features as small
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from collab_jax import finetune
from collab_jax.cooperate.efficient import feature_training as training
from collab_jax.models.extrapolator import extrapolator
from collab_jax.packing import Batch, pack

BACKBONE, LAYER, BASE, OWN = small.BACKBONE, small.LAYER, small.BASE, small.NEW_LAYER
RNG = np.random.default_rng(0)
BATCH = Batch(
    RNG.integers(0, small.VOCAB, (2, 9)).astype(np.int32),
    (RNG.uniform(size=(2, 9)) * (RNG.uniform(size=(2, 9)) > 0.3)).astype(np.float32),
)
STEPS = 3


def drafted(row, step, place, layer=LAYER, own=OWN):
    """What the layer says at a token, if the draft began `step` tokens before it."""
    text = BATCH.tokens[row, : place + 1].tolist()
    guesses, logits = small.one_by_one(text, place + 1 - step, own, layer)
    return np.float64(guesses[-1]), np.float64(logits[-1])


def naive_loss(feature_weight, law_weight, decay):
    """Loops over tokens and steps; every draft is read anew."""
    x = BACKBONE.embed(BASE, BATCH.tokens)
    hidden = np.float64(BACKBONE.features(BASE, None, x)[0].hidden)
    laws = np.float64(BACKBONE.unembed(BASE, jnp.float32(hidden)))
    total = 0.0
    for step in range(STEPS):
        found = whole = 0.0
        for row in range(2):
            for t in range(step, 8):
                guess, z = drafted(row, step, t)
                p = np.exp(laws[row, t] - laws[row, t].max())
                log_q = z - z.max() - np.log(np.exp(z - z.max()).sum())
                apart = abs(guess - hidden[row, t])
                smooth = np.where(apart < 1, 0.5 * apart**2, apart - 0.5).mean()
                cross = -(p / p.sum() * log_q).sum()
                w = float(BATCH.weights[row, t + 1])
                found += w * (feature_weight * smooth + law_weight * cross)
                whole += w
        total += decay**step * found / whole
    return total


@pytest.mark.parametrize("taps", [(), small.TAPS])
def test_steps_are_those_of_drafting(taps):
    """The guess of step i at token t is that of the i-th drafted token there."""
    layer = extrapolator(small.CONFIG, taps)
    own = layer.init(jax.random.key(2), BASE)
    guesses, _, weights = jax.jit(training._guesses, static_argnums=(0, 1, 5, 6, 7))(
        BACKBONE, layer, own, BASE, BATCH, STEPS, 0.0, None
    )
    assert guesses.shape == (2, 8, STEPS, small.WIDTH)
    for step in range(STEPS):
        for row, place in ((0, 3), (1, 7), (0, step)):
            want, _ = drafted(row, step, place, layer, own)
            np.testing.assert_allclose(guesses[row, place, step], want, atol=1e-4)
        if step:  # the control: true features do not give it
            other, _ = drafted(1, 0, 7, layer, own)
            assert abs(guesses[1, 7, step] - other).max() > 1e-2
    assert not np.asarray(weights)[:, 0, 1:].any()


def test_the_loss_is_its_twin():
    loss = jax.jit(
        training.extrapolation_loss, static_argnums=(0, 1), static_argnames="steps"
    )
    numbers = {"feature_weight": 0.7, "law_weight": 0.4, "decay": 0.5}
    found = loss(BACKBONE, LAYER, OWN, BASE, BATCH, steps=STEPS, **numbers)
    assert float(found) == pytest.approx(naive_loss(*numbers.values()), rel=1e-4)
    shifted = BATCH._replace(weights=np.roll(BATCH.weights, 1, axis=1))
    wrong = loss(BACKBONE, LAYER, OWN, BASE, shifted, steps=STEPS, **numbers)
    assert float(wrong) != pytest.approx(naive_loss(*numbers.values()), rel=1e-3)


def test_the_frozen_model_has_no_gradient():
    def loss(own, base):
        return training.extrapolation_loss(
            BACKBONE, LAYER, own, base, BATCH, steps=2, chunk=3
        )

    mine, theirs = jax.jit(jax.grad(loss, (0, 1)))(OWN, BASE)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(theirs))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(mine))


def test_chunks_change_nothing_and_noise_does():
    def loss(chunk, noise=0.0, seed=0):
        return float(
            training.extrapolation_loss(
                BACKBONE,
                LAYER,
                OWN,
                BASE,
                BATCH,
                steps=2,
                noise=noise,
                key=jax.random.key(seed),
                chunk=chunk,
            )
        )

    assert loss(3) == pytest.approx(loss(32), rel=1e-6)
    assert loss(32, 0.1) != pytest.approx(loss(32), rel=1e-6)
    assert loss(32, 0.1) != pytest.approx(loss(32, 0.1, 1), rel=1e-6)


def test_steps_draw_new_noise_and_repeat():
    tuner = training.extrapolation_tuner(
        BACKBONE, LAYER, optax.sgd(0.0), noise=0.5, seed=3
    )
    data = pack([BATCH.tokens.reshape(-1).tolist()], length=18)
    run = {"base": BASE, "batch_size": 1, "epochs": 3, "progress": False}
    own, history = finetune.fit(tuner, OWN, data, **run)
    assert len(set(history)) == 3
    assert finetune.fit(tuner, OWN, data, **run)[1] == history
    assert jax.tree.structure(own) == jax.tree.structure(OWN)


def test_accuracies_are_counted():
    found = training.accuracies(
        BACKBONE, LAYER, OWN, BASE, BATCH, steps=STEPS, ranks=small.VOCAB, chunk=3
    )
    want = np.zeros((STEPS, small.VOCAB))
    for step in range(STEPS):
        whole = 0.0
        for row in range(2):
            for t in range(step, 8):
                _, z = drafted(row, step, t)
                right = BATCH.tokens[row, t + 1]
                w = float(BATCH.weights[row, t + 1])
                want[step, np.argsort(-z, kind="stable").tolist().index(right)] += w
                whole += w
        want[step] /= whole
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_nothing_to_learn_is_no_nan():
    nothing = BATCH._replace(weights=0 * BATCH.weights)
    value = training.extrapolation_loss(BACKBONE, LAYER, OWN, BASE, nothing)
    assert float(value) == 0.0


def test_bad_input():
    arguments = BACKBONE, LAYER, OWN, BASE, BATCH
    with pytest.raises(ValueError, match="steps = 0"):
        training.extrapolation_loss(*arguments, steps=0)
    with pytest.raises(ValueError, match="rows of 9 tokens for 9 steps: at least 10"):
        training.extrapolation_loss(*arguments, steps=9)
    with pytest.raises(ValueError, match=r"noise = 0\.1 without a key"):
        training.extrapolation_loss(*arguments, noise=0.1)
