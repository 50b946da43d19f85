"""Laws that merges obey, over all recipes: a new recipe is one more line of RECIPES.

Recipes are made once, so that every example runs the same programs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collab_jax.merge import averages, compete, recipes
from collab_jax.merge.memory import merge
from collab_jax.merge.sparsify import (
    drop_and_rescale,
    drop_by_rank,
    keep_band,
    select_varying,
    trim,
    trim_whole,
)
from collab_jax.merge.stack import chain
from collab_jax.merge.trajectory import adjacent, ema, lawa, trajectory, wsm
from collab_jax.merge.weigh import mean_cosine

COUNT = 3
SHAPES = {"layers_0": (3, 5), "layers_1": (3, 5)}

# what each recipe obeys; every one is scaled with its models, and shifted with its base
SWAP = "experts may be permuted with their weights"
RATIO = "weights count by their ratios alone"
ALONE = "a single expert comes out as it was"
RECIPES = {
    "soup": (averages.soup(), {SWAP, RATIO, ALONE}),
    "diwa": (averages.diwa(), {SWAP, RATIO, ALONE}),
    "disperse-then-merge": (averages.disperse_then_merge(), {SWAP, RATIO, ALONE}),
    "varm": (averages.varm(), {SWAP, RATIO, ALONE}),
    "sce": (averages.sce(0.5), {SWAP, RATIO}),
    "sce of all": (averages.sce(1.0), {SWAP, RATIO, ALONE}),
    "model stock": (averages.model_stock(), {SWAP, RATIO, ALONE}),
    "model stock, cosines": (averages.model_stock(mean_cosine), {SWAP, RATIO, ALONE}),
    "karcher": (averages.karcher_mean(), {SWAP, RATIO, ALONE}),
    "ema": (trajectory(ema(0.7)), {RATIO, ALONE}),
    "lawa": (trajectory(lawa(2)), {RATIO, ALONE}),
    "wsm": (trajectory(wsm(lambda x: 1 - x**0.5)), {RATIO, ALONE}),
    "task arithmetic": (recipes.task_arithmetic(1.0), {SWAP, ALONE}),
    "forget": (recipes.forget(0.4), {SWAP}),
    "analogy": (recipes.analogy(0.8), set()),
    "ties": (recipes.ties(0.4, 0.7), {SWAP, RATIO}),
    "ties of all": (recipes.ties(1.0), {SWAP, RATIO, ALONE}),
    "dare": (recipes.dare(0.5), set()),
    "dare that drops nothing": (recipes.dare(0.0), {SWAP, ALONE}),
    "dare-ties": (recipes.dare_ties(0.5, 0.5), {RATIO}),
    "breadcrumbs": (recipes.breadcrumbs(0.4, 0.1), {SWAP}),
    "della": (recipes.della(0.6, 0.2), {RATIO}),
    "della that drops nothing": (recipes.della(1.0, 0.0), {SWAP, RATIO, ALONE}),
    "metagpt": (recipes.metagpt(), {SWAP, RATIO, ALONE}),
    "lines": (recipes.lines(0.2, 0.7, layers=2), {SWAP}),
    "magmax": (recipes.magmax(1.0), {SWAP, ALONE}),
    "expo": (recipes.expo(0.3), {SWAP}),
    "pcb": (compete.pcb(0.5, 1.1), {SWAP}),
    "pcb of all": (compete.pcb(1.0), {SWAP, ALONE}),
}
WITHOUT_BASE = {"soup", "diwa", "disperse-then-merge", "karcher", "ema", "lawa", "wsm"}
NOT_SHIFTED = {"karcher"}  # directions are those from the origin
PAIRS = {"adjacent": adjacent(0.7), "prometheus": averages.prometheus(0.3)}
# with nothing to drop these are the plain sum
WHOLE = {
    "trim": trim(1.0),
    "trim over the model": trim_whole(1.0),
    "band": keep_band(0.0, 0.0),
    "drop": drop_and_rescale(0.0),
    "drop by rank": drop_by_rank(1.0, 0.0),
    "select": select_varying(1.0),
}
PLAIN = chain()
quick = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**32 - 1)


def models(seed, count=COUNT):
    """A base, models near it, and weights; float32."""
    rng = np.random.default_rng(seed)

    def draw():
        return {
            name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for name, shape in SHAPES.items()
        }

    base, common = draw(), draw()
    moved = [draw() for _ in range(count)]
    # with something in common, as fine-tunes have: angles below 90 degrees
    near = [jax.tree.map(lambda b, c, d: b + 0.1 * (c + d), base, common, m)
            for m in moved]  # fmt: skip
    return base, near, [float(w) for w in rng.uniform(0.2, 1.0, count)]


def run(name, base, experts, weights, key=0):
    start = None if name in WITHOUT_BASE else base
    return merge(RECIPES[name][0], start, experts, weights, jax.random.key(key))


def close(found, expected, atol=3e-6):
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=3e-6)


def obeying(law):
    return sorted(name for name, (_, laws) in RECIPES.items() if law in laws)


@pytest.mark.parametrize("name", obeying(SWAP))
@quick
@given(seed=seeds, order=st.permutations(range(COUNT)))
def test_experts_may_be_permuted(name, seed, order):
    base, experts, weights = models(seed)
    found = run(name, base, [experts[n] for n in order], [weights[n] for n in order])
    close(found, run(name, base, experts, weights))


@pytest.mark.parametrize("name", obeying(RATIO))
@quick
@given(seed=seeds, factor=st.sampled_from([0.125, 3.0, 100.0]))
def test_weights_count_by_their_ratios(name, seed, factor):
    base, experts, weights = models(seed)
    found = run(name, base, experts, [factor * w for w in weights])
    close(found, run(name, base, experts, weights))


@pytest.mark.parametrize("name", obeying(ALONE))
@quick
@given(seed=seeds)
def test_a_single_expert_comes_out_as_it_was(name, seed):
    base, (expert,), _ = models(seed, 1)
    close(run(name, base, [expert], [1.0]), expert)


@pytest.mark.parametrize("name", sorted(RECIPES))
@quick
@given(seed=seeds, power=st.integers(-3, 3))
def test_a_merge_scales_with_its_models(name, seed, power):
    base, experts, weights = models(seed)

    def grown(tree):
        return jax.tree.map(lambda x: x * 2.0**power, tree)

    found = run(name, grown(base), [grown(e) for e in experts], weights)
    close(found, grown(run(name, base, experts, weights)), atol=3e-6 * 2.0**power)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - NOT_SHIFTED))
@quick
@given(seed=seeds)
def test_a_merge_shifts_with_its_base(name, seed):
    """Models on a grid of 1 / 256, so that sums with the shift are exact."""
    base, experts, weights = jax.tree.map(
        lambda x: jnp.round(x * 256) / 256 if jnp.ndim(x) else x, models(seed)
    )
    shift = jax.tree.map(lambda x: jnp.round(x * 64) / 16, models(seed + 1)[0])

    def moved(tree):
        return jax.tree.map(jnp.add, tree, shift)

    found = run(name, moved(base), [moved(e) for e in experts], weights)
    close(found, moved(run(name, base, experts, weights)), atol=1e-5)


@pytest.mark.parametrize("name", sorted(WHOLE))
@quick
@given(seed=seeds)
def test_parts_that_drop_nothing_are_the_plain_sum(name, seed):
    base, experts, weights = models(seed)
    close(merge(WHOLE[name], base, experts, weights),
          merge(PLAIN, base, experts, weights), atol=5e-7)  # fmt: skip


@pytest.mark.parametrize("name", sorted(PAIRS))
@quick
@given(seed=seeds)
def test_two_equal_models_are_their_average(name, seed):
    _, (model,), _ = models(seed, 1)
    close(merge(PAIRS[name], None, [model, model]), model)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_same_key_same_merge(name):
    base, experts, weights = models(0)
    first = run(name, base, experts, weights, key=1)
    close(run(name, base, experts, weights, key=1), first, atol=0)
    if name in ("dare", "dare-ties", "della"):
        with pytest.raises(AssertionError):
            close(run(name, base, experts, weights, key=2), first)


@pytest.mark.parametrize(
    ("law", "name"),
    [
        (SWAP, "ema"),  # places matter
        (SWAP, "dare"),  # each place has its own mask
        (RATIO, "task arithmetic"),
        (ALONE, "breadcrumbs"),
    ],
)
def test_the_laws_can_be_broken(law, name):
    """The controls: recipes that do not claim a law do break it."""
    check = {
        SWAP: lambda: test_experts_may_be_permuted.hypothesis.inner_test(
            name, seed=1, order=[2, 0, 1]
        ),
        RATIO: lambda: test_weights_count_by_their_ratios.hypothesis.inner_test(
            name, seed=1, factor=3.0
        ),
        ALONE: lambda: test_a_single_expert_comes_out_as_it_was.hypothesis.inner_test(
            name, seed=1
        ),
    }
    with pytest.raises(AssertionError):
        check[law]()
