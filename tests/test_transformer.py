"""The laws of `LM` on small transformers, and what a transformer adds to them."""

from typing import NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import for_users

from collab_jax import slots
from collab_jax.io import canonical
from collab_jax.lm import KVCache, branch_by_rows, language_model
from collab_jax.models import attention, moe
from collab_jax.models.config import from_hf, long_context
from collab_jax.models.transformer import ACTIVATIONS, init, transformer

TOLERANCE = 1e-5  # of the logits' standard deviation
# windows, soft-caps, learned positions and experts: what a law could break on
CASES = ["llama", "gemma3", "gemma2", "gpt2", "qwen3_moe"]
CAPACITY = 32


def build(name, taps=(), **changes):
    config = from_hf(families.CASES[name] | changes)
    drawn = families.tensors(config)
    params = jax.tree.map(jnp.asarray, canonical.load_tree(config, drawn.__getitem__))
    return config, params, transformer(config, taps)


def same(found, expected):
    gap = jnp.abs(jnp.asarray(found) - jnp.asarray(expected)).max()
    assert gap <= TOLERANCE * jnp.std(expected), float(gap / jnp.std(expected))


def jitted(lm):
    return lm._replace(
        extend=jax.jit(lm.extend), branch=jax.jit(lm.branch), prune=jax.jit(lm.prune)
    )


@pytest.mark.parametrize("name", CASES)
def test_laws(name):
    config, params, backbone = build(name)
    lm = jitted(language_model(backbone))
    tokens, _ = families.batch(config)
    tokens = jnp.asarray(tokens[:2, :16])
    start = lm.init(params, 2, CAPACITY)
    whole, _ = lm.extend(params, start, tokens)

    features, none = backbone.features(params, None, backbone.embed(params, tokens))
    assert none is None
    same(backbone.unembed(params, features.hidden), whole.logits)

    _, state = lm.extend(params, start, tokens[:, :8])
    part, state = lm.extend(params, state, tokens[:, 8:])
    same(part.logits, whole.logits[:, 8:])

    # rows go back by unlike amounts, are swapped, and go on alone
    state = lm.rewind(state, jnp.array([8, 3]))
    state = lm.take(state, jnp.array([1, 0]))
    following = jnp.stack([tokens[1, 13:16], tokens[0, 8:11]])
    part, _ = lm.extend(params, state, following)
    same(part.logits[0], whole.logits[1, 13:16])
    same(part.logits[1], whole.logits[0, 8:11])


@pytest.mark.parametrize("name", CASES)
def test_trees(name):
    config, params, backbone = build(name)
    lm = jitted(language_model(backbone))
    oracle = branch_by_rows(lm)
    tokens, _ = families.batch(config)
    tokens = jnp.asarray(tokens[:2])
    _, state = lm.extend(params, lm.init(params, 2, CAPACITY), tokens[:, :12])
    state = lm.rewind(state, jnp.array([0, 4]))
    _, slow = oracle.extend(params, oracle.init(params, 2, CAPACITY), tokens[:, :12])
    slow = oracle.rewind(slow, jnp.array([0, 4]))
    nodes = tokens[:, 12:19]
    parents = jnp.array([[-1, 0, 0, 1, -1, 4, 3], [-1, -1, 1, 2, 3, 0, 4]])
    path, count = jnp.array([[0, 1, 3, 6], [1, 2, 3, 0]]), jnp.array([4, 3])
    after = tokens[:, 19:21]

    out, grown = lm.branch(params, state, nodes, parents)
    expected, slow = oracle.branch(params, slow, nodes, parents)
    same(out.logits, expected.logits)

    found, _ = lm.extend(params, lm.prune(grown, path, count), after)
    expected, _ = oracle.extend(params, oracle.prune(slow, path, count), after)
    same(found.logits, expected.logits)

    found, _ = lm.extend(params, lm.prune(grown, path, jnp.zeros(2, int)), after)
    expected, _ = lm.extend(params, state, after)
    same(found.logits, expected.logits)


def test_a_branch_that_sees_its_sibling_fails():
    config, params, backbone = build("gemma3")
    lm = jitted(language_model(backbone))
    tokens = jnp.asarray(families.batch(config)[0][:1])
    _, state = lm.extend(params, lm.init(params, 1, CAPACITY), tokens[:, :12])
    parents = jnp.array([[-1, 0, 0]])
    right, _ = lm.branch(params, state, tokens[:, 12:15], parents)
    wrong, _ = lm.extend(params, state, tokens[:, 12:15])
    gap = jnp.abs(right.logits - wrong.logits)[0, 2].max()
    assert gap > 100 * TOLERANCE * jnp.std(right.logits)


def test_members_stacked_on_an_axis():
    config, params, backbone = build("qwen3_moe", num_hidden_layers=2)
    lm = jitted(language_model(backbone))
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    tokens = jnp.asarray(families.batch(config)[0][:2, :6])

    def read(params):
        state = lm.init(params, 2, 8)
        out, state = lm.extend(params, state, tokens[:, :5])
        last, _ = lm.extend(params, state, tokens[:, 5:])
        return jnp.concatenate([out.logits, last.logits], axis=1)

    found = jax.jit(jax.vmap(read))(both)
    same(found[0], read(params))
    same(found[1], read(other))


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "mixtral"])
def test_bfloat16_and_gradients(name):
    config, params, backbone = build(name)
    tokens = jnp.asarray(families.batch(config)[0][:2, :9])

    def loss(params):
        features, _ = backbone.features(params, None, backbone.embed(params, tokens))
        laws = jax.nn.log_softmax(backbone.unembed(params, features.hidden))
        return -jnp.take_along_axis(laws[:, :-1], tokens[:, 1:, None], -1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    leaves = jax.tree.leaves(grads)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    assert all(bool((leaf != 0).any()) for leaf in leaves)

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    lm = language_model(backbone)
    state = lm.init(half, 2, 16)
    held = slots.held(jnp.bfloat16)
    assert {leaf.dtype for leaf in state.k + state.v} == {jnp.dtype(held)}
    out, state = jax.jit(lm.extend)(half, state, tokens)
    assert out.logits.dtype == jnp.float32
    assert out.features.hidden.dtype == jnp.bfloat16
    laws = jax.nn.log_softmax(out.logits)
    near = -jnp.take_along_axis(laws[:, :-1], tokens[:, 1:, None], -1).mean()
    assert abs(near - value) < 0.1 * value


def copies(lm, params, dtype):
    """How a loop's temporary memory compares with a buffer of the cache."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    traces = []

    def generate(params, state, token, count):
        traces.append(1)

        def step(carry):
            i, state, token = carry
            out, state = lm.extend(params, state, token)
            return i + 1, state, out.logits.argmax(-1).astype(jnp.int32)

        return jax.lax.while_loop(lambda c: c[0] < count, step, (0, state, token))

    capacity = 4096
    run = jax.jit(generate, donate_argnums=1)
    token = jnp.ones((2, 1), jnp.int32)
    compiled = for_users(run.lower(params, lm.init(params, 2, capacity), token, 3))
    one_buffer = lm.init(params, 2, capacity).k[0].nbytes
    for count in (2, 5):
        run(params, lm.init(params, 2, capacity), token + count, count)
    assert len(traces) == 1
    return compiled.memory_analysis().temp_size_in_bytes / one_buffer


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_retrace_and_no_copy_of_the_cache(dtype, monkeypatch):
    _, params, backbone = build("llama")
    lm = language_model(backbone)
    assert copies(lm, params, dtype) < 1
    if dtype == jnp.bfloat16:  # a buffer of that type is widened
        monkeypatch.setattr(slots, "held", lambda dtype: dtype)
        assert copies(lm, params, dtype) > 2


def test_taps():
    taps = ("hidden.0", "hidden.3", "attention.2")
    config, params, backbone = build("gemma3", taps)
    tokens = jnp.asarray(families.batch(config)[0][:2, :9])
    x = backbone.embed(params, tokens)
    state = backbone.init(params, 2, 12)
    features, _ = jax.jit(backbone.features)(params, state, x)
    assert set(features.taps) == set(taps)
    np.testing.assert_array_equal(features.taps["hidden.0"], x)
    weights = features.taps["attention.2"]
    assert weights.shape == (2, 9, 12)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert bool((weights[:, 2, 3:] == 0).all())
    with pytest.raises(ValueError, match=r"unknown taps \['hidden.9'\].*3 layers"):
        transformer(config, ("hidden.9",))


def test_a_window_counts_positions_of_nodes():
    # a chain hung as a tree sees what the chain sees, wherever its slots lie
    length, parents = jnp.array([3]), jnp.array([[-1, -1, 1, 2]])
    seen = attention.windowed(
        attention.slots.visible(length, 4, 8, parents), length, 3, parents
    )
    assert seen[0].astype(int).tolist() == [
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
    ]


@pytest.mark.parametrize("mix", [moe.mix_dense, moe.mix_gathered])
def test_experts_against_a_loop(mix):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 5)).astype(np.float32)
    shapes = ((4, 5, 3), (4, 5, 3), (4, 3, 5))
    experts = moe.Experts(*(rng.standard_normal(s).astype(np.float32) for s in shapes))
    experts = jax.tree.map(jnp.asarray, experts)
    logits = rng.standard_normal((6, 4)).astype(np.float32)
    weights, chosen = moe.route(jnp.asarray(logits), 2, renormalise=True)
    expected = np.zeros_like(x)
    for n, row in enumerate(x):
        best = np.argsort(-logits[n])[:2]
        share = np.exp(logits[n][best])
        for e, weight in zip(best, share / share.sum(), strict=True):
            gate, up = row @ experts.gate[e], row @ experts.up[e]
            hidden = gate / (1 + np.exp(-gate)) * up
            expected[n] += weight * (hidden @ experts.down[e])
    found = mix(jnp.asarray(x), experts, weights, chosen, ACTIVATIONS["silu"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_may_be_something_else_than_an_array():
    class Doubled(NamedTuple):
        half: jax.Array

        def project(self, x):
            return 2 * (x @ self.half)

    config, params, backbone = build("llama")
    lm = jitted(language_model(backbone))
    tokens = jnp.asarray(families.batch(config)[0][:1, :5])
    expected, _ = lm.extend(params, lm.init(params, 1, 8), tokens)
    layer = params["layers_0"]["attention"]
    layer["q"] = {"kernel": Doubled(layer["q"]["kernel"] / 2)}
    found, _ = lm.extend(params, lm.init(params, 1, 8), tokens)
    same(found.logits, expected.logits)


def test_init_has_the_leaves_of_the_checkpoint():
    for name in ("gpt2", "olmo2", "mixtral", "qwen2"):
        config, params, backbone = build(name)
        fresh = init(jax.random.key(0), config, jnp.bfloat16)
        assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {
            jnp.dtype(jnp.bfloat16)
        }
        assert isinstance(backbone.init(fresh, 1, 4), KVCache)


def test_a_text_that_the_model_cannot_number_is_an_error():
    _, params, backbone = build("gpt2")
    with pytest.raises(ValueError, match="65 tokens exceed the 64 learned positions"):
        backbone.init(params, 1, 65)
    config, params, backbone = build("phi3_short")
    with pytest.raises(ValueError, match="33 tokens exceed the first context of 32"):
        backbone.init(params, 1, 33)
    transformer(long_context(config)).init(params, 1, 33)
