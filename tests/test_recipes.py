"""Merges of task vectors against NumPy, against golden vectors, and their parts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import naive_merge as naive
import numpy as np
import pytest

from collab_jax.merge import averages, recipes, split
from collab_jax.merge.agree import disjoint_mean, elect_sign, shared_by
from collab_jax.merge.magnitude import kept
from collab_jax.merge.memory import merge
from collab_jax.merge.pieces import flat
from collab_jax.merge.program import Leaf, programs
from collab_jax.merge.schedule import by_name, count_layers, knobs, linear_by_layer
from collab_jax.merge.sparsify import drop_by_rank, keep_band, trim
from collab_jax.merge.stack import Stack, chain, scheduled
from collab_jax.merge.weigh import by_place, scale, unweighted

GOLDEN = np.load(Path(__file__).parent / "golden" / "recipes.npz")
WEIGHTS = (0.7, 0.2, 0.4)
BASE, EXPERTS = naive.models(3)


def apart(found, expected):
    """The largest gap of any leaf."""
    assert found.keys() == expected.keys()
    return max(abs(np.asarray(found[k], np.float64) - expected[k]).max() for k in found)


def by_depth(alpha, beta, layers=3):
    def rule(d, weights, name):
        layer = int(name[7]) if name.startswith("layers_") else None
        factor = alpha if layer is None else alpha + beta * layer / (layers - 1)
        return factor * naive.weighted_sum(d, weights)

    return rule


def crumbs(beta, gamma, alpha):
    def rule(d, weights, name):
        masked = [naive.keep_band(x, beta, gamma) for x in d]
        return alpha * naive.weighted_sum(masked, weights)

    return rule


def leafwise(rule):
    return lambda base, experts, weights: naive.by_leaf(base, experts, weights, rule)


def times(factor, rule):
    return lambda d, weights, name: factor * rule(d, weights, name)


# recipe, its twin, and a recipe that is wrong in the likely way
CASES = {
    "task arithmetic": (
        recipes.task_arithmetic(0.3),
        leafwise(times(0.3, naive.weighted_sum)),
        recipes.task_arithmetic(1.0),
    ),
    "forget": (
        recipes.forget(0.5),
        leafwise(times(-0.5, naive.weighted_sum)),
        recipes.task_arithmetic(0.5),
    ),
    "analogy": (
        recipes.analogy(0.9),
        leafwise(
            lambda d, w, name: 0.9 * (w[1] * d[1] + w[2] * d[2] - w[0] * d[0])
        ),
        chain(by_place((1, -1, 1)), scale(0.9)),
    ),
    "ties": (
        recipes.ties(0.3, 0.8),
        lambda base, experts, weights: naive.ties(base, experts, weights, 0.3, 0.8),
        chain(trim(0.3), elect_sign, disjoint_mean, scale(0.8)),  # leaf by leaf
    ),
    "breadcrumbs": (
        recipes.breadcrumbs(0.3, 0.1, 0.6),
        leafwise(crumbs(0.3, 0.1, 0.6)),
        recipes.breadcrumbs(0.3, 0.0, 0.6),  # outliers stay
    ),
    "metagpt": (
        recipes.metagpt(),
        naive.metagpt,
        recipes.task_arithmetic(1 / 3),
    ),
    "lines": (
        recipes.lines(0.2, 0.8, layers=3),
        leafwise(by_depth(0.2, 0.8)),
        recipes.lines(0.2, 0.8, layers=4),
    ),
    "ties with lines": (
        chain(recipes.ties(0.3), recipes.lines(0.2, 0.8, layers=3)),
        lambda base, experts, weights: {
            k: base[k] + (0.2 + 0.4 * int(k[7]) if k[0] == "l" else 0.2) * (x - base[k])
            for k, x in naive.ties(base, experts, weights, 0.3, 1.0).items()
        },
        recipes.ties(0.3),
    ),
    "magmax": (
        recipes.magmax(0.5),
        leafwise(times(0.5, naive.largest)),
        recipes.task_arithmetic(0.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_recipes_are_their_formulas(name):
    recipe, twin, wrong = CASES[name]
    expected = twin(BASE, EXPERTS, WEIGHTS)
    assert apart(merge(recipe, BASE, EXPERTS, WEIGHTS), expected) < 2e-6
    assert apart(merge(wrong, BASE, EXPERTS, WEIGHTS), expected) > 1e-3


def test_expo_goes_on():
    found = merge(recipes.expo(0.3), BASE, EXPERTS[:1])
    expected = {k: EXPERTS[0][k] + 0.3 * (EXPERTS[0][k] - BASE[k]) for k in BASE}
    assert apart(found, expected) < 1e-6


def golden_models():
    names = [key.removeprefix("base/") for key in GOLDEN if key.startswith("base/")]
    return [
        {name: GOLDEN[f"{model}/{name}"] for name in names}
        for model in ("base", "expert0", "expert1", "expert2")
    ]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("task_arithmetic", recipes.task_arithmetic(0.3)),
        ("ties", recipes.ties(0.2, 1.0)),
        ("magmax", recipes.magmax(0.5)),
        ("expo", recipes.expo(0.3)),
    ],
)
def test_golden(name, recipe):
    base, *experts = golden_models()
    if name == "expo":
        experts = experts[:1]
    expected = {k: GOLDEN[f"{name}/{k}"] for k in base}
    assert apart(merge(recipe, base, experts), expected) < 1e-6
    # the control: the golden vectors are no plain sums
    if name in ("ties", "magmax"):
        assert apart(merge(chain(), base, experts), expected) > 1e-3


def test_breadcrumbs_of_small_leaves_keep_something():
    """A leaf of fewer than 1 / gamma entries has no outliers to drop."""
    sizes = (1, 99, 100)
    deltas = [jnp.arange(1.0, size + 1) for size in sizes]

    @jax.jit
    def left(deltas):
        stacks = [Stack(jnp.zeros(d.shape), (d,), (1.0,), jax.random.key(0))
                  for d in deltas]  # fmt: skip
        return [keep_band(0.5, 0.01)(stack).deltas[0] for stack in stacks]

    for size, found in zip(sizes, left(deltas), strict=True):
        assert int((found != 0).sum()) == size - size // 2 - size // 100


def test_della_drops_by_rank_and_keeps_the_mean():
    """Rates by rank, and every kept entry is divided by its own probability."""
    rows, width, density, epsilon = 4000, 5, 0.5, 0.3
    rng = np.random.default_rng(0)
    magnitudes = rng.permuted(
        np.tile(np.arange(1.0, width + 1), (rows, 1)), axis=1
    ) * rng.choice([-1, 1], (rows, width))
    delta = jnp.asarray(magnitudes, jnp.float32)
    stack = Stack(jnp.zeros((rows, width)), (delta,), (1.0,), jax.random.key(0))
    left = np.asarray(drop_by_rank(density, epsilon)(stack).deltas[0], np.float64)
    for rank in range(width):
        p = density - epsilon + 2 * epsilon * rank / (width - 1)
        here = left[abs(magnitudes) == rank + 1]
        rate = (here != 0).mean()
        assert abs(rate - p) < 5 * np.sqrt(p * (1 - p) / rows)
        np.testing.assert_allclose(abs(here[here != 0]), (rank + 1) / p, rtol=1e-5)
    # the control: one rescale for all would make the large ones too large
    uniform = abs(magnitudes * (left != 0) / density).mean()
    assert abs(abs(left).mean() - 3) < 0.1 < abs(uniform - 3)


def test_della_agrees_on_signs_after_the_drop():
    # of one entry, so that the probability to stay is the density: here 1
    base = {"a": np.zeros((2, 1), np.float32)}
    experts = [{"a": np.array([[2.0], [1.0]], np.float32)},
               {"a": np.array([[4.0], [-3.0]], np.float32)}]  # fmt: skip
    found = merge(recipes.della(1.0, 0.0, 0.5), base, experts)
    np.testing.assert_allclose(found["a"], [[1.5], [-1.5]], rtol=1e-6)


def test_dare_divides_by_the_probability_to_stay():
    base = {"a": np.zeros(2000, np.float32)}
    expert = {"a": np.arange(1, 2001, dtype=np.float32)}
    found = np.asarray(merge(recipes.dare(0.75), base, [expert])["a"])
    kept_ = found != 0
    np.testing.assert_allclose(found[kept_], 4 * expert["a"][kept_], rtol=1e-6)
    # the control: a rescale to the L1 norm from before is another number
    ratio = expert["a"].sum() / expert["a"][kept_].sum()
    assert abs(ratio - 4) > 1e-2


def test_a_consensus_keeps_what_several_have():
    base = {"a": np.zeros(3, np.float32)}
    experts = [{"a": np.array(row, np.float32)}
               for row in ([1, 0, 2], [3, 4, 0], [5, 0, 0])]  # fmt: skip
    for count, expected in ((1, [9, 4, 2]), (2, [9, 0, 0]), (3, [9, 0, 0])):
        assert merge(shared_by(count), base, experts)["a"].tolist() == expected


def test_schedules_know_layers_by_either_name():
    checkpoint = "model.layers.1.self_attn.q_proj.weight"
    assert count_layers([checkpoint, "model.norm.weight"]) == 2
    ramp = linear_by_layer(1.0, 2.0, layers=3, outside=7.0)
    assert ramp(checkpoint) == ramp("layers_1/attention/q/kernel") == 2.0
    assert ramp("model.embed_tokens.weight") == 7.0
    table = by_name({"layers_0": 0.5, "w": 2.0}, default=1.0)
    part = scheduled(lambda given: scale(given["by"]), knobs(by=table))
    found = merge(part, BASE, EXPERTS[:1])
    for name in BASE:
        factor = 0.5 if "layers_0" in name else 2.0 if "w" in name else 1.0
        expected = BASE[name] + factor * (EXPERTS[0][name] - BASE[name])
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_signs_may_be_elected_without_weights():
    base = {"a": np.zeros(1, np.float32)}
    experts = [{"a": np.array([x], np.float32)} for x in (2.0, -1.0)]
    weighted = chain(elect_sign, disjoint_mean)
    assert merge(weighted, base, experts, [1, 9])["a"].tolist() == [-1.0]
    plain = chain(unweighted(elect_sign), disjoint_mean)
    assert merge(plain, base, experts, [1, 9])["a"].tolist() == [2.0]


def test_densities_count_the_same_traced_or_not():
    x = jnp.asarray(np.random.default_rng(1).standard_normal(50), jnp.float32)
    stack = Stack(jnp.zeros(50), (x,), (1.0,), jax.random.key(0))
    plain = jax.jit(lambda: keep_band(0.25, 0.1)(stack).deltas[0])()
    traced = jax.jit(lambda b, g: keep_band(b, g)(stack).deltas[0])(0.25, 0.1)
    np.testing.assert_array_equal(plain, traced)
    assert kept(0.25, 50) == 12


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: recipes.breadcrumbs(0.9, 0.1), "sum to less than 1"),
        (lambda: recipes.breadcrumbs(-0.1, 0.1), "sum to less than 1"),
        (lambda: recipes.della(0.1, 0.1), "density - epsilon > 0"),
        (lambda: recipes.della(0.95, 0.1), "density - epsilon > 0"),
        (lambda: recipes.lines(0, 1, 0), "layers = 0 was given"),
        (lambda: merge(recipes.lines(0, 1, 2), BASE, EXPERTS), "layer 2, of 2 layers"),
        (lambda: merge(recipes.analogy(), BASE, EXPERTS[:2]), "2 experts were given"),
        (lambda: count_layers(["a", "b"]), "no layer was found in 2 names"),
        (lambda: by_name({"x": 1})("a"), "is found in a: add one"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@flat
def keep_small(stack):
    """Zeroes something in every delta, as a mask would."""
    small = (jnp.where(abs(delta) < 1, delta, 0) for delta in stack.deltas)
    return stack._replace(deltas=tuple(small))


FLAT = {
    "magmax": recipes.magmax(),
    "metagpt": recipes.metagpt(),
    "varm": averages.varm(),
    "consensus": chain(keep_small, shared_by(2)),
    "expo": chain(recipes.expo(), by_place(lambda count: range(count))),
    "model stock": averages.model_stock(),
    "karcher": averages.karcher_mean(),
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_recipes_run_in_pieces(name, monkeypatch):
    """What streams a leaf through memory gives what the whole leaf gives."""
    monkeypatch.setattr(split, "SIZES", (1 << 10, 1 << 8))
    part = FLAT[name]
    assert part.flat
    rng = np.random.default_rng(0)
    base, *experts = rng.standard_normal((4, 1500)).astype(np.float32)
    leaf = Leaf("a", base, tuple(experts), (0.7, 0.2, 0.4), jax.random.key(0))
    compiled = programs(part)
    whole = merge(part, {"a": base}, [{"a": e} for e in experts], (0.7, 0.2, 0.4))
    facts = ()
    for i, entry in enumerate(part.survey):
        summary = split.run(compiled, i, leaf, facts)
        facts = (*facts, entry.settle(summary, facts, base.size))
    found = split.run(compiled, None, leaf, facts)
    np.testing.assert_allclose(found, whole["a"], atol=1e-6)
