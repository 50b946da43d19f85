"""Pools of transfer: their definitions in float64, -inf, NaN, gradients, identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_transfer import FORMS, INF, twin
from transferring import log_softmax

from collab_jax import pool, warp
from collab_jax.cooperate.efficient import distill
from collab_jax.cooperate.transfer import (
    context,
    contrast,
    layers,
    nudge,
    objectives,
    offset,
    reward,
)

NO_SLOPE = {"dola", "nudging"}  # the knob decides


def members(name, seed=0, absent=0.0, shape=(2, 3, 6)):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(FORMS[name][0], *shape)).astype(np.float32) * 2
    drawn[rng.random(drawn.shape) < absent] = -INF
    drawn[..., 0] = rng.normal(size=drawn.shape[:-1])
    return [jnp.asarray(member) for member in drawn]


@pytest.mark.parametrize("name", FORMS)
def test_equals_its_definition(name):
    program = jax.jit(lambda w, z: FORMS[name][1](w)(z))
    for seed, absent, w in ((0, 0.0, 0.5), (1, 0.4, 0.6), (2, 0.4, 0.8)):
        z = members(name, seed, absent)
        found = np.asarray(program(w, z), np.float64)
        assert not np.isnan(found).any()
        for place in np.ndindex(found.shape[:-1]):
            theirs = twin(name, w, [np.asarray(m, np.float64)[place] for m in z])
            mine = found[place]
            if name != "contrastive":  # whose scores are not a law
                mine, theirs = log_softmax(mine), log_softmax(theirs)
            np.testing.assert_allclose(mine, theirs, atol=2e-4)
    assert program._cache_size() == 1


@pytest.mark.parametrize("name", FORMS)
def test_nothing_makes_a_nan_and_a_nan_shows(name):
    count, form = FORMS[name]
    program = jax.jit(form(0.5))
    nothing = [jnp.full((1, 1, 6), -INF)] * count
    assert not jnp.isnan(program(nothing)).any()
    z = members(name, absent=0.3)
    for n in range(count):
        bad = list(z)
        bad[n] = bad[n].at[0, 0, 1].set(jnp.nan)
        found = program(bad)
        read = name != "nudging" or n == 0 or jnp.exp(pool.log_probs(z[0])).max() < 0.25
        assert jnp.isnan(found[0, 0]).any() == read, f"member {n}"
        assert not jnp.isnan(found[1]).any()


@pytest.mark.parametrize("name", FORMS)
def test_gradients_and_one_trace_for_a_sweep(name):
    z = members(name, absent=0.4)
    form, traces = FORMS[name][1], []

    def loss(w, z):
        found = form(w)(z)
        log_p = jax.nn.log_softmax(found, where=~jnp.isneginf(found))
        return jnp.where(jnp.isneginf(found), 0.0, log_p).sum()

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    _, (by_knob, by_logits) = both(0.5, z)
    assert jnp.isfinite(by_knob)
    assert all(jnp.isfinite(g).all() for g in by_logits)
    if name in NO_SLOPE:
        assert by_knob == 0
    else:
        step = 1e-2
        slope = (both(0.5 + step, z)[0] - both(0.5 - step, z)[0]) / (2 * step)
        np.testing.assert_allclose(by_knob, slope, rtol=2e-2, atol=2e-2)

    def one(w):
        traces.append(None)
        return form(w)(z)

    knobs = jnp.array([0.2, 0.5, 0.8])
    sweep = jax.jit(jax.vmap(one))
    for w, found in zip(knobs, sweep(knobs), strict=True):
        np.testing.assert_allclose(found, form(w)(z), rtol=1e-5, atol=1e-5)
    sweep(knobs + 0.05)
    assert len(traces) == 1


def law(z):
    return np.asarray(jax.nn.softmax(z))


def laws(count, seed=0):
    drawn = 2 * jax.random.normal(jax.random.key(seed), (count, 2, 3, 6))
    return list(drawn)


A, B, C, D, E = laws(5)
# pool, members, what it must be to rounding
IDENTITIES = {
    "contrastive of strength 0": (contrast.contrastive(0, 0.0, 0.5), [A, B], A),
    "contrast of beta 0": (pool.contrast(0, 0.0), [A, B], A),
    "dexperts of alpha 0": (contrast.dexperts(0.0, 1), [A, B, C], A),
    "dexperts of equal experts": (contrast.dexperts(2.0, 1), [A, B, B], A),
    "cad of alpha 0": (context.cad(0.0), [A, B], A),
    "cad without a conflict": (context.cad(3.0), [A, A], A),
    "cad of alpha -1": (context.cad(-1.0), [A, B], B),
    "adacad of scale 0": (context.adacad(0.0, 0.0), [A, B], A),
    "adacad without a conflict": (context.adacad(), [A, A], A),
    "adacad at its least": (context.adacad(5.0), [A, B], context.cad(5.0)([A, B])),
    "sled of rate 0": (layers.sled(0.0, 6), [A, B, C], A),
    "sled of equal layers": (layers.sled(3.0, 6), [A, A, A], A),
    "one early layer": (layers.dola(0), [A, B], pool.linear(1, -1)([A, B])),
    "a distant layer of weight 0": (
        layers.most_distant(pool.linear(1, 0)), [A, B, C], A,
    ),
    "proxy tuning of alpha 0": (offset.proxy_tuning(0.0), [A, B, C], A),
    "proxy tuning of equal experts": (offset.proxy_tuning(), [A, B, B], A),
    "proxy tuning of the base": (offset.proxy_tuning(), [A, B, A], B),
    "weak to strong of equal ones": (offset.weak_to_strong(), [A, B, B], A),
    "emulated of weight 0": (offset.emulated(0.0), [A, B, C], A),
    "emulated of weight 1": (offset.emulated(1.0), [A, B, A], B),
    "emulated of two pairs": (
        offset.emulated(0.3, 0.7), [A, B, A, B, A], B,
    ),
    "dera of 0": (offset.dera(0.0), [A, B], A),
    "dera of 1": (offset.dera(1.0), [A, B], B),
    "mod of one": (objectives.mod(1.0), [A], A),
    "mod of equals": (objectives.mod(0.3, 0.7), [A, A], A),
    "power mean of equals": (objectives.power_mean(-2, 0.3, 0.7), [A, A], A),
    "power mean of 1": (
        objectives.power_mean(1, 0.3, 0.7), [A, B], pool.mixture(0.3, 0.7)([A, B]),
    ),
    "jensen-shannon of one": (objectives.jensen_shannon_mean(1.0), [A, B], B),
    "jensen-shannon of equals": (
        objectives.jensen_shannon_mean(0.3, 0.7), [A, B, B], B,
    ),
    "jensen-shannon of the reference": (
        objectives.jensen_shannon_mean(0.3, 0.7), [A, A, A], A,
    ),
    "genarm of 0": (reward.genarm(0.0), [A, B], A),
    "genarm without a preference": (reward.genarm(2.0), [A, jnp.zeros_like(A)], A),
    "genarm is emulated tuning over an even reference": (
        reward.genarm(0.7),
        [A, B],
        offset.emulated(0.7)([A, B, jnp.zeros_like(A)]),
    ),
    "nudging of 0": (nudge.nudging(0), [A, B], A),
    "nudging of 1": (nudge.nudging(1), [A, B], B),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    form, given, expected = IDENTITIES[name]
    np.testing.assert_allclose(law(form(given)), law(expected), rtol=2e-5, atol=1e-7)


def test_contrast_goes_to_the_expert_with_its_knobs():
    for alpha in (1e-2, 1e-4, 1e-9):
        found = pool.contrast(alpha, 0.0)([A, B])
        cut = np.asarray(law(A) < alpha * law(A).max(-1, keepdims=True))
        assert (np.isneginf(found) == cut).all()
    np.testing.assert_allclose(law(found), law(A), rtol=1e-6)


def test_a_power_mean_goes_to_the_geometric_one():
    expected = law(objectives.mod(0.3, 0.7)([A, B]))
    gaps = [
        abs(law(objectives.power_mean(r, 0.3, 0.7)([A, B])) - expected).max()
        for r in (-0.1, -0.01, -0.001)
    ]
    assert gaps[0] > 5 * gaps[1] > 20 * gaps[2]


def divergence(z):
    return distill.jensen_shannon()(*map(pool.log_probs, z))


# the mistakes that public code makes, and what they change
WRONG = {
    "contrastive": lambda w: pool.plausible(0.05, pool.linear(1, -w)),  # no temperature
    "dexperts": lambda w: lambda z: warp.top_p(0.8)(pool.linear(1, w, -w)(z)),
    "cad": lambda w: pool.linear(1, -w),
    "adacad": lambda w: (
        lambda z: context.cad(
            jnp.maximum(0.02, w * divergence(z)).mean()  # one number for the batch
        )(z)
    ),
    "dola": lambda w: lambda z: pool.plausible(0.05 * w, pool.linear(1, -1))(z[:2]),
    "sled": lambda w: layers.sled(-w, 3),  # a step away from the latent law
    "proxy tuning": lambda w: pool.linear(1, w, w),
    "emulated": lambda w: pool.linear(1, w, 0.5, -w, -0.5),  # pairs in another order
    "jensen-shannon": lambda w: lambda z: pool.linear(w, 1 - w)(z[1:]),
    "genarm": lambda w: pool.linear(1 - w - 0.5, w, 0.5),  # a mean, as of equals
    "nudging": lambda w: lambda z: nudge.nudging(0.5 * w)(z[::-1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_form_is_seen(name):
    z, w = members(name, 1), 0.6
    found = log_softmax(WRONG[name](w)(z))
    apart = 0.0
    for place in np.ndindex(found.shape[:-1]):
        theirs = twin(name, w, [np.asarray(m, np.float64)[place] for m in z])
        with np.errstate(invalid="ignore"):
            gap = np.exp(found[place]) - np.exp(log_softmax(theirs))
        apart = max(apart, abs(gap).max())
    assert apart > 1e-2


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: contrast.contrastive(2), "alpha = 2"),
        (lambda: contrast.contrastive(0.1, 1, 0), "temperature = 0"),
        (lambda: contrast.dexperts(1, 0), "top_p = 0"),
        (lambda: contrast.dexperts(1)([A, B]), "3 warps for 2 members"),
        (lambda: contrast.contrastive()([A]), "2 warps for 1 members"),
        (lambda: context.cad()([A]), "2 weights for 1 members"),
        (lambda: context.adacad()([A, B[..., :3]]), "vocabularies of"),
        (lambda: context.contexts((), [[1]], [[1], [2]]), "1 prompts with a context"),
        (lambda: context.contexts((), [[1]], [[]]), "at least one token"),
        (lambda: layers.dola(-1), "alpha = -1"),
        (lambda: layers.dola()([A]), "another one to contrast"),
        (lambda: layers.sled()([A]), "an early layer"),
        (lambda: offset.emulated(), "without weights"),
        (lambda: offset.emulated(1)([A, B]), "3 members"),
        (lambda: objectives.jensen_shannon_mean(1.5, -0.5), "at least 0"),
        (lambda: objectives.jensen_shannon_mean(1.0)([A]), "2 weights for 1 members"),
        (lambda: reward.genarm(), "without weights"),
        (lambda: reward.genarm(1.0)([A]), "2 weights for 1 members"),
        (lambda: objectives.mod(0.5, 0.6), "of sum 1.1"),
        (lambda: objectives.power_mean(0, 0.5, 0.5), "exponent = 0"),
        (lambda: objectives.power_mean(1, 1.5, -0.5), "at least 0"),
        (lambda: nudge.nudging(2), "gamma = 2"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
