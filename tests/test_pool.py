"""Pools against NumPy in probabilities, and their rules for -inf, NaN and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax import pool

INF = np.inf
FORMS = {
    "mixture": lambda w: pool.mixture(w, 0.3, 0.2),
    "linear": lambda w: pool.linear(1, w, -0.7),
    "plausible": lambda w: pool.plausible(0.05 * w, pool.linear(1, 1, -1)),
    "contrast": lambda w: pool.contrast(0.05, w),
    "minimum": lambda w: pool.minimum(),
    "vote": lambda w: pool.vote(w, 0.3, 0.2),
}


def members(name, seed=0, absent=0.0, shape=(2, 3, 6)):
    rng = np.random.default_rng(seed)
    count = 2 if name == "contrast" else 3
    drawn = rng.normal(size=(count, *shape)).astype(np.float32) * 2
    drawn[rng.random(drawn.shape) < absent] = -INF
    drawn[..., 0] = rng.normal(size=drawn.shape[:-1])
    return [jnp.asarray(member) for member in drawn]


def probs(z):
    """Probabilities in float64; of nothing, nothing."""
    z = np.asarray(z, np.float64)
    top = z.max(-1, keepdims=True)
    p = np.exp(z - np.where(np.isneginf(top), 0, top))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total)


def normal(p):
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total)


def product_of_experts(weights, laws):
    """Token by token, as the rule for -inf is written."""
    result = np.zeros_like(laws[0])
    for index in np.ndindex(result.shape):
        p = [law[index] for law in laws]
        value = 0.0 if p[0] == 0 else p[0] ** weights[0]
        for w, q in zip(weights[1:], p[1:], strict=True):
            if q > 0:
                value *= q**w
            elif w > 0:
                value = 0.0  # forbids
            # else it is left out
        result[index] = value
    return normal(result)


def expected(name, w, laws):
    if name == "mixture":
        return normal(sum(v * p for v, p in zip((w, 0.3, 0.2), laws, strict=True)))
    if name == "linear":
        return product_of_experts((1, w, -0.7), laws)
    if name == "minimum":
        return normal(np.minimum.reduce(laws))
    if name == "vote":
        best = [np.eye(p.shape[-1])[p.argmax(-1)] for p in laws]
        return normal(sum(v * p for v, p in zip((w, 0.3, 0.2), best, strict=True)))
    alpha = 0.05 if name == "contrast" else 0.05 * w
    kept = laws[0] >= alpha * laws[0].max(-1, keepdims=True)
    weights = (1 + w, -w) if name == "contrast" else (1, 1, -1)
    return normal(np.where(kept, product_of_experts(weights, laws), 0))


@pytest.mark.parametrize("absent", [0.0, 0.4])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_definition(name, absent):
    for seed, w in itertools.product(range(5), (0.5, 1.5)):
        z = members(name, seed, absent)
        found = FORMS[name](w)(z)
        assert not jnp.isnan(found).any()
        mine, theirs = probs(found), expected(name, w, [probs(m) for m in z])
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=1e-6)


def test_the_rules_for_forbidden_tokens():
    """The base forbids; others forbid at positive weight, and are left out below."""
    free = jnp.zeros((1, 1, 3))
    banned = jnp.array([[[0.0, 0.0, -INF]]])
    forbids = lambda p, *z: bool(jnp.isneginf(p(z)[0, 0, 2]))  # noqa: E731
    for w in (2.0, 0.5, -0.5, 0.0):
        assert forbids(pool.linear(w, 1.0), banned, free)
    assert forbids(pool.linear(1, 0.5), free, banned)
    assert not forbids(pool.linear(1, -0.5), free, banned)
    left_out = pool.linear(1, -0.5)([free, banned])[0, 0]
    np.testing.assert_allclose(left_out[2], -np.log(3), rtol=1e-6)
    assert forbids(pool.contrast(0.1, 0.5), banned, free)
    assert not forbids(pool.contrast(0.1, 0.5), free, banned)
    assert not forbids(pool.mixture(0.5, 0.5), free, banned)
    assert forbids(pool.mixture(0.5, 0.5), banned, banned)
    assert forbids(pool.minimum(), free, banned)
    nothing = jnp.full((1, 1, 3), -INF)
    for name, form in FORMS.items():
        z = [nothing] * len(members(name))
        found = form(0.5)(z)
        assert not jnp.isnan(found).any(), name


@pytest.mark.parametrize("name", FORMS)
def test_a_nan_of_any_member_shows(name):
    z = members(name, absent=0.3)
    for n in range(len(z)):
        bad = list(z)
        bad[n] = bad[n].at[0, 0, 1].set(jnp.nan)
        found = FORMS[name](0.5)(bad)
        assert jnp.isnan(found[0, 0]).any(), f"member {n}"
        assert not jnp.isnan(found[1]).any()


@pytest.mark.parametrize("name", ["mixture", "linear", "plausible", "contrast"])
def test_gradients_and_sweeps(name):
    z = members(name, absent=0.4)

    def loss(w, z):
        found = FORMS[name](w)(z)
        log_p = jax.nn.log_softmax(found, where=~jnp.isneginf(found))
        return jnp.where(jnp.isneginf(found), 0.0, log_p).sum()

    by_weight, by_logits = jax.grad(loss, argnums=(0, 1))(0.5, z)
    assert jnp.isfinite(by_weight)
    assert all(jnp.isfinite(g).all() for g in by_logits)
    if name != "plausible":  # there the knob decides, and has no slope
        step = 1e-2
        slope = (loss(0.5 + step, z) - loss(0.5 - step, z)) / (2 * step)
        np.testing.assert_allclose(by_weight, slope, rtol=2e-2, atol=2e-2)
    knobs = jnp.array([0.2, 0.5, 1.1])
    swept = jax.jit(jax.vmap(lambda w: FORMS[name](w)(z)))(knobs)
    for w, one in zip(knobs.tolist(), swept, strict=True):
        np.testing.assert_allclose(one, FORMS[name](w)(z), rtol=1e-5, atol=1e-5)


def test_equal_weights_and_invariance():
    z = members("mixture")
    third = pool.mixture(1 / 3, 1 / 3, 1 / 3)
    np.testing.assert_allclose(pool.mixture()(z), third(z), rtol=1e-5)
    shifted = [member + 5.0 for member in z]
    for name in ("mixture", "linear", "plausible", "minimum", "vote"):
        mine, theirs = FORMS[name](0.5)(shifted), FORMS[name](0.5)(z)
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_refuses():
    z = members("mixture")
    with pytest.raises(ValueError, match="2 weights for 3 members"):
        pool.mixture(0.5, 0.5)(z)
    with pytest.raises(ValueError, match="2 weights for 3 members"):
        pool.linear(1, 1)(z)
    with pytest.raises(ValueError, match="vocabularies of"):
        pool.minimum()([z[0], z[1][..., :3]])
    with pytest.raises(ValueError, match=r"weight of -0\.5"):
        pool.mixture(1.5, -0.5)
    with pytest.raises(ValueError, match="alpha = 2"):
        pool.contrast(2, 0.5)
