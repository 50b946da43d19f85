"""mergekit's methods without mergekit: its stored results, formulas, laws, controls."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.merge import agree, pieces, rank, sparsify, spherical, split
from collab_jax.merge.memory import merge
from collab_jax.merge.mergekit import METHODS, part
from collab_jax.merge.mergekit_table import TABLE
from collab_jax.merge.program import Leaf, programs
from collab_jax.merge.stack import Stack, chain, lift
from collab_jax.merge.weigh import scale

GOLDEN = pathlib.Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_mergekit import CASES, DRAWN, SHAPES, draw  # noqa: E402

KEY = jax.random.key(3)
FAMILY = [name for name in METHODS if "density" in TABLE[name].per_source]


def ours(name, count, knobs, base, models, weights=None, key=KEY):
    knobs = dict(knobs)
    weights = knobs.pop("weight", weights)
    start = {"a": base} if METHODS[name].base == "delta" and base is not None else None
    trees = [{"a": model} for model in models]
    found = merge(part(name, count, knobs), start, trees, weights, key)["a"]
    return np.asarray(found, np.float64)


def gap(found, expected, base, models):
    size = np.max(np.abs([base, *models]), 0) + np.abs(expected)
    return (np.abs(found - expected) / size).max()


@pytest.mark.parametrize("name", METHODS)
def test_as_mergekit_has_it(name):
    count, knobs = CASES[name]
    with np.load(GOLDEN / "mergekit.npz") as stored:
        for shape in SHAPES:
            base, models = draw(shape, count)
            given = base if TABLE[name].base == "required" else None
            found = ours(name, count, knobs, given, models)
            expected = stored[f"{name} {'x'.join(map(str, shape))}"]
            assert gap(found, expected, base, models) <= 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_in_pieces(name, monkeypatch):
    """What streams in pieces is what is merged whole, the masks bit by bit."""
    monkeypatch.setattr(split, "SIZES", (1 << 8, 1 << 6))
    count, knobs = CASES[name]
    knobs = dict(knobs)
    weights = knobs.pop("weight", (1.0,) * count)
    if name in DRAWN:
        knobs["density"] = 0.6
    made = METHODS[name].make(
        METHODS[name].prepare(filled(name, count, knobs), (50, 60))
    )
    # what looks at rows needs the leaf
    rows = name == "arcee_fusion"
    assert lift(made).flat != rows
    if rows:
        return
    transform = part(name, count, knobs)._replace(flat=True)
    base, models = draw((50, 60), count)
    base = base if METHODS[name].base == "delta" else None
    leaf = Leaf("a", base, tuple(models), tuple(weights), KEY)
    run = programs(transform)
    whole = np.asarray(run.merge(leaf, transform.survey))
    cut = split.run(run, None, leaf, transform.survey)
    np.testing.assert_allclose(cut, whole, rtol=2e-6, atol=2e-6)


def test_many_pieces_of_float64(monkeypatch):
    """Threads that work ahead keep its precision, and the place of every piece."""
    base, *models = np.float64(np.random.default_rng(0).integers(-9, 9, (3, 50, 60)))
    base += 1e-12  # lost in float32; and most entries are tied
    with jax.enable_x64(True):
        leaf = Leaf("a", base, tuple(models), (0.6, 0.3), KEY)
        run = programs(part("ties", 2, {"density": 0.4})._replace(flat=True))
        survey = part("ties", 2, {"density": 0.4}).survey
        whole = np.asarray(run.merge(leaf, survey))
        cut = split.run(run, None, leaf, survey, sizes=(64,))
        assert cut.dtype == np.float64
        np.testing.assert_array_equal(cut, whole)
        # the control: pieces that do not know where they lie keep other entries
        monkeypatch.setattr(split, "Place", lambda start: pieces.Place(np.uint32(0)))
        assert (split.run(run, None, leaf, survey, sizes=(64,)) != whole).any()


def filled(name, count, knobs):
    """All knobs, numbers of the experts as tuples."""
    found = {}
    for knob, parameter in (TABLE[name].per_source | TABLE[name].shared).items():
        value = knobs.get(knob, 1.0 if knob == "weight" else parameter.default)
        if knob in TABLE[name].per_source and not isinstance(value, list | tuple):
            value = (value,) * count
        found[knob] = value
    return found


@pytest.mark.parametrize("name", FAMILY)
def test_density_one_is_the_sum_of_task_vectors(name):
    """With one expert nothing can disagree, and gamma does not count there."""
    base, models = draw((12, 10), 1)
    found = ours(name, 1, {"density": 1.0, "normalize": False}, base, models, [0.7])
    assert gap(found, base + 0.7 * (models[0] - base), base, models) <= 1e-6


@pytest.mark.parametrize("name", DRAWN)
def test_dropped_deltas_keep_their_size(name):
    """The ratio of L1 norms makes up for what is dropped; 1/p only on average."""
    base, (model,) = draw((12, 10), 1)
    found = ours(name, 1, {"density": 0.4, "normalize": False}, base, [model], [1.0])
    moved, whole = np.abs(found - base).sum(), np.abs(model - base).sum()
    assert abs(moved / whole - 1) < 1e-5
    dropped = chain(sparsify.drop_and_rescale(0.6))  # the control: the paper's
    other = np.asarray(merge(dropped, {"a": base}, [{"a": model}], key=KEY)["a"])
    assert abs(np.abs(other - base).sum() / whole - 1) > 1e-3


def test_ties_is_trimmed_leaf_by_leaf():
    base, models = {"a": np.zeros(4), "b": np.zeros(4)}, []
    models = [{"a": np.arange(1.0, 5), "b": np.arange(10.0, 14)}]
    found = merge(part("ties", 1, {"density": 0.5}), base, models)
    assert found["a"].tolist() == [0, 0, 3, 4]
    assert found["b"].tolist() == [0, 0, 12, 13]
    trimmed = chain(sparsify.trim_whole(0.5), agree.elect_sign, agree.disjoint_mean)
    other = merge(trimmed, base, models)  # the control: over the whole model
    assert other["a"].tolist() == [0, 0, 0, 0]


def test_breadcrumbs_of_small_leaves_keep_what_they_should():
    """With no outlier to drop, mergekit 0.1.4 took an empty slice and kept nothing."""
    delta = np.array([4.0, -1.0, 3.0, 2.0])
    knobs = {"density": 0.5, "gamma": 0.01}
    found = ours("breadcrumbs", 1, knobs, np.zeros(4), [delta], [1.0])
    assert found.tolist() == [4, 0, 3, 0]
    order = np.argsort(np.abs(delta))
    wrong = np.zeros(4)
    wrong[order[2 : -int(0.01 * 4)]] = 1
    assert not wrong.any()
    assert ours(
        "breadcrumbs", 1, {"density": 0.5, "gamma": 0.3}, np.zeros(4), [delta], [1.0]
    ).tolist() == [0, 0, 3, 2]


def test_counts_are_exact():
    """int(density * M) in double precision: float32 rounds 0.29 * 100 up."""
    prepared = METHODS["ties"].prepare(filled("ties", 1, {"density": 0.29}), (10, 10))
    assert prepared["keep"] == (28,)
    assert int(np.float32(0.29) * np.float32(100)) == 29  # the control


def test_sce_by_hand():
    base, models = draw((12, 10), 3)
    deltas = np.stack(models).astype(np.float64) - base
    share = np.square(deltas).mean((1, 2))
    for size in (1.0, 1e-4):  # the energy is below 1e-6: weights are equal
        moved = deltas * size
        weights = share / share.sum() if size == 1 else np.full(3, 1 / 3)
        sign = np.where(moved.sum(0) >= 0, 1, -1)
        mask = (np.sign(moved) == sign) * weights[:, None, None]
        expected = base + (moved * mask).sum(0) / mask.sum(0).clip(1e-6)
        near = [np.float32(base + row) for row in moved]
        found = ours("sce", 3, {}, base, near)
        assert gap(found, expected, base, models) <= 1e-6


def test_karcher_is_where_the_pulls_cancel():
    _, models = draw((30,), 4)
    with jax.enable_x64(True):
        found = ours(
            "karcher",
            4,
            {"max_iter": 50, "tol": 1e-12},
            None,
            [model.astype(np.float64) for model in models],
        )
    norms = np.array([np.linalg.norm(model) for model in models])
    units = np.stack(models).astype(np.float64) / norms[:, None]
    assert abs(np.linalg.norm(found) - norms.mean()) < 1e-6
    mean = found / np.linalg.norm(found)
    theta = np.arccos(units @ mean)
    pulls = (theta / np.sin(theta))[:, None] * (units - (units @ mean)[:, None] * mean)
    assert np.abs(pulls.sum(0)).max() < 1e-7
    flat = units.sum(0) / np.linalg.norm(units.sum(0))  # the control: the plain mean
    theta = np.arccos(units @ flat)
    pulls = (theta / np.sin(theta))[:, None] * (units - (units @ flat)[:, None] * flat)
    assert np.abs(pulls.sum(0)).max() > 1e-4


def naive_ranks(x, axis):
    x = np.moveaxis(np.abs(x), axis, -1)
    order = np.argsort(x, -1, kind="stable")
    return np.moveaxis(np.argsort(order, -1, kind="stable"), -1, axis)


@pytest.mark.parametrize(
    ("shape", "axis"), [((7,), 0), ((64, 48), 1), ((3, 3, 8, 8), 1), ((1,), 0)]
)
def test_ranks(shape, axis):
    """By XLA and by NumPy, with ties, and sharded."""
    x = np.round(np.random.default_rng(0).standard_normal(shape), 1)
    expected = naive_ranks(x, axis)
    values = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(
        jax.jit(rank.ranks, static_argnums=1)(values, axis), expected
    )
    rows = np.moveaxis(np.abs(x).astype(np.float32).view(np.uint32), axis, -1)
    found = np.moveaxis(rank._by_numpy(rows), -1, axis)
    np.testing.assert_array_equal(found, expected)
    wide = np.moveaxis(np.abs(x).view(np.uint64), axis, -1)
    found = np.moveaxis(rank._by_numpy(wide), -1, axis)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("width", [5, 300, (1 << 16) + 3])
def test_ranks_of_coarse_numbers_and_of_finer_ones(width):
    """Rows of both kinds in one block: 32 bits hold what leaves a place for 16."""
    x = np.random.default_rng(width).standard_normal((400000 // width, width))
    x[-1, -1] = np.inf
    rows = np.abs(x).astype(np.float32).view(np.uint32)
    coarse = np.arange(len(rows)) * 4 // len(rows)  # a quarter of each kind
    rows[coarse == 0] &= 0xFFF00000
    rows[(coarse == 1) & (np.arange(len(rows)) % 3 > 0)] &= 0xFFFE0000
    rows[coarse == 2] &= 0xFF800000
    np.testing.assert_array_equal(
        rank._by_numpy(rows), naive_ranks(rows.view(np.float32), -1)
    )


def test_band():
    x = jnp.asarray(np.round(np.random.default_rng(0).standard_normal((20, 20)), 1))
    place = naive_ranks(np.asarray(x).reshape(-1), 0).reshape(x.shape)
    run = jax.jit(rank.band)
    for low, high in [(0, 400), (0, 0), (400, 400), (17, 230), (0, 399)]:
        expected = (place >= low) & (place < high)
        np.testing.assert_array_equal(run(x, low, high), expected)


def test_gradients_reach_the_weights():
    base, models = draw((12, 10), 3)

    @jax.jit
    def loss(weights):
        knobs = {"density": 0.5, "normalize": True}
        run = part("ties", 3, knobs)
        trees = [{"a": model} for model in models]
        return jnp.square(merge(run, {"a": base}, trees, list(weights))["a"]).sum()

    weights = jnp.array([0.7, 0.2, 0.4])
    slope = jax.grad(loss)(weights)
    step = 1e-2 * jnp.eye(3)
    for n in range(3):
        about = (loss(weights + step[n]) - loss(weights - step[n])) / 2e-2
        assert abs(about - slope[n]) < 2e-2 * (1 + abs(slope[n]))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="is no method"):
        part("tise", 1)
    with pytest.raises(ValueError, match="has no knob 'densty'"):
        part("ties", 1, {"densty": 1})
    with pytest.raises(ValueError, match="needs 't'"):
        part("slerp", 2)
    with pytest.raises(ValueError, match="inside \\(0, 1\\)"):
        METHODS["della"].prepare(filled("della", 1, {"density": 0.1}), (4,))
    with pytest.raises(ValueError, match="sum to 0"):
        METHODS["linear"].prepare({"weight": (1.0, -1.0), "normalize": True}, (4,))


def test_what_mergekit_cannot():
    """A row of one entry has the density as its chance; what cancels is averaged."""
    ones = jnp.ones((4000, 1))
    kept = rank.rising([ones], [0.2], [0.6], 1)[0]
    np.testing.assert_allclose(np.asarray(kept), 0.4, rtol=1e-6)
    rows = [
        np.array([1.0, 0.0]),
        np.array([-0.5, 3**0.5 / 2]),
        np.array([-0.5, -(3**0.5) / 2]),
    ]
    found = ours("multislerp", 3, {"eps": 1e-3}, None, rows, [1.0, 1.0, 1.0])
    assert np.abs(found).max() < 1e-6


def test_weights_of_one_stack():
    stack = Stack(jnp.zeros(2), (jnp.ones(2),), (jnp.float32(0.5),), KEY)
    assert scale(2.0)(stack).weights[0] == 1
    assert float(spherical.norm(jnp.zeros(3))) == 0
    assert float(jax.grad(spherical.norm)(jnp.zeros(1))[0]) == 0
