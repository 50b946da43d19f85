"""Heads against numpy."""

import jax
import numpy as np
import pytest

from collab_jax.models import heads

X = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)


def random_params(head):
    return jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
        head.init(jax.random.key(0)),
    )


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_residual_against_numpy(blocks):
    head = heads.residual(5, outputs=4, blocks=blocks)
    params, x = random_params(head), np.float64(X)
    for i in range(blocks):
        y = x @ params[f"block_{i}"]["kernel"] + params[f"block_{i}"]["bias"]
        x = x + y / (1 + np.exp(-y))
    want = x @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(head.apply(params, X), want, rtol=1e-4, atol=1e-4)


def test_a_new_residual_head_is_linear():
    head, plain = heads.residual(5, blocks=2), heads.linear(5)
    params = head.init(jax.random.key(1))
    np.testing.assert_allclose(
        head.apply(params, X), plain.apply({"out": params["out"]}, X), rtol=1e-6
    )
    assert abs(params["out"]["kernel"]).max() > 0


def test_gradients_reach_a_new_head():
    head = heads.residual(5, blocks=1)
    params = head.init(jax.random.key(1))
    gradient = jax.grad(lambda p: (head.apply(p, X) ** 2).sum())(params)
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="width 0"):
        heads.linear(0)
