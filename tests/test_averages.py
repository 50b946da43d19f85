"""Averages of models against NumPy and golden vectors; checkpoints by their laws."""

from pathlib import Path

import jax
import jax.numpy as jnp
import naive_merge as naive
import numpy as np
import pytest

from collab_jax.merge import averages
from collab_jax.merge.greedy import diwa_restricted, greedy_soup
from collab_jax.merge.memory import merge
from collab_jax.merge.stack import chain
from collab_jax.merge.trajectory import adjacent, ema, lawa, trajectory, wsm
from collab_jax.merge.weigh import by_square, mean, mean_cosine, scale

GOLDEN = np.load(Path(__file__).parent / "golden" / "recipes.npz")
WEIGHTS = (0.7, 0.2, 0.4)
BASE, MODELS = naive.models(3)


def apart(found, expected):
    """The largest gap of any leaf."""
    assert found.keys() == expected.keys()
    return max(abs(np.asarray(found[k], np.float64) - expected[k]).max() for k in found)


def average(d, weights, name=None):
    return naive.weighted_sum(d, weights) / sum(weights)


def pulled(mean_of):
    return lambda d, weights, name: naive.model_stock(d, weights, mean_of)


# recipe, whether it needs the base, its twin by leaf, and a recipe that is wrong
CASES = {
    "soup": (averages.soup(), False, average, chain()),
    "diwa": (averages.diwa(), False, average, chain()),
    "disperse-then-merge": (averages.disperse_then_merge(), False, average, chain()),
    "varm": (averages.varm(), True, naive.varm, averages.soup()),
    "sce": (
        averages.sce(0.5),
        True,
        lambda d, weights, name: naive.sce(d, weights, 0.5),
        averages.sce(1.0),
    ),
    "model stock": (
        averages.model_stock(),
        True,
        pulled("angle"),
        averages.model_stock(mean_cosine),
    ),
    "model stock, mean cosine": (
        averages.model_stock(mean_cosine),
        True,
        pulled("cosine"),
        averages.model_stock(),
    ),
    "karcher": (averages.karcher_mean(), False, naive.karcher, averages.soup()),
}


@pytest.mark.parametrize("name", CASES)
def test_recipes_are_their_formulas(name):
    recipe, with_base, twin, wrong = CASES[name]
    # signs of SCE are elected without weights: the twin knows equal ones alone
    weights = (1.0, 1.0, 1.0) if name == "sce" else WEIGHTS
    start = BASE if with_base else None
    expected = naive.by_leaf(start, MODELS, weights, twin)
    assert apart(merge(recipe, start, MODELS, weights), expected) < 4e-6
    assert apart(merge(wrong, start, MODELS, weights), expected) > 1e-3


def test_golden_model_stock():
    names = [key.removeprefix("base/") for key in GOLDEN if key.startswith("base/")]
    base, *models = (
        {name: GOLDEN[f"{model}/{name}"] for name in names}
        for model in ("base", "expert0", "expert1", "expert2")
    )
    expected = {k: GOLDEN[f"model_stock/{k}"] for k in names}
    assert apart(merge(averages.model_stock(), base, models), expected) < 1e-6
    expected = {k: GOLDEN[f"model_stock_of_two/{k}"] for k in names}
    for cosine in (mean_cosine, averages.cosine_of_mean_angle):  # equal for two
        found = merge(averages.model_stock(cosine), base, models[:2])
        assert apart(found, expected) < 1e-6


def test_two_models_by_place():
    pair = MODELS[:2]
    found = merge(adjacent(0.9), None, pair)
    assert apart(found, {k: 0.1 * pair[0][k] + 0.9 * pair[1][k] for k in BASE}) < 1e-6
    found = merge(averages.prometheus(0.75), None, pair)
    assert apart(found, {k: 0.75 * pair[0][k] + 0.25 * pair[1][k] for k in BASE}) < 1e-6
    with pytest.raises(ValueError, match="3 experts were given, this merge takes 2"):
        merge(averages.prometheus(), None, MODELS)


def test_leaves_that_did_not_move_stay():
    """Frozen leaves have no squares, no angles, and no votes; they are no NaN."""
    frozen = [{**model, "embed": BASE["embed"]} for model in MODELS]
    for recipe in (averages.varm(), averages.sce(0.5), averages.model_stock()):
        found = merge(recipe, BASE, frozen)
        np.testing.assert_array_equal(found["embed"], BASE["embed"])
        assert all(np.isfinite(leaf).all() for leaf in found.values())
    # the control: squares alone, without the guard, are 0 / 0
    blind = chain(lambda s: by_square(s)._replace(
        weights=tuple(jnp.square(d).mean() for d in s.deltas)), mean)  # fmt: skip
    assert np.isnan(merge(blind, BASE, frozen)["embed"]).all()
    zero = [{k: np.zeros_like(v) for k, v in model.items()} for model in MODELS]
    found = merge(averages.karcher_mean(), None, zero)
    assert all((np.asarray(leaf) == 0).all() for leaf in found.values())


def scores_by(target):
    """Higher is nearer."""
    return lambda params: (
        -float(abs(np.asarray(params["a"], np.float64) - target).sum())
    )


def naive_greedy(models, evaluate):
    scores = [evaluate(model) for model in models]
    order = sorted(range(len(models)), key=lambda n: -scores[n])
    inside, best = [order[0]], scores[order[0]]
    for n in order[1:]:
        rows = [models[i]["a"].astype(np.float64) for i in [*inside, n]]
        score = evaluate({"a": np.mean(rows, 0)})
        if score >= best:
            inside, best = [*inside, n], score
    return inside, order


@pytest.mark.parametrize("seed", range(3))
def test_greedy_soup_keeps_what_does_not_hurt(seed):
    rng = np.random.default_rng(seed)
    models = [{"a": rng.standard_normal(4).astype(np.float32)} for _ in range(6)]
    evaluate, calls = scores_by(np.zeros(4)), []
    params, record = greedy_soup(
        models, evaluate, progress=lambda *call: calls.append(call)
    )
    inside, order = naive_greedy(models, evaluate)
    assert list(record.order) == order
    assert [n for n, kept in zip(order, record.kept, strict=True) if kept] == inside
    np.testing.assert_allclose(
        params["a"], np.mean([models[n]["a"] for n in inside], 0), atol=1e-6
    )
    assert 1 < len(inside) < 6  # else this would show little
    # what is given back is what was evaluated, bit by bit
    best = max(s for s, kept in zip(record.trials, record.kept, strict=True) if kept)
    assert evaluate(params) == best
    assert best >= max(record.scores)
    assert [call[:2] for call in calls] == [(i + 1, 11) for i in range(11)]
    # the control: stopping at the first that hurts would miss some
    assert record.kept != tuple(sorted(record.kept, reverse=True)) or seed != 0
    # loaded one at a time, with known scores, it is the same soup
    loaded = []

    def source(n):
        return lambda: loaded.append(n) or models[n]

    again, lazy = diwa_restricted(
        [source(n) for n in range(6)], evaluate, scores=record.scores
    )
    np.testing.assert_array_equal(again["a"], params["a"])
    assert lazy == record
    assert loaded == order


def test_greedy_soup_sums_in_float32_and_keeps_types():
    third = jnp.asarray([1.0, 1.0078125, 1.0], jnp.bfloat16)  # one unit of bfloat16
    models = [{"a": x[None], "n": jnp.array(3)} for x in third]
    params, record = greedy_soup(models, lambda p: 1.0)
    assert record.order == (0, 1, 2)  # of equals the first comes first
    assert all(record.kept)
    assert params["a"].dtype == jnp.bfloat16
    assert params["n"] == 3
    mean = np.mean(np.float64(third))
    assert abs(float(params["a"][0]) - mean) <= 2**-8  # half a unit
    alone, _ = greedy_soup(models[1:2], lambda p: 1.0)
    assert alone["a"] == third[1]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "no model was given"),
        ([{"a": jnp.zeros(1)}, {"a": jnp.zeros(2)}], {},
         r"model 1 has \(2,\) at a, the first that was read has \(1,\)"),
        ([{"a": jnp.zeros(1)}], {"scores": [1.0, 2.0]}, "2 scores for 1 models"),
        ([{"a": jnp.full(1, jnp.nan)}], {}, "score of model 0 is NaN"),
    ],
)  # fmt: skip
def test_greedy_soup_refuses(models, options, message):
    with pytest.raises(ValueError, match=message):
        greedy_soup(models, lambda p: float(p["a"].sum()), **options)


def test_ema_is_its_recursion():
    run = [{"a": np.float32(x)} for x in np.random.default_rng(0).standard_normal(7)]
    for decay in (0.0, 0.6, 1.0):
        moving = np.float64(run[0]["a"])
        for model in run[1:]:
            moving = decay * moving + (1 - decay) * model["a"]
        assert abs(sum(ema(decay)(7)) - 1) < 1e-12
        found = merge(averages.soup(), None, run, ema(decay)(7))["a"]
        np.testing.assert_allclose(found, moving, atol=1e-6)
    found = merge(trajectory(ema(0.6)), None, run)["a"]
    np.testing.assert_allclose(found, np.dot(ema(0.6)(7), [m["a"] for m in run]),
                               atol=1e-6)  # fmt: skip


def test_lawa_is_the_mean_of_the_last():
    assert lawa(3)(5) == (0, 0, 1 / 3, 1 / 3, 1 / 3)
    assert lawa(3)(2) == (0.5, 0.5)


@pytest.mark.parametrize(
    "curve", [lambda x: 1 - x, lambda x: 1 - np.sqrt(x), lambda x: 0.5 + np.cos(x) / 2]
)
def test_wsm_replays_a_decay_of_the_learning_rate(curve):
    """The merge of checkpoints is the run whose updates were scaled by the curve."""
    rng, count = np.random.default_rng(0), 6
    updates = rng.standard_normal((count - 1, 3))
    run = [np.zeros(3)]
    for update in updates:
        run.append(run[-1] + update)
    decayed = sum(curve(n / count) * update for n, update in enumerate(updates, 1))
    weights = wsm(curve)(count)
    assert abs(sum(weights) - 1) < 1e-12
    np.testing.assert_allclose(np.dot(weights, run), decayed, atol=1e-12)
    shifted = sum(curve(n / count) * update for n, update in enumerate(updates))
    assert abs(shifted - decayed).max() > 1e-2  # the control: off by one checkpoint


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ema(1.1), "decay = 1.1"),
        (lambda: lawa(0), "k = 0"),
        (lambda: wsm(lambda x: 0.5)(3), "start at 1 and never rise"),
        (lambda: wsm(lambda x: 1 + x)(3), "start at 1 and never rise"),
        (lambda: averages.sce(0.0), "share = 0.0"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_karcher_of_equal_directions_keeps_the_mean_length():
    models = [{"a": jnp.array([3.0, 4.0]) * x} for x in (1.0, 2.0)]
    found = merge(averages.karcher_mean(), None, models, [1.0, 3.0])
    np.testing.assert_allclose(found["a"], [5.25, 7.0], rtol=1e-6)
    scaled = merge(chain(averages.karcher_mean(), scale(2)), None, models, [1.0, 3.0])
    np.testing.assert_allclose(scaled["a"], [10.5, 14.0], rtol=1e-6)


def test_recipes_are_traceable():
    jitted = jax.jit(lambda w: merge(averages.varm(), BASE, MODELS, list(w)))
    found = jitted(jnp.array(WEIGHTS))
    assert apart(found, naive.by_leaf(BASE, MODELS, WEIGHTS, naive.varm)) < 4e-6
