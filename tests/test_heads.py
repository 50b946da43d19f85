"""Heads against numpy."""

import jax
import numpy as np
import pytest

from collab_jax.models import heads, transformer
from collab_jax.models.config import from_hf
from collab_jax.models.parallel_heads import blockwise, medusa, separate

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


@pytest.mark.parametrize("head", [heads.residual(5, None, 2), heads.feed_forward(5, 7)])
def test_hidden_states_against_numpy(head):
    params, x = random_params(head), np.float64(X)
    if "up" in params:
        up, down = params["up"], params["down"]
        inner = np.maximum(x @ up["kernel"] + up["bias"], 0)
        x = x + inner @ down["kernel"] + down["bias"]
    else:
        for name in ("block_0", "block_1"):
            y = x @ params[name]["kernel"] + params[name]["bias"]
            x = x + y / (1 + np.exp(-y))
    np.testing.assert_allclose(head.apply(params, X), x, rtol=1e-4, atol=1e-4)
    half = head.apply(params, X.astype(np.float16))
    assert half.dtype == np.float16


CONFIG = from_hf(
    {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
)
BACKBONE = transformer.transformer(CONFIG)
MAKERS = {
    "medusa": lambda: medusa(BACKBONE, 3, blocks=2),
    "separate": lambda: medusa(BACKBONE, 3, output=separate),
    "blockwise": lambda: blockwise(BACKBONE, 3, inner=16),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_new_parallel_heads_say_what_the_model_says(kind):
    """And learn: a gradient reaches each of them, by whatever axes."""
    made = MAKERS[kind]()
    base = transformer.init(jax.random.key(0), CONFIG)
    params = made.init(jax.random.key(1), base)
    hidden = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    own = BACKBONE.unembed(base, hidden)
    found = made.apply(params, base, hidden)
    assert found.shape == (2, 3, 3, 11)
    for i in range(3):
        np.testing.assert_allclose(found[:, :, i], own, rtol=1e-5, atol=1e-5)
    one = made.apply(params, base, hidden[1, 2])
    np.testing.assert_allclose(one, found[1, 2], rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda p: (made.apply(p, base, hidden) ** 2).sum())(params)
    for name in ("head_1", "head_2", "head_3"):
        assert max(abs(leaf).max() for leaf in jax.tree.leaves(gradient[name])) > 0
    blank = made.blank(base, 4)
    assert blank.shape == (4, 8)
    assert blank.dtype == hidden.dtype


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="width 0"):
        heads.linear(0)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"size = {size}: 1 or more heads"):
            medusa(BACKBONE, size)
    with pytest.raises(ValueError, match="blocks = 0: 1 or more are expected"):
        medusa(BACKBONE, 2, blocks=0)
    with pytest.raises(ValueError, match="inner 0: sizes of at least 1"):
        blockwise(BACKBONE, 2, inner=0)
