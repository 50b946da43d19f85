"""The sharded paths on eight devices, against one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from collab_jax import combine, decode, mesh, pool, score, warp
from collab_jax.lm import language_model
from collab_jax.models import encoder, encoder_config, marian
from collab_jax.models.config import from_hf
from collab_jax.models.marian_config import MarianConfig
from collab_jax.models.transformer import init, transformer

HF = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"model_type": "llama", **HF},
    "qwen2": {"model_type": "qwen2", **HF},
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, **HF},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **HF},
}
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8], [4, 4, 4], [1, 2], [3], [2, 40, 41, 5], [6]]


def model(name, seed=0):
    config = from_hf(FAMILIES[name])
    params = init(jax.random.key(seed), config)

    return language_model(transformer(config)), params


def both(make_decoder, lm, params, sharded, placed_rows):
    """(tokens and logits on one device, the same sharded)."""
    prompt, length = decode.pad(PROMPTS)
    keys = jax.random.split(jax.random.key(1), len(PROMPTS))
    program = decode.compile(make_decoder)
    scoring = jax.jit(score.score, static_argnums=(0, 4))
    results = []
    for p, place in ((params, lambda x: x), (sharded, placed_rows)):
        out = program(None, p, place(prompt), place(length), place(keys))
        text = results[0][0].tokens if results else out.tokens
        results.append((out, scoring(lm, p, place(text), place(out.length), 8)))
    return results


def agree(results):
    (one, one_scores), (many, many_scores) = results
    scale = np.std(one_scores.logprob)
    np.testing.assert_allclose(
        one_scores.logprob, many_scores.logprob, atol=1e-5 * max(scale, 1), rtol=0
    )
    assert (one.length == many.length).all()
    assert (one.tokens == many.tokens).all()


@pytest.mark.parametrize(
    ("name", "axes", "block"),
    [
        *((name, {"data": 2, "model": 4}, 128) for name in FAMILIES),
        ("llama", {"data": 8, "model": 1}, 128),
        ("gemma2", {"data": 4, "model": 2}, 4),  # the buffer is read in blocks
    ],
)
def test_tensor_and_data_parallel_decode(name, axes, block, read_in_blocks):
    read_in_blocks(block)
    lm, params = model(name)
    devices = mesh.make_mesh(**axes)
    sharded = mesh.shard(params, devices, mesh.tensor_parallel("model"))
    kernel = sharded["layers_0"]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "model")
    assert len(kernel.sharding.device_set) == 8

    def rows(x):
        return jax.device_put(x, mesh.rows(devices, "data"))

    def make(_):
        return decode.sample(warp.warp(lm, warp.temperature(0.8)), 6, chunk=4)

    agree(both(make, lm, params, sharded, rows))


def test_members_on_a_mesh_axis():
    lm, _ = model("llama")
    members = [model("llama", seed)[1] for seed in range(4)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    ensemble = combine.stacked(lm, 4, pool.mixture(0.4, 0.3, 0.2, 0.1))
    devices = mesh.make_mesh(member=4, model=2)
    rules = mesh.stacked(mesh.tensor_parallel("model"), "member")
    sharded = mesh.shard(params, devices, rules)
    for leaf in jax.tree.leaves(sharded):
        assert leaf.sharding.spec[0] == "member"
        assert leaf.addressable_shards[0].data.shape[0] == 1
    everywhere = jax.sharding.NamedSharding(devices, PartitionSpec())

    def rows(x):
        return jax.device_put(x, everywhere)

    agree(both(lambda _: decode.greedy(ensemble, 6), ensemble, params, sharded, rows))


def split(params, devices, rules):
    """On the mesh; all but norms, biases and positions in eight parts."""
    found = mesh.shard(params, devices, rules)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        if leaf.ndim > 1 and "positions" not in name and "types" not in name:
            assert leaf.addressable_shards[0].data.size == leaf.size // 8, name
    return found


def test_an_encoder_on_many_devices():
    raw = {"model_type": "bert", "vocab_size": 48, "hidden_size": 32}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
    raw["max_position_embeddings"] = 16
    config = encoder_config.from_hf(raw)
    params = encoder.init(jax.random.key(0), config)
    devices = mesh.make_mesh(model=8)
    sharded = split(params, devices, mesh.for_model(config, devices, "model"))
    text = decode.pad(PROMPTS)
    embed = jax.jit(encoder.encoder(config).embed_sentences)
    np.testing.assert_allclose(embed(sharded, *text), embed(params, *text), atol=1e-6)


def test_a_translator_on_many_devices():
    config = MarianConfig(48, 48, 32, 2, 8, 64, 2, 8, 64, 32, 8, eos=(0,))
    params = marian.init(jax.random.key(0), config)
    params["logit_bias"] = jnp.linspace(-1.0, 1.0, 48)
    devices = mesh.make_mesh(model=8)
    sharded = split(params, devices, mesh.for_model(config, devices, "model"))
    sources, text = decode.pad(PROMPTS), decode.pad([[8]] * len(PROMPTS))
    run = decode.compile(lambda _: decode.greedy(marian.translator(config), 6))
    one, many = (
        run(None, (p, *sources), *text, jax.random.key(0)) for p in (params, sharded)
    )
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.scores, many.scores, rtol=1e-5)


def test_a_split_that_does_not_fit_is_refused():
    devices = mesh.make_mesh(model=8)
    with pytest.raises(
        ValueError, match=r"embed/embedding of shape \(9, 4\).*9 is not"
    ):
        mesh.shard(
            {"embed": {"embedding": jnp.zeros((9, 4))}},
            devices,
            mesh.tensor_parallel("model"),
        )
    with pytest.raises(ValueError, match="there are 8 devices"):
        mesh.make_mesh(data=3)
