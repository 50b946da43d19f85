"""Every decoder family against stored logits of torch transformers, without torch.

The vectors are made by `tests/golden/make_families.py`.
"""

import pathlib

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from collab_jax.io import canonical
from collab_jax.models.config import from_hf, long_context, to_hf
from collab_jax.models.transformer import transformer

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "families.npz")
TOLERANCE = 1e-4  # of the logits' standard deviation


@pytest.mark.parametrize("name", families.CASES)
def test_logits(name):
    config = from_hf(families.CASES[name])
    if name == "phi3_long_partial":
        config = long_context(config)
    tokens, length = GOLDEN["tokens"], GOLDEN["length"]
    drawn = families.tensors(config)
    params = jax.tree.map(jnp.asarray, canonical.load_tree(config, drawn.__getitem__))
    backbone = transformer(config)

    @jax.jit
    def read(params, tokens):
        features, _ = backbone.features(params, None, backbone.embed(params, tokens))
        return backbone.unembed(params, features.hidden)

    where = np.stack([0 * length, length // 2, length - 1], axis=1)
    found = np.take_along_axis(read(params, tokens), where[..., None], 1)
    gap = np.abs(found - GOLDEN[name]).max() / GOLDEN[name].std()
    assert gap <= TOLERANCE, gap


@pytest.mark.parametrize("name", families.CASES)
def test_config_survives_writing(name):
    config = from_hf(families.CASES[name])
    assert from_hf(to_hf(config)) == config
    assert hash(config) == hash(from_hf(to_hf(config)))


WRONG = {
    "unknown architecture 'mamba'.*llama": {"model_type": "mamba"},
    "unknown architecture None": {},
    "llama lacks 'hidden_size'": {"model_type": "llama", "num_hidden_layers": 1},
    "quantization_config.*not supported": families.CASES["llama"]
    | {"quantization_config": {"bits": 4}},
    "unknown activation hidden_act='quick_gelu'": families.CASES["llama"]
    | {"hidden_act": "quick_gelu"},
    "rope_type 'dynamic'.*not supported": families.CASES["llama"]
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_type 'default' with \\['mrope_section'\\]": families.CASES["qwen2"]
    | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
    "rope_type 'llama3' lacks 'factor'": families.CASES["llama"]
    | {"rope_scaling": {"rope_type": "llama3"}},
    "partial_rotary_factor=0.5": families.CASES["llama"]
    | {"partial_rotary_factor": 0.5},
    "layer_types.*not supported for mistral": families.CASES["mistral"]
    | {"layer_types": ["full_attention"] * 3},
    "layer_types of qwen3 must be 3": families.CASES["qwen3"]
    | {"layer_types": ["chunked_attention"] * 3},
    "no sliding_window": families.CASES["qwen3"]
    | {"layer_types": ["sliding_attention"] * 3},
    "short_factor and long_factor must have 3": families.CASES["phi3_short"]
    | {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
    "multiple of 4 key-value heads": families.CASES["llama"]
    | {"num_key_value_heads": 4},
    "heads of 5 dimensions": families.CASES["llama"] | {"head_dim": 5},
    "use_bidirectional_attention": families.CASES["gemma3"]
    | {"use_bidirectional_attention": True},
    "attn_logit_softcapping": families.CASES["gemma3"]
    | {"attn_logit_softcapping": 5.0},
    "nested per layer type": families.CASES["gemma3"]
    | {"rope_parameters": {"rope_theta": 10.0}},
    "scale_attn_by_inverse_layer_idx": families.CASES["gpt2"]
    | {"scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_understood_is_an_error(message):
    with pytest.raises(ValueError, match=message):
        from_hf(WRONG[message])


def test_the_text_part_of_a_multimodal_config():
    text = {k: v for k, v in families.CASES["gemma3"].items() if k != "model_type"}
    text = {k: v for k, v in text.items() if not k.endswith("_token_id")}
    raw = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 2]}
    config = from_hf(raw)
    assert config.family == "gemma3_text"
    assert config.eos == (1, 2)
    assert config.windows == (5, None, 5)
