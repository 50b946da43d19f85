"""Fine-tuning: the loss against numpy, its gradient, masks, chunks, and both modes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from collab_jax import finetune, tree
from collab_jax.finetune import finetuner, fit, loss
from collab_jax.models import lora, transformer
from collab_jax.models.config import from_hf
from collab_jax.packing import Batch, pack, rows

CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
)
BACKBONE = transformer.transformer(CONFIG)
PARAMS = transformer.init(jax.random.key(0), CONFIG)
RNG = np.random.default_rng(0)
BATCH = Batch(
    RNG.integers(0, 11, (3, 8)).astype(np.int32),
    RNG.uniform(size=(3, 8)).astype(np.float32) * (RNG.uniform(size=(3, 8)) > 0.3),
)
DATA = pack([[1, 2, 3, 4, 5] * 9], length=8)


def naive_loss(params, batch):
    """Loops over predictions, in float64."""
    total = 0.0
    x = BACKBONE.embed(params, batch.tokens)
    hidden = BACKBONE.features(params, None, x)[0].hidden
    logits = np.float64(BACKBONE.unembed(params, hidden))
    for b, row in enumerate(batch.tokens):
        for t in range(1, len(row)):
            law = np.exp(logits[b, t - 1])
            total -= batch.weights[b, t] * np.log(law[row[t]] / law.sum())
    return total / batch.weights[:, 1:].sum()


def test_loss_is_the_mean_over_single_predictions():
    small = Batch(BATCH.tokens[:2, :5], BATCH.weights[:2, :5])
    got = float(loss(BACKBONE, PARAMS, small))
    assert got == pytest.approx(naive_loss(PARAMS, small), rel=1e-5)
    shifted = Batch(small.tokens, np.roll(small.weights, 1, axis=1))
    assert got != pytest.approx(naive_loss(PARAMS, shifted), rel=1e-3)


@pytest.mark.parametrize(
    ("chunk", "remat"), [(1, False), (3, True), (7, False), (100, True)]
)
def test_chunks_and_rematerialisation_change_nothing(chunk, remat):
    f = jax.jit(jax.value_and_grad(loss, 1), static_argnums=(0, 3, 4))
    want, want_gradient = f(BACKBONE, PARAMS, BATCH, 128, False)
    got, gradient = f(BACKBONE, PARAMS, BATCH, chunk, remat)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        gradient,
        want_gradient,
    )


def test_gradient_against_finite_differences():
    h = 1e-2
    with jax.enable_x64():
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
        f = jax.jit(lambda params: loss(BACKBONE, params, BATCH))
        gradient = jax.grad(f)(params)
        key = jax.random.key(3)
        for path, leaf in tree.select(params, ".*").items():
            key, one = jax.random.split(key)
            way = jax.random.normal(one, leaf.shape, jnp.float64)
            way = way / jnp.linalg.norm(way)
            # statistics and logits are float32, so that the step may not be small
            up, down = (
                f(tree.replace(params, {path: leaf + s * way})) for s in (h, -h)
            )
            slope = (up - down) / (2 * h)
            exact = (tree.select(gradient, path)[path] * way).sum()
            np.testing.assert_allclose(slope, exact, rtol=2e-2, atol=2e-4, err_msg=path)


def test_tokens_of_weight_zero_are_not_learned():
    weights = np.zeros_like(BATCH.weights)
    weights[:, 5] = 1
    one = loss(BACKBONE, PARAMS, Batch(BATCH.tokens, weights))
    changed = BATCH.tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    two = loss(BACKBONE, PARAMS, Batch(changed, weights))
    np.testing.assert_array_equal(one, two)
    assert float(loss(BACKBONE, PARAMS, Batch(changed, weights * 0))) == 0
    changed[:, 5] = (changed[:, 5] + 1) % 11
    assert float(loss(BACKBONE, PARAMS, Batch(changed, weights))) != float(one)


def test_a_forbidden_token_of_weight_zero_is_no_nan():
    forbid = BACKBONE._replace(
        unembed=lambda p, x: BACKBONE.unembed(p, x).at[..., 0].set(-jnp.inf)
    )
    batch = Batch(np.array([[1, 0, 2]]), np.array([[0.0, 0.0, 1.0]]))
    value, gradient = jax.value_and_grad(loss, 1)(forbid, PARAMS, batch)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_prompts_make_no_logits():
    """What is behind a piece without weights is never looked at, NaN included."""
    hidden = jnp.ones((2, 6, 3)).at[:, :2].set(jnp.nan)
    targets, weights = jnp.zeros((2, 6), int), jnp.ones((2, 6)).at[:, :2].set(0.0)

    def read(params, hidden):
        return hidden @ params

    def nats(params, chunk):
        return finetune.mean_nats(read, params, hidden, targets, weights, chunk)

    gradient = jax.grad(nats)(jnp.ones((3, 4)), 2)
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient).any()
    # the control: a piece with a prompt and an answer is made whole
    assert np.isnan(jax.grad(nats)(jnp.ones((3, 4)), 4)).any()


@pytest.mark.parametrize("adapter", [False, True])
def test_fit_learns_and_leaves_its_arguments(adapter):
    start = lora.init(jax.random.key(1), PARAMS, 2) if adapter else PARAMS
    before = jax.tree.map(np.array, start)
    tuner = finetuner(BACKBONE, optax.adam(0.02), 2.0 if adapter else None)
    base = PARAMS if adapter else ()
    run = {"base": base, "batch_size": 4, "epochs": 12, "progress": False}
    tuned, history = fit(tuner, start, DATA, **run)
    assert len(history) == 12 * 2
    assert history[-1] < 0.8 * history[0]
    jax.tree.map(np.testing.assert_array_equal, before, start)
    assert jax.tree.structure(tuned) == jax.tree.structure(start)
    again, repeated = fit(tuner, start, DATA, **run)
    assert repeated == history
    jax.tree.map(np.testing.assert_array_equal, again, tuned)


def test_an_adapter_at_its_start_has_the_loss_of_its_base():
    adapter = lora.init(jax.random.key(1), PARAMS, 2)
    tuner = finetuner(BACKBONE, optax.sgd(0.1), 2.0)
    _, info = tuner.step(PARAMS, tuner.init(adapter), BATCH)
    np.testing.assert_array_equal(info.loss, loss(BACKBONE, PARAMS, BATCH))


def test_a_step_is_traced_once():
    count = []

    def seen(*args):
        count.append(1)
        return BACKBONE.embed(*args)

    tuner = finetuner(BACKBONE._replace(embed=seen), optax.sgd(0.1))
    fit(tuner, PARAMS, DATA, batch_size=3, epochs=3, progress=False)
    assert len(count) == 1


def test_a_loss_that_is_no_number_is_reported():
    tuner = finetuner(BACKBONE, optax.sgd(jnp.inf))
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        fit(tuner, PARAMS, DATA, epochs=4, progress=False)


def test_steps_are_an_upper_limit():
    tuner = finetuner(BACKBONE, optax.sgd(0.1))
    _, history = fit(tuner, PARAMS, DATA, epochs=9, steps=3, progress=False)
    assert len(history) == 3


def test_prompts_are_masked_by_rows():
    data = rows([[1, 2, 3, 4]], 6, weights=[[0, 0, 1, 1]])
    assert data.weights.tolist() == [[0, 0, 1, 1, 0, 0]]
    assert finetune.Batch is Batch
