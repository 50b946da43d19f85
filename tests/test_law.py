"""Laws against NumPy, and the rules for -inf, NaN and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import law


def logits(seed=0, shape=(3, 2, 7), absent=0.3):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=shape).astype(np.float32) * 3
    drawn[rng.random(shape) < absent] = -np.inf
    drawn[..., 0] = rng.normal(size=shape[:-1])
    return drawn


def probs(z):
    p = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_log_probs_and_entropy():
    z = logits()
    p = probs(z)
    with np.errstate(divide="ignore"):
        expected = np.log(p)
    np.testing.assert_allclose(law.log_probs(z), expected, rtol=1e-5, atol=1e-6)
    terms = np.where(p > 0, p * np.where(p > 0, expected, 0), 0)
    np.testing.assert_allclose(law.entropy(z), -terms.sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [5, 50_000])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 3.0, 300.0])
def test_entropy_of_flat_and_of_sharp_laws(size, spread):
    """Of a wide law nothing is lost in the sum, and of a sure one nothing cancels."""
    z = spread * np.random.default_rng(1).normal(size=(2, size)).astype(np.float32)
    p = probs(z)
    expected = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    found = np.asarray(jax.jit(law.entropy)(z))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    assert (found >= 0).all()


def test_the_gradient_of_entropy_against_numpy():
    """`dH/dz_v = -p_v (log p_v + H)`."""
    z = logits(absent=0)
    log_p = np.log(probs(z))
    entropy = -(np.exp(log_p) * log_p).sum(-1, keepdims=True)
    found = jax.grad(lambda z: law.entropy(z).sum())(jnp.asarray(z))
    np.testing.assert_allclose(
        found, -np.exp(log_p) * (log_p + entropy), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_best_token_is_the_first_of_equals(dtype):
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.integers(0, 4, (6, 2, 9)), dtype)  # many are equal
    z = z.at[0].set(-jnp.inf).at[1, 0, 3].set(jnp.inf)
    expected = np.argmax(np.asarray(z, np.float32), -1)
    for best in (law.best, jax.jit(law.best), jax.vmap(law.best)):
        np.testing.assert_array_equal(best(z), expected)
    assert law.best(z).dtype == jnp.int32
    # what is fused with it changes neither reduction alone
    fused = jax.jit(lambda z: law.best(jnp.sin(z * 3.7) * 1.1 + jnp.exp(-z)))
    wide = jnp.asarray(rng.normal(size=(64, 4096)), jnp.float32)
    again = jnp.sin(wide * 3.7) * 1.1 + jnp.exp(-wide)
    found = np.take_along_axis(np.asarray(again), np.asarray(fused(wide))[:, None], 1)
    np.testing.assert_allclose(found[:, 0], again.max(-1), rtol=1e-5)


def test_the_best_of_a_broken_law_is_some_token():
    z = jnp.full((1, 4), jnp.nan)
    assert 0 <= int(law.best(z)[0]) < 4


def test_a_dead_law_stays_dead_and_a_nan_stays():
    dead = jnp.full((1, 4), -jnp.inf)
    assert jnp.isneginf(law.log_probs(dead)).all()
    assert law.entropy(dead).tolist() == [0.0]
    assert jnp.isnan(law.log_probs(dead.at[0, 1].set(jnp.nan))).all()
    assert jnp.isnan(law.entropy(dead.at[0, 1].set(jnp.nan))).all()


@pytest.mark.parametrize("dead", [False, True])
def test_gradients_are_finite(dead):
    z = jnp.asarray(logits())
    z = z.at[0].set(-jnp.inf) if dead else z

    absent = jnp.isneginf(z)
    finite = jnp.where(absent, 0.0, z)

    def loss(scale):
        scaled = jnp.where(absent, -jnp.inf, finite * scale)
        log_p = law.log_probs(scaled)
        return jnp.where(absent, 0.0, log_p).sum() + law.entropy(scaled).sum()

    assert jnp.isfinite(jax.grad(loss)(1.5))
    by_logit = jax.grad(lambda z: law.entropy(z).sum())(z)
    assert jnp.isfinite(by_logit).all()


def test_row_keys():
    key = jax.random.key(3)
    rows = law.row_keys(key, 4)
    for b in range(4):
        assert rows[b] == jax.random.fold_in(key, b)
    assert (law.row_keys(rows, 4) == rows).all()
    with pytest.raises(ValueError, match="keys of shape"):
        law.row_keys(rows, 3)
    with pytest.raises(ValueError, match="typed key is expected"):
        law.row_keys(jax.random.key_data(key), 2)


def test_noise_depends_on_key_position_and_stream_alone():
    keys = law.row_keys(jax.random.key(0), 3)
    position = jnp.array([5, 6, 5])
    whole = law.noise(keys, position, 9)
    for b in range(3):
        alone = law.noise(keys[b : b + 1], position[b : b + 1], 9)
        np.testing.assert_array_equal(whole[b], alone[0])
    assert (whole != law.noise(keys, position + 1, 9)).any(-1).all()
    assert (whole != law.noise(keys, position, 9, law.DRAFT)).any(-1).all()


def test_draws_follow_the_law():
    """A chi-square test over 20,000 draws, one position each."""
    z = jnp.array([0.5, -1.0, -jnp.inf, 1.5])
    count = 20_000
    keys = jnp.broadcast_to(jax.random.key(1), count)
    drawn = law.draw(jnp.tile(z, (count, 1)), keys, jnp.arange(count))
    seen = np.bincount(drawn, minlength=4)
    expected = count * probs(np.asarray(z))
    assert seen[2] == 0
    kept = expected > 0
    assert ((seen - expected)[kept] ** 2 / expected[kept]).sum() < 16.3  # p = 0.001
