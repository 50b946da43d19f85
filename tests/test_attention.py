"""Attention block by block: the whole buffer's output, from what is in use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import for_users

from collab_jax import slots, testing
from collab_jax.lm import language_model
from collab_jax.models import attention
from collab_jax.models.config import from_hf
from collab_jax.models.transformer import init, transformer

B, T, H, G, S, K = 3, 4, 2, 3, 37, 8
LENGTH = jnp.array([5, 21, 33])


def arrays(seed=0):
    q, k, v = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(q, (B, T, H * G, K)),
        jax.random.normal(k, (B, H, S, K)),
        jax.random.normal(v, (B, H, S, K)),
    )


def masks(window, parents=None):
    mask = slots.visible(LENGTH, T, S, parents)
    if window is not None:
        mask = attention.windowed(mask, LENGTH, window, parents)
    return mask, attention.reach(LENGTH, T, window)


@pytest.mark.parametrize("block", [1, 8, 16, S])
@pytest.mark.parametrize("window", [None, 3, 30])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_blocks_give_what_the_whole_buffer_gives(block, window, cap):
    mask, reach = masks(window)
    expected, _ = attention.attend(*arrays(), mask, 0.3, cap)
    found = jax.jit(attention.attend_within, static_argnums=(5, 6, 7))(
        *arrays(), mask, reach, 0.3, cap, block
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("window", [None, 2])
def test_a_tree_is_within_reach(window):
    parents = jnp.broadcast_to(jnp.array([-1, 0, 0, 1]), (B, T))
    mask, reach = masks(window, parents)
    expected, _ = attention.attend(*arrays(), mask, 0.3)
    found = attention.attend_within(*arrays(), mask, reach, 0.3, None, 8)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    inside = (jnp.arange(S) >= reach[0]) & (jnp.arange(S) < reach[1])
    assert not bool((mask & ~inside).any())


def test_a_block_beyond_reach_is_not_read():
    """NaN there changes nothing; one block more, and it would."""
    mask, _ = masks(None)
    mask &= jnp.arange(S) < 16
    q, k, v = arrays()
    k, v = k.at[:, :, 16:].set(jnp.nan), v.at[:, :, 16:].set(jnp.nan)
    read = functools.partial(attention.attend_within, q, k, v, mask)
    near, far = (jnp.int32(0), jnp.int32(16)), (jnp.int32(0), jnp.int32(17))
    assert bool(jnp.isfinite(read(near, 0.3, None, 8)).all())
    assert not bool(jnp.isfinite(read(far, 0.3, None, 8)).all())


def test_derivatives_are_those_of_the_whole_buffer():
    mask, reach = masks(None)

    def loss(attend, parts):
        return (attend(*parts) ** 2).sum()

    def whole(q, k, v):
        return attention.attend(q, k, v, mask, 0.3)[0]

    def within(q, k, v):
        return attention.attend_within(q, k, v, mask, reach, 0.3, None, 8)

    expected = jax.grad(functools.partial(loss, whole))(arrays())
    found = jax.jit(jax.grad(functools.partial(loss, within)))(arrays())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@functools.cache
def model(**more):
    config = from_hf(
        {"model_type": "llama", "vocab_size": 31, "hidden_size": 32}
        | {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2}
        | more
    )
    return config, init(jax.random.key(3), config)


@pytest.mark.parametrize("window", [None, 6])
def test_a_long_buffer_obeys_the_laws(read_in_blocks, window):
    """With blocks of 4 slots the buffer of 24 is read block by block."""
    read_in_blocks(4)
    config, params = model()
    config = dataclasses.replace(config, windows=(window, None))
    lm = language_model(transformer(config))
    testing.check_lm(lm, params, vocab=31, jit=True)


def test_members_on_one_axis_are_read_together(read_in_blocks):
    read_in_blocks(4)
    config, params = model()
    lm = language_model(transformer(config))
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    tokens = jnp.array([[1, 2, 3, 4, 5]])

    def read(params):
        state = lm.init(params, 1, 20)
        _, state = lm.extend(params, state, tokens)
        return lm.extend(params, state, tokens)[0].logits

    found = jax.vmap(read)(both)
    for n, one in enumerate(found):
        alone = read(jax.tree.map(lambda x, n=n: x[n], both))
        np.testing.assert_allclose(one, alone, atol=2e-5)


def test_the_work_of_a_step_does_not_follow_the_capacity():
    """Operations of the compiled step, the loop's body counted once."""
    config, params = model()
    lm = language_model(transformer(config))

    def work(capacity, layers=lm):
        state = jax.eval_shape(lambda: lm.init(params, 1, capacity))
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        step = jax.jit(layers.extend, donate_argnums=1)
        compiled = for_users(step.lower(params, state, token))
        return compiled.cost_analysis()["flops"]

    assert work(16384) < work(1024) + 2 * 16384  # the mask
    tapped = language_model(transformer(config, ("attention.1",)))
    assert work(16384, tapped) > 4 * work(1024, tapped)  # the whole buffer
