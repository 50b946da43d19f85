"""Ranks over a whole model: digits of a TPU, and more entries than an int32 counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collab_jax.merge import magnitude, ranked, recipes, wide
from collab_jax.merge.compete import compete
from collab_jax.merge.memory import merge
from collab_jax.merge.sparsify import trim_whole

PARTS = {
    "trim_whole": lambda: trim_whole(0.3),
    "compete": compete,
    "ties": lambda: recipes.ties(0.3),
}


def models():
    """A base and two experts, with ties and zeros among the differences."""
    rng = np.random.default_rng(0)
    shapes = {"a": (40, 30), "b": (7,)}

    def one(step):
        return {
            name: jnp.asarray(np.float32(rng.integers(-9, 9, shape) * step))
            for name, shape in shapes.items()
        }

    return one(0.5), [one(0.125), one(0.0625)]


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("name", ["trim_whole", "compete"])
def test_the_digits_of_a_tpu_find_the_same_numbers(name, jitted, monkeypatch):
    base, experts = models()
    plain = PARTS[name]()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        part = PARTS[name]()
    assert len(part.survey) == len(plain.survey) + 14

    def run(part):
        def merged(base, experts):
            return merge(part, base, experts)

        return (jax.jit(merged) if jitted else merged)(base, experts)

    for one, other in zip(*map(jax.tree.leaves, map(run, (part, plain))), strict=True):
        if name == "compete":  # products of exponentials, fused in another way
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits", [31, 32])
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_digits_are_all_bits_once(bits, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    covered = [
        bit for digit in ranked.digits(bits)
        for bit in reversed(range(digit.shift, digit.shift + digit.width))
    ]  # fmt: skip
    assert covered == [*reversed(range(bits))]


def test_a_few_values_are_counted_as_many_are():
    values = jnp.asarray(np.random.default_rng(1).integers(0, 2**31, 500), jnp.uint32)
    whole, few = np.asarray(values), magnitude.Digit(24, 2)
    expected = np.bincount((whole >> 24) & 3, minlength=4)
    np.testing.assert_array_equal(magnitude.histogram(values, few), expected)
    inside = magnitude.histogram(values, few, jnp.uint32(3))
    assert inside.sum() == (whole >> 26 == 3).sum() > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**45), min_size=1, max_size=40), st.data())
def test_wide_counts_find_the_rank_of_integers_of_64_bits(counts, data):
    counts[0] += 1
    rank = data.draw(st.integers(1, sum(counts)))
    exact = np.array(counts, np.int64)
    parts = [
        jnp.asarray(x.astype(np.uint32)) for x in (exact >> 32, exact & 0xFFFFFFFF)
    ]
    place, left = magnitude.at_rank(wide.Wide(*parts), rank)
    expected = magnitude.at_rank(exact, rank)
    assert int(place) == expected[0]
    assert (int(left.high) << 32) + int(left.low) == expected[1]


def test_integers_of_32_bits_do_not():
    """The control."""
    exact = np.array([5, 2**31 - 1, 2], np.int64)
    place, _ = magnitude.at_rank(jnp.asarray(exact, jnp.int32), 100)
    assert magnitude.at_rank(exact, 100)[0] == 1 != int(place)


@pytest.mark.parametrize("name", PARTS)
def test_a_model_of_six_billion_parameters_is_traced(name):
    """What no int32 counts, in a program; nothing is computed."""
    model = {k: jax.ShapeDtypeStruct((2**15, 61035), jnp.bfloat16) for k in "abc"}
    assert sum(leaf.size for leaf in model.values()) > 2**32
    found = jax.eval_shape(
        lambda base, *experts: merge(PARTS[name](), base, experts), *[model] * 3
    )
    assert found["a"].shape == model["a"].shape


@pytest.mark.parametrize("mapped", ["a", "b"])
@pytest.mark.parametrize("name", ["trim_whole", "compete"])
def test_counts_of_mapped_and_of_plain_leaves_add_up(name, mapped):
    """Those of one leaf are traced, those of the other NumPy's."""
    base, experts = models()
    axes = {leaf: 0 if leaf == mapped else None for leaf in base}

    def first_alone(expert):
        return merge(PARTS[name](), base, [expert, experts[1]])

    stacked = {**experts[0], mapped: jnp.stack([experts[0][mapped]] * 2)}
    found = jax.vmap(first_alone, (axes,))(stacked)
    expected = first_alone(experts[0])
    for leaf in base:
        np.testing.assert_allclose(found[leaf][1], expected[leaf], rtol=1e-5, atol=1e-6)


def test_integers_of_numpy_keep_64_bits():
    found = wide.wide(np.array([5 << 32 | 7, 3]))
    assert [part.tolist() for part in found] == [[5, 0], [7, 3]]
