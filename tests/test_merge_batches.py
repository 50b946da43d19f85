"""Many small tensors of one kind are merged by one call, and none notices."""

import jax
import numpy as np
import pytest

from collab_jax.merge import program, stream
from collab_jax.merge.memory import merge
from collab_jax.merge.mergekit import METHODS, part
from collab_jax.merge.recipes import dare_ties

KEY = jax.random.key(2)
CASES = {
    "linear": part("linear", 2),
    "ties": part("ties", 2, {"density": 0.4}),
    "dare_ties": part("dare_ties", 2, {"density": 0.5, "rescale": False}),
    "a survey of the whole model": dare_ties(0.3, 0.5),
}


def models(count):
    """A base and two experts of so many equal shapes, and one other."""
    draw = np.random.default_rng(0)

    def tree(spread):
        shapes = {f"experts.{i}.weight": (6, 5) for i in range(count)} | {"norm": (7,)}
        values = {n: spread * draw.standard_normal(s) for n, s in shapes.items()}
        return {n: np.float32(np.round(v, 1)) for n, v in values.items()}

    base = tree(1.0)
    return base, [{n: base[n] + d for n, d in tree(0.5).items()} for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_leaves(name, monkeypatch):
    count = stream.BATCH + 6  # one full batch, and one that is filled up
    base, experts = models(count)
    method, weights = CASES[name], (0.7, 0.4)
    if name in METHODS and METHODS[name].base == "none":
        base, experts, weights = None, experts, (0.7, 0.4)
    expected = merge(method, base, experts, weights, KEY)
    calls = []
    batch = program.programs(method).batch

    def counted(leaves, facts, dtype=None):
        calls.append(len(leaves))
        return batch(leaves, facts, dtype)

    run = program.programs(method)._replace(batch=counted)
    monkeypatch.setattr(stream, "programs", lambda part: run)
    jobs = [
        stream.Job(
            leaf,
            experts[0][leaf].shape,
            np.dtype(np.float32),
            method,
            weights,
            lambda leaf=leaf: (
                None if base is None else base[leaf],
                tuple(expert[leaf] for expert in experts),
            ),
            ("a", "b") if base is None else ("base", "a", "b"),
        )
        for leaf in experts[0]
    ]
    found = {}
    stream.stream(jobs, found.__setitem__, KEY)
    assert calls == [stream.BATCH] * 2
    assert found.keys() == expected.keys()
    for leaf, value in expected.items():
        np.testing.assert_array_equal(found[leaf], value, err_msg=leaf)


def test_an_input_in_a_batch_that_is_not_finite():
    _, experts = models(stream.BATCH)
    experts[1]["experts.9.weight"] = np.full((6, 5), np.nan, np.float32)
    jobs = [
        stream.Job(
            leaf,
            (6, 5),
            np.dtype(np.float32),
            CASES["linear"],
            (1.0, 1.0),
            lambda leaf=leaf: (None, (experts[0][leaf], experts[1][leaf])),
            ("a", "b"),
        )
        for leaf in experts[0]
        if leaf != "norm"
    ]
    with pytest.raises(ValueError, match=r"tensor experts\.9\.weight of b holds 30"):
        stream.stream(jobs, lambda name, array: None, KEY)
