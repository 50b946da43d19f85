"""CombLM: seven forms against NumPy, their fitting, and the pools as laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transferring as own
from transferring import TABLE, TABLES, VOCAB, check_methods, log_softmax

from collab_jax import pool
from collab_jax.cooperate.transfer import comblm
from collab_jax.cooperate.transfer.comblm_fitting import (
    Recorded,
    fit,
    fitter,
    nats,
    record,
)

FORMS = {
    "mean": comblm.mean(),
    "constant scalar": comblm.constant_scalar(),
    "constant vector": comblm.constant_vector(),
    "entropy scalar": comblm.entropy_scalar(8),
    "entropy vector": comblm.entropy_vector(8),
    "full scalar": comblm.full_scalar(8),
    "full vector": comblm.full_vector(8, layers=1),
}


def drawn(name, seed=0):
    """Parameters that are not those of a beginning."""
    fitted = FORMS[name].init(jax.random.key(seed), VOCAB)
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x + rng.normal(size=x.shape), fitted.weights)
    return comblm.Fitted(moved, fitted.mean + 0.3, fitted.variance * 2)


def twin(name, fitted, large, expert):
    """The combination at one place, from log-probs `[V]`."""
    laws = np.exp(large), np.exp(expert)
    inputs = []
    if name.startswith("entropy"):
        inputs = [-sum(p * np.log(p) for p in one if p > 0) for one in laws]
    elif name.startswith("full"):
        inputs = np.concatenate(laws)
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), fitted.weights)
    if name == "mean":
        score = np.zeros(1)
    elif name.startswith("constant"):
        score = weights
    else:
        x = (np.array(inputs) - np.asarray(fitted.mean)) / np.sqrt(
            np.asarray(fitted.variance, np.float64) + 1e-5
        )
        for layer in weights[:-1]:
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        score = x @ weights[-1]["kernel"] + weights[-1]["bias"]
    f = 1 / (1 + np.exp(-score))
    with np.errstate(divide="ignore"):
        return np.log(f * laws[1] + (1 - f) * laws[0])


def members(absent=0.3, shape=(2, 3)):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(2, *shape, VOCAB)).astype(np.float32) * 2
    z[rng.random(z.shape) < absent] = -np.inf
    z[..., 0] = 0.0
    return list(map(jnp.asarray, z))


@pytest.mark.parametrize("name", FORMS)
def test_equals_its_definition(name):
    z, fitted = members(), drawn(name)
    found = np.asarray(comblm.combined(FORMS[name], fitted)(z), np.float64)
    for place in np.ndindex(found.shape[:-1]):
        laws = [log_softmax(np.asarray(m, np.float64)[place]) for m in z]
        expected = twin(name, fitted, *laws)
        mine, theirs = log_softmax(found[place]), log_softmax(expected)
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    swapped = comblm.combined(FORMS[name], fitted)(z[::-1])
    if name != "mean":  # the share is the expert's
        assert abs(jnp.exp(swapped) - jnp.exp(found)).max() > 1e-2


@pytest.mark.parametrize("name", FORMS)
def test_equal_models_nothing_and_nan(name):
    z, form = members(0.0), comblm.combined(FORMS[name], drawn(name))
    once = jax.nn.softmax(z[0])
    scalar = "vector" not in name
    found = jax.nn.softmax(form([z[0], z[0]]))
    np.testing.assert_allclose(found, once, rtol=1e-5, atol=1e-7)
    nothing = jnp.full((1, 1, VOCAB), -jnp.inf)
    assert not jnp.isnan(form([nothing, nothing])).any()
    for n in range(2):
        bad = [m.at[0, 0, 1].set(jnp.nan) if i == n else m for i, m in enumerate(z)]
        found = form(bad)
        assert jnp.isnan(found[0, 0]).any()
        assert not jnp.isnan(found[1]).any()
    if scalar:  # one share at every place: the law is between both
        both = jnp.stack([jax.nn.softmax(one) for one in z])
        mixed = jax.nn.softmax(form(z))
        assert (mixed >= both.min(0) - 1e-6).all()
        assert (mixed <= both.max(0) + 1e-6).all()


def test_the_mean_is_the_equal_mixture():
    z = members()
    form = comblm.combined(comblm.mean(), comblm.mean().init(own.KEY, VOCAB))
    expected = pool.mixture(0.5, 0.5)(z)
    np.testing.assert_allclose(form(z), expected, rtol=1e-6)


measured = jax.jit(nats, static_argnums=0)


def places(seed, count=256, known=0.5):
    """Places where the first model knows what follows if it is sure, else the other."""
    rng = np.random.default_rng(seed)
    knows = rng.random(count) < known
    tokens = rng.integers(0, VOCAB, count)
    laws = []
    for right in (knows, ~knows):
        z = rng.normal(size=(count, VOCAB)) * 0.3
        z[np.arange(count), tokens] += np.where(right, 4.0, 0.0)
        laws.append(jnp.asarray(log_softmax(z), jnp.float32))
    return Recorded(*laws, jnp.asarray(tokens), jnp.ones(count))


def test_fitting_learns_whom_to_trust():
    """Entropies tell who knows; the mean and one number cannot."""
    losses = {}
    for name in ("mean", "constant scalar", "entropy scalar", "full scalar"):
        batches = (places(seed) for seed in range(120))
        fitted, history = fit(FORMS[name], batches, optax.adam(1e-2), own.KEY)
        losses[name] = float(measured(FORMS[name], fitted, places(1000)))
        assert len(history) == 120
    assert losses["entropy scalar"] < 0.6 * losses["mean"]
    assert losses["full scalar"] < 0.6 * losses["mean"]
    assert losses["constant scalar"] > 0.9 * losses["mean"]


def test_a_vector_learns_which_tokens_to_trust():
    """The expert knows tokens 0 to 2, the large model the others."""

    def batch(seed):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, VOCAB, 256)
        z = rng.normal(size=(2, 256, VOCAB)) * 0.3
        z[(tokens < 3).astype(int), np.arange(256), tokens] += 2.5
        laws = [jnp.asarray(log_softmax(one), jnp.float32) for one in z]
        return Recorded(*laws, jnp.asarray(tokens), jnp.ones(256))

    batches = map(batch, range(80))
    form = comblm.constant_vector()
    fitted, _ = fit(form, batches, optax.adam(5e-2), own.KEY)
    share = np.asarray(form.share(fitted.weights, jnp.zeros(0)))
    assert share[:3].min() > share[3:].max() + 0.2
    start = form.init(own.KEY, VOCAB)
    losses = [measured(form, one, batch(99)) for one in (fitted, start)]
    assert losses[0] < losses[1] - 0.05


def test_a_fit_finds_the_best_number():
    """Gradient descent of one number, against a grid."""
    data = places(3, known=0.7)  # by the large model
    form = comblm.constant_scalar()
    fitted, _ = fit(form, itertools.repeat(data, 300), optax.adam(5e-2), own.KEY)
    grid = jnp.linspace(-8, 8, 321)[:, None]
    found = jax.vmap(lambda w: nats(form, fitted._replace(weights=w), data))(grid)
    assert measured(form, fitted, data) < found.min() + 1e-5
    assert 0.1 < form.share(fitted.weights, jnp.zeros(0))[0] < 0.45


def test_inputs_are_scaled_over_all_batches():
    """Mean and variance of two unequal batches are those of their union."""
    form, data = comblm.entropy_scalar(4), [places(0, 64), places(1, 64)]
    data[1] = data[1]._replace(weights=jnp.asarray(np.arange(64) < 9, jnp.float32))
    run = fitter(form, optax.sgd(0.0))
    state, step = run.init(form.init(own.KEY, VOCAB)), jax.jit(run.step)
    x, inputs = [], jax.jit(form.inputs)
    for batch in data:
        state, _ = step(state, batch)
        found = np.asarray(inputs(batch.large, batch.expert), np.float64)
        x.append(found[np.asarray(batch.weights) > 0])
    x = np.concatenate(x)
    np.testing.assert_allclose(state.fitted.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.fitted.variance, x.var(0), rtol=1e-4)


def test_recording_reads_the_text_as_the_models_do():
    texts = [[1, 2, 3, 4, 5, 6, 0, 1], [4, 4, 2]]
    tokens, length = own.decode.pad(texts)
    batches = list(record([TABLE, TABLE], TABLES[:2], tokens, length, chunk=3))
    assert len({batch.large.shape for batch in batches}) == 1
    found = {}
    for n, batch in enumerate(batches):
        for place in np.flatnonzero(np.asarray(batch.weights)):
            row, here = place // 3, n * 3 + place % 3
            found[row, here] = batch.large[place], batch.expert[place]
            assert batch.tokens[place] == texts[row][here + 1]
    expected = {
        (row, t) for row, text in enumerate(texts) for t in range(len(text) - 1)
    }
    assert set(found) == expected
    for (row, here), laws in found.items():
        for params, mine in zip(TABLES, laws, strict=False):
            z = own.logits(TABLE, params, texts[row][: here + 1])
            np.testing.assert_allclose(mine, log_softmax(z), atol=1e-5)


def test_fitted_pools_are_laws_like_any_other():
    names = ["constant vector", "entropy scalar", "full vector"]
    pools = {name: comblm.combined(FORMS[name], drawn(name)) for name in names}

    def behind(name):
        def read(text, row):
            del row
            laws = [log_softmax(own.logits(TABLE, p, text)) for p in TABLES[:2]]
            return twin(name, drawn(name), *laws)

        return read

    cases = {
        name: ((jnp.array(n), TABLES[:2]), behind(name)) for n, name in enumerate(names)
    }
    check_methods(own.pooled(TABLE, pools, 2), cases)


def test_refuses():
    with pytest.raises(ValueError, match="no batches"):
        fit(comblm.mean(), [], optax.sgd(1.0), own.KEY)
    with pytest.raises(ValueError, match="width = 0"):
        comblm.entropy_scalar(0)
    with pytest.raises(ValueError, match="layers = 0"):
        comblm.full_vector(layers=0)
    banned = jnp.full((1, VOCAB), -jnp.inf).at[:, 1].set(0.0)
    batch = Recorded(banned, banned, jnp.array([0]), jnp.ones(1))
    with pytest.raises(FloatingPointError, match="loss of step 0 is inf"):
        fit(comblm.constant_scalar(), [batch], optax.sgd(1.0), own.KEY)
    alone = batch._replace(weights=jnp.zeros(1))
    assert fit(comblm.constant_scalar(), [alone], optax.sgd(1.0), own.KEY)[1] == [0.0]
