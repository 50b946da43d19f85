"""Merging against formulas in NumPy, and the laws of its algebra."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from collab_jax import mesh
from collab_jax.merge import averages, recipes
from collab_jax.merge.agree import disjoint_mean, elect_sign
from collab_jax.merge.memory import merge
from collab_jax.merge.sparsify import drop_and_rescale, trim, trim_whole
from collab_jax.merge.stack import chain, where
from collab_jax.merge.weigh import mean, scale

SHAPES = {"a": (), "b": (1,), "c": (7,), "d/e": (16, 12), "d/f": (3, 3, 2, 2)}
WEIGHTS = (0.7, 0.2, 0.4)


def trees(count, seed=0, dtype=np.float32):
    """A base and some experts near it; some entries are zero, and some are tied."""
    rng = np.random.default_rng(seed)

    def draw(size):
        flat = {
            name: np.round(rng.standard_normal(shape), 2) * size
            for name, shape in SHAPES.items()
        }
        nested = {name: flat[name] for name in "abc"}
        nested["d"] = {"e": flat["d/e"], "f": flat["d/f"]}
        return nested

    base = draw(1.0)
    experts = [
        jax.tree.map(lambda b, d: b + d, base, draw(0.1 * (n + 1)))
        for n in range(count)
    ]
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    return cast(base), [cast(expert) for expert in experts]


def vector(tree):
    """All leaves in one array, float64."""
    leaves = [
        np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)
    ]
    return np.concatenate(leaves)


def deltas(base, experts):
    """Differences as the working precision has them, `[N, M]`."""
    rows = [jax.tree.map(lambda e, b: e - b, expert, base) for expert in experts]
    return np.stack([vector(row) for row in rows])


def naive_trim(delta, density):
    kept = max(1, int(density * len(delta)))
    least = np.sort(np.abs(delta))[::-1][kept - 1]
    return np.where(np.abs(delta) >= least, delta, 0)


def naive_ties(delta, weights, density, lam):
    delta = np.stack([naive_trim(row, density) for row in delta])
    moved = np.asarray(weights)[:, None] * delta
    result = np.zeros(delta.shape[1])
    for i in range(delta.shape[1]):
        sign = 1 if moved[:, i].sum() >= 0 else -1
        agree = [n for n in range(len(delta)) if moved[n, i] * sign > 0]
        if agree:
            total = sum(weights[n] for n in agree)
            result[i] = lam * sum(moved[n, i] for n in agree) / total
    return result


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.67, 1.0])
def test_ties(count, density):
    base, experts = trees(count)
    weights = WEIGHTS[:count]
    found = merge(recipes.ties(density, 0.8), base, experts, weights)
    delta = deltas(base, experts)
    expected = vector(base) + naive_ties(delta, weights, density, 0.8)
    np.testing.assert_allclose(vector(found), expected, atol=2e-6)
    if 0.01 < density < 1:  # the control: trimmed leaf by leaf it is another merge
        parts = trim(density), elect_sign, disjoint_mean, scale(0.8)
        local = merge(chain(*parts), base, experts, weights)
        assert abs(vector(local) - expected).max() > 1e-3


@pytest.mark.parametrize("density", [0.01, 0.3, 0.999, 1.0])
def test_the_threshold_of_the_whole_model_is_exact(density):
    base, experts = trees(3, seed=1)
    zero = jax.tree.map(jnp.zeros_like, base)
    for expert in experts:
        found = vector(merge(trim_whole(density), zero, [expert]))
        np.testing.assert_array_equal(found, naive_trim(vector(expert), density))


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_trim_leaf_by_leaf(density):
    base, experts = trees(1, seed=2)
    zero = jax.tree.map(jnp.zeros_like, base)
    found = merge(trim(density), zero, experts)
    for leaf, before in zip(
        jax.tree.leaves(found), jax.tree.leaves(experts[0]), strict=True
    ):
        expected = naive_trim(np.asarray(before).reshape(-1), density)
        np.testing.assert_array_equal(np.asarray(leaf).reshape(-1), expected)


def test_soup_and_task_arithmetic():
    base, experts = trees(3)
    rows = np.stack([vector(expert) for expert in experts])
    found = vector(merge(averages.soup(), None, experts, WEIGHTS))
    np.testing.assert_allclose(found, np.average(rows, 0, WEIGHTS), atol=1e-6)
    found = vector(merge(recipes.task_arithmetic(0.3), base, experts, WEIGHTS))
    expected = vector(base) + 0.3 * np.asarray(WEIGHTS) @ deltas(base, experts)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dare_keeps_the_mean_and_draws_by_name():
    base = {"a": jnp.zeros(40_000), "b": jnp.zeros(40_000)}
    expert = jax.tree.map(jnp.ones_like, base)
    found = merge(recipes.dare(0.9), base, [expert], key=jax.random.key(3))
    assert set(np.unique(found["a"])) == {np.float32(0), np.float32(1 / (1 - 0.9))}
    # 5 standard deviations of a mean of 40,000 draws of 10 with probability 0.1
    assert abs(float(found["a"].mean()) - 1) < 5 * 3 / 200
    assert not bool((found["a"] == found["b"]).all())
    alone = merge(recipes.dare(0.9), {"b": base["b"]}, [{"b": expert["b"]}],
                  key=jax.random.key(3))  # fmt: skip
    assert bool((alone["b"] == found["b"]).all())
    other = merge(recipes.dare(0.9), base, [expert], key=jax.random.key(4))
    assert not bool((other["a"] == found["a"]).all())


MERGES = {
    "soup": averages.soup(),
    "task arithmetic": recipes.task_arithmetic(0.3),
    "ties": recipes.ties(0.3),
    "dare": recipes.dare(0.5),
    "dare-ties": recipes.dare_ties(0.5, 0.4),
    "two surveys": chain(trim_whole(0.8), scale(0.5), trim_whole(0.5)),
}


@pytest.mark.parametrize("name", MERGES)
def test_jit_and_sharding_change_nothing(name):
    base, experts = trees(3)
    key = jax.random.key(1)
    plain = merge(MERGES[name], base, experts, WEIGHTS, key)
    jitted = jax.jit(lambda b, e, w: merge(MERGES[name], b, e, w, key))
    devices = mesh.make_mesh(model=8)

    def place(leaf):
        rows = leaf.ndim == 2 and leaf.shape[0] % 8 == 0
        spec = PartitionSpec("model") if rows else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(devices, spec))

    sharded = jitted(*jax.tree.map(place, (base, experts)), WEIGHTS)
    assert len(sharded["d"]["e"].sharding.device_set) == 8
    for other in (jitted(base, experts, WEIGHTS), sharded):
        # masks are equal bit by bit; products and sums may be fused
        np.testing.assert_array_equal(
            vector(other) == vector(base), vector(plain) == vector(base)
        )
        np.testing.assert_allclose(vector(other), vector(plain), atol=5e-7)


@pytest.mark.parametrize("name", ["soup", "task arithmetic", "ties"])
def test_the_order_of_the_experts_does_not_matter(name):
    base, experts = trees(3)
    expected = vector(merge(MERGES[name], base, experts, WEIGHTS))
    for order in itertools.permutations(range(3)):
        again = merge(
            MERGES[name],
            base,
            [experts[n] for n in order],
            [WEIGHTS[n] for n in order],
        )
        np.testing.assert_allclose(vector(again), expected, atol=1e-6)


def test_identities():
    base, (expert, other, _) = trees(3)
    one = merge(recipes.ties(1.0), base, [expert])
    np.testing.assert_allclose(vector(one), vector(expert), atol=1e-6)
    same = merge(recipes.ties(1.0), base, [expert, expert, expert], WEIGHTS)
    np.testing.assert_allclose(vector(same), vector(expert), atol=1e-6)
    whole = merge(chain(trim_whole(1.0)), base, [expert, other], [0.5, 0.5])
    plain = merge(chain(), base, [expert, other], [0.5, 0.5])
    np.testing.assert_array_equal(vector(whole), vector(plain))
    kept = merge(drop_and_rescale(0.0), base, [expert])
    np.testing.assert_array_equal(vector(kept), vector(merge(chain(), base, [expert])))
    inside = chain(chain(trim_whole(0.5), elect_sign), chain(disjoint_mean, scale(1.0)))
    np.testing.assert_array_equal(
        vector(merge(inside, base, [expert, other])),
        vector(merge(recipes.ties(0.5), base, [expert, other])),
    )


def test_parts_for_some_leaves():
    base, experts = trees(2)
    found = merge(where("d/.*", trim_whole(0.5)), base, experts)
    plain = merge(chain(), base, experts)
    for name in "abc":
        assert (found[name] == plain[name]).all()
    inner = merge(trim_whole(0.5), base["d"], [expert["d"] for expert in experts])
    np.testing.assert_array_equal(vector(found["d"]), vector(inner))


def test_gradients_with_masks_held_fixed():
    base, experts = trees(3)
    target = jnp.asarray(np.random.default_rng(5).standard_normal(5), jnp.float32)

    def loss(knobs):
        merged = merge(recipes.ties(0.4, knobs[0]), base, experts, list(knobs[1:]))
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(merged)])
        return jnp.sum(flat[:5] * target + 0.1 * flat[:5] ** 2)

    knobs = jnp.array([0.8, *WEIGHTS])
    gradient = jax.grad(loss)(knobs)
    step = 1e-2
    for i in range(len(knobs)):
        slope = (loss(knobs.at[i].add(step)) - loss(knobs.at[i].add(-step))) / step / 2
        np.testing.assert_allclose(gradient[i], slope, rtol=2e-2, atol=2e-4)


def test_types_are_the_base_s():
    base, experts = trees(2, dtype=jnp.bfloat16)
    counter = {"step": jnp.array(3)}
    found = merge(averages.soup(), base | counter, [e | counter for e in experts])
    assert found["c"].dtype == jnp.bfloat16
    assert found["step"].dtype == counter["step"].dtype
    exact = merge(
        averages.soup(), None, [jax.tree.map(jnp.float32, e) for e in experts]
    )
    expected = vector(jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))
    gap = abs(vector({k: v for k, v in found.items() if k != "step"}) - expected)
    # base + mean of differences rounds once more than the mean itself
    assert (gap <= 2**-7 * np.maximum(abs(expected), 2**-6)).all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda b, e: merge(chain(), b, []), "no expert was given"),
        (lambda b, e: merge(chain(), b, e, [1.0]), r"1 weights for 2 experts"),
        (
            lambda b, e: merge(chain(), b, [e[0], {**e[1], "c": jnp.zeros(8)}]),
            r"expert 1 has \(8,\) at c, the base has \(7,\)",
        ),
        (
            lambda b, e: merge(chain(), b, [{**e[0], "g": jnp.zeros(1)}]),
            "at g, the base has nothing",
        ),
        (lambda b, e: trim(0.0), r"density = 0.0 was given, a number in \(0, 1\]"),
        (lambda b, e: drop_and_rescale(1.0), r"p = 1.0 was given"),
        (
            lambda b, e: merge(mean, b | {"n": jnp.array(1)}, [
                e[0] | {"n": jnp.array(1)}, e[1] | {"n": jnp.array(2)}]),
            "n holds integers",
        ),
    ],
)  # fmt: skip
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act(*trees(2))


@pytest.mark.parametrize("name", ["soup", "task arithmetic", "ties", "dare"])
def test_sharded_leaves_are_not_gathered(name):
    """Devices exchange sums and histograms; leaves stay where they are."""
    rows = NamedSharding(mesh.make_mesh(model=8), PartitionSpec("model"))
    base, *experts = (
        {"a": jax.device_put(jax.random.normal(jax.random.key(n), (64, 128)), rows)}
        for n in range(3)
    )
    run = jax.jit(lambda base, experts: merge(MERGES[name], base, experts))
    text = run.lower(base, experts).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert ("all-reduce" in text) == (name == "ties")
    assert run(base, experts)["a"].sharding.is_equivalent_to(rows, 2)
    # the control: an order of the whole leaf gathers it
    ranked = jax.jit(lambda x: jax.numpy.sort(x.reshape(-1)))
    assert "all-gather" in ranked.lower(base["a"]).compile().as_text()
