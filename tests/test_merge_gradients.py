"""Gradients through a merge against finite differences, in float64.

Masks are held fixed: they are piecewise constant, so a small step does not move them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.merge import averages, recipes
from collab_jax.merge.agree import disjoint_mean, elect_sign
from collab_jax.merge.memory import merge
from collab_jax.merge.schedule import by_name, knobs, linear_by_layer
from collab_jax.merge.sparsify import drop, trim, trim_whole
from collab_jax.merge.stack import chain, scheduled
from collab_jax.merge.weigh import mean_cosine, scale

STEP = 1e-6
SHAPES = {"layers_0": (3, 4), "layers_1": (3, 4)}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def models(count=3, seed=0):
    rng = np.random.default_rng(seed)

    def draw():
        return {k: jnp.asarray(rng.standard_normal(s)) for k, s in SHAPES.items()}

    base, common = draw(), draw()
    near = [jax.tree.map(lambda b, c, d: b + 0.3 * (c + d), base, common, draw())
            for _ in range(count)]  # fmt: skip
    return base, near, draw()


def check(make, knobs_, with_base=True, key=0, count=3):
    """make(knobs) -> (part, weights); the loss is a fixed function of the merge."""
    base, experts, target = models(count)

    def loss(values):
        part, weights = make(values)
        merged = merge(
            part, base if with_base else None, experts, weights, jax.random.key(key)
        )
        gaps = jax.tree.map(lambda m, t: jnp.sum(jnp.sin(m) * t + m**2), merged, target)
        return sum(jax.tree.leaves(gaps))

    both = jax.jit(jax.value_and_grad(loss))
    values = jnp.asarray(knobs_, jnp.float64)
    _, gradient = both(values)
    assert gradient.dtype == jnp.float64
    slopes = []
    for i in range(values.size):
        up, down = (both(values.at[i].add(s))[0] for s in (STEP, -STEP))
        slopes.append(float(up - down) / (2 * STEP))
    np.testing.assert_allclose(gradient, slopes, rtol=2e-7, atol=2e-7)
    return np.asarray(gradient)


WEIGHTS = (0.7, 0.2, 0.4)
# with a scale, whose masks do not depend on it
SCALED = {
    "task arithmetic": lambda lam: recipes.task_arithmetic(lam),
    "forget": lambda lam: recipes.forget(lam),
    "analogy": lambda lam: recipes.analogy(lam),
    "ties": lambda lam: recipes.ties(0.5, lam),
    "dare": lambda lam: recipes.dare(0.5, lam),
    "breadcrumbs": lambda lam: recipes.breadcrumbs(0.3, 0.1, lam),
    "della": lambda lam: recipes.della(0.6, 0.2, lam),
    "magmax": lambda lam: recipes.magmax(lam),
}
PLAIN = {
    "soup": averages.soup(),
    "metagpt": recipes.metagpt(),
    "varm": averages.varm(),
    "sce": averages.sce(0.5),
    "model stock": averages.model_stock(),
    "model stock, cosines": averages.model_stock(mean_cosine),
}


@pytest.mark.parametrize("name", SCALED)
def test_weights_and_lambda(name):
    gradient = check(lambda v: (SCALED[name](v[0]), list(v[1:])), [0.6, *WEIGHTS])
    assert (gradient != 0).all()


@pytest.mark.parametrize("name", PLAIN)
def test_weights(name):
    gradient = check(lambda w: (PLAIN[name], list(w)), WEIGHTS)
    assert (gradient != 0).all()


def test_weights_of_every_leaf():
    """Learned coefficients: one number per expert and leaf, as trees."""

    def make(values):
        rows = values.reshape(3, 2)
        trees = [{"layers_0": row[0], "layers_1": row[1]} for row in rows]
        return recipes.ties(0.5), trees

    check(make, np.linspace(0.2, 0.9, 6))


def test_a_rescaling_factor_with_its_mask_held_fixed():
    def rescaled(factor):
        return drop([0.5], lambda delta, mask: jnp.where(mask, delta * factor, 0))

    check(lambda v: (chain(rescaled(v[0]), scale(v[1])), None), [2.0, 0.3])

    def one_each(factors):
        def part(stack):
            drawn = drop([0.6], lambda d, mask: jnp.where(mask, d, 0))(stack)
            moved = zip(factors, drawn.deltas, strict=True)
            return drawn._replace(deltas=tuple(f * d for f, d in moved))

        return chain(part, elect_sign, disjoint_mean)

    check(lambda v: (one_each(v[:3]), None), [1.5, 2.0, 2.5])


def test_the_probability_of_a_drop_moves_the_rescale_alone():
    """Draws have a resolution of 2 ** -24: a step of 1e-6 flips none of them here."""
    check(lambda v: (recipes.dare(v[0]), None), [0.4])


@pytest.mark.parametrize("part", [trim, trim_whole])
def test_densities_have_no_slope(part):
    gradient = check(lambda v: (part(v[0]), None), [0.55])
    assert gradient == 0


def test_schedules_of_tracers():
    def by_layer(v):
        slope = linear_by_layer(v[0], v[1], layers=2)
        return scheduled(lambda k: scale(k["by"]), knobs(by=slope))

    check(lambda v: (by_layer(v), None), [0.2, 0.8])
    check(lambda v: (recipes.lines(v[0], v[1], 2), list(v[2:])), [0.2, 0.8, *WEIGHTS])

    def by_pattern(v):
        table = by_name({"layers_0": v[0], "layers_1": v[1]})
        part = scheduled(lambda k: scale(k["by"]), knobs(by=table))
        return chain(trim(0.5), elect_sign, disjoint_mean, part)

    gradient = check(lambda v: (by_pattern(v), None), [0.4, 1.2])
    assert (gradient != 0).all()


@pytest.mark.parametrize("max_iter", [0, 1, 100])
def test_karcher_mean(max_iter):
    """Of the weights and of the models, also where the steps are cut short."""
    part = averages.karcher_mean(max_iter)
    gradient = check(lambda v: (part, list(v)), WEIGHTS, with_base=False)
    assert (abs(gradient) > 1e-3).all()
    _, experts, target = models(3)
    rows = [expert["layers_0"] for expert in experts]

    @jax.jit
    @jax.value_and_grad
    def both(rows):
        merged = merge(part, None, [{"a": row} for row in rows], WEIGHTS)
        return jnp.sum(jnp.sin(merged["a"]) * target["layers_0"])

    slope = both(rows)[1]
    for n in range(3):
        up, down = (
            both([r + s * (i == n) * target["layers_1"] for i, r in enumerate(rows)])[0]
            for s in (STEP, -STEP)
        )
        along = jnp.sum(slope[n] * target["layers_1"])
        np.testing.assert_allclose(along, (up - down) / (2 * STEP), rtol=1e-6)


@pytest.mark.parametrize("scales", [(1, 1, 1), (1, 1, 0), (0, 0, 0), (1, -1, 1)])
def test_karcher_mean_of_models_that_do_not_pull(scales):
    """Equal ones, zeros, opposite ones: no NaN."""
    row = models(1)[0]["layers_0"]

    def loss(weights, scales):
        experts = [{"a": s * row} for s in scales]
        return merge(averages.karcher_mean(), None, experts, list(weights))["a"].sum()

    scales = jnp.asarray(scales, jnp.float64)
    gradients = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(WEIGHTS), scales)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_check_can_fail():
    """The control: a weight that the gradient does not see."""

    def blind(v):
        return chain(scale(jax.lax.stop_gradient(v[0]))), None

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(functools.partial(blind), [0.5])
