"""Warps against NumPy with sorting, and their rules for -inf, NaN, slopes and trees."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import warp
from collab_jax.models import table

KNOBS = {
    "temperature": (warp.temperature, (0.3, 1.0, 1.7)),
    "top_k": (warp.top_k, (1, 3, 100)),
    "top_p": (warp.top_p, (0.2, 0.7, 1.0)),
    "min_p": (warp.min_p, (0.0, 0.1, 1.0)),
}


def logits(seed=0, absent=0.2, shape=(3, 4, 11)):
    rng = np.random.default_rng(seed)
    drawn = (3 * rng.normal(size=shape)).astype(np.float32)
    drawn[rng.random(shape) < absent] = -np.inf
    drawn[..., 0] = rng.normal(size=shape[:-1])
    return drawn


def probs(z):
    p = np.exp(z.astype(np.float64) - z.max())
    return p / p.sum()


def kept(name, knob, z):
    """Which tokens of one row stay, by sorting; None where the margin is too small."""
    order = np.argsort(-z, kind="stable")
    if name == "top_k":
        return z >= z[order[min(knob, len(z)) - 1]]
    p = probs(z)
    if name == "min_p":
        gap = np.abs(p - knob * p.max())
        close = (gap < 1e-6 * p.max()) & (p < p.max()) & (p > 0)
        return None if close.any() else (p >= knob * p.max())
    mass = np.cumsum(p[order])
    if knob == 1:
        return np.ones(len(z), bool)
    if np.abs(mass - knob).min() < 1e-5:
        return None
    least = p[order[np.searchsorted(mass, knob)]]
    return p >= least


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_filters_equal_sorting(name):
    make, knobs = KNOBS[name]
    checked = 0
    for seed, knob in itertools.product(range(20), knobs):
        z = logits(seed)
        found = np.asarray(make(knob)(jnp.asarray(z)))
        for row, mine in zip(z.reshape(-1, 11), found.reshape(-1, 11), strict=True):
            stays = kept(name, knob, row)
            if stays is not None:
                checked += 1
                np.testing.assert_array_equal(mine, np.where(stays, row, -np.inf))
    assert checked > 600


def test_ties_with_the_threshold_stay():
    z = jnp.array([[[2.0, 1.0, 1.0, 1.0, 0.0]]])
    assert jnp.isfinite(warp.top_k(2)(z))[0, 0].tolist() == [True] * 4 + [False]
    assert jnp.isfinite(warp.top_p(0.5)(z))[0, 0].tolist() == [True] * 4 + [False]


def test_temperature_greedy_forbid():
    z = logits()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(warp.temperature(0.3)(z), z / 0.3, rtol=1e-6)
    best = np.asarray(warp.greedy()(jnp.asarray(z)))
    np.testing.assert_array_equal(best.argmax(-1), z.argmax(-1))
    np.testing.assert_array_equal(np.exp(best).sum(-1), 1)
    without = np.asarray(warp.forbid([0, 10])(jnp.asarray(z)))
    assert np.isneginf(without[..., [0, 10]]).all()
    np.testing.assert_array_equal(without[..., 1:10], z[..., 1:10])


PENALTIES = {
    "repetition": (lambda k: warp.repetition_penalty(k), (0.7, 1.0, 1.8)),
    "frequency": (lambda k: warp.frequency_penalty(k), (-0.5, 0.0, 0.8)),
    "presence": (lambda k: warp.frequency_penalty(0.1, k), (-0.5, 0.0, 0.8)),
}


def penalised(name, knob, row, text):
    result = row.astype(np.float64)
    for token, count in zip(*np.unique(text, return_counts=True), strict=True):
        if name == "repetition":
            result[token] *= 1 / knob if row[token] > 0 else knob
        elif name == "frequency":
            result[token] -= knob * count
        else:
            result[token] -= 0.1 * count + knob
    return result


def history(seed=0, rows=3, count=4, size=9, vocab=11):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, size))
    seen = rng.random((rows, count, size)) < 0.5
    return warp.History(jnp.asarray(tokens), jnp.asarray(seen))


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_equal_counting(name):
    make, knobs = PENALTIES[name]
    for seed, knob in itertools.product(range(5), knobs):
        z, read = logits(seed), history(seed)
        found = np.asarray(make(knob).apply(jnp.asarray(z), read))
        for b, t in np.ndindex(3, 4):
            text = np.asarray(read.tokens[b])[np.asarray(read.visible[b, t])]
            expected = penalised(name, knob, z[b, t], text)
            np.testing.assert_allclose(found[b, t], expected, rtol=1e-5, atol=1e-6)


def applied(name, knob, z):
    if name in KNOBS:
        return KNOBS[name][0](knob)(z)
    return PENALTIES[name][0](knob).apply(z, history())


@pytest.mark.parametrize("name", [*KNOBS, *PENALTIES])
def test_nan_stays_and_a_dead_law_stays(name):
    z = jnp.asarray(logits()).at[0, 0, 3].set(jnp.nan).at[1].set(-jnp.inf)
    for knob in {**KNOBS, **PENALTIES}[name][1]:
        found = applied(name, knob, z)
        assert jnp.isnan(found[0, 0]).any()
        assert jnp.isneginf(found[1]).all()
        assert not jnp.isnan(found[2]).any()


@pytest.mark.parametrize("name", [*KNOBS, *PENALTIES])
def test_knobs_are_traced_and_slopes_are_finite(name):
    z = jnp.asarray(logits())
    knobs = jnp.asarray({**KNOBS, **PENALTIES}[name][1])
    swept = jax.jit(jax.vmap(lambda knob: applied(name, knob, z)))(knobs)
    for knob, one in zip(knobs.tolist(), swept, strict=True):
        np.testing.assert_allclose(one, applied(name, knob, z), rtol=1e-6)

    def loss(knob, z):
        found = applied(name, knob, z)
        absent = jnp.isneginf(found)
        log_p = jax.nn.log_softmax(found, where=~absent)
        return jnp.where(absent, 0.0, log_p).sum()

    arguments = float(knobs[0]) if name != "top_k" else 3.0, z
    slopes = jax.grad(loss, argnums=(0, 1))(*arguments)
    assert all(jnp.isfinite(slope).all() for slope in slopes)


def test_a_tree_reads_its_own_path():
    lm = warp.warp(table.language_model(1), warp.repetition_penalty(4.0))
    plain = table.language_model(1)
    params = table.init(jax.random.key(0), 6, 1, 2.0)
    prompt, tree = jnp.array([[0, 1]]), jnp.array([[2, 3, 4, 4, 5]])
    parents = jnp.array([[-1, -1, 0, 1, 2]])
    _, state = lm.extend(params, lm.init(params, 1, 12), prompt)
    out, _ = lm.branch(params, state, tree, parents)
    _, state = plain.extend(params, plain.init(params, 1, 12), prompt)
    raw, _ = plain.branch(params, state, tree, parents)
    paths = [[2], [3], [2, 4], [3, 4], [2, 4, 5]]
    for node, path in enumerate(paths):
        row = np.asarray(raw.logits[0, node])
        expected = penalised("repetition", 4.0, row, [0, 1, *path])
        np.testing.assert_allclose(out.logits[0, node], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (warp.temperature, 0.0),
        (warp.top_k, 0),
        (warp.top_p, 0.0),
        (warp.top_p, 1.1),
        (warp.min_p, -0.1),
        (warp.repetition_penalty, 0.0),
    ],
)
def test_refuses(make, bad):
    with pytest.raises(ValueError, match=f"{make.__name__} = {bad}"):
        make(bad)
