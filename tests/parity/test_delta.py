"""Adapters in a checkpoint against PEFT's merge_and_unload, on tiny random models.

Run from the environment with torch: `pytest tests/parity/test_delta.py`.
"""

import json

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collab_jax.io.delta import with_lora
from collab_jax.io.weights import open_weights

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute by its old name
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),
    # what PEFT says of settings that these tests choose on purpose
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MODELS = {
    "llama": {"model_type": "llama", "attention_bias": True, **SIZES},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 29,
        "n_embd": 24,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 32,
    },
}
ATTENTION = ["q_proj", "v_proj", "o_proj", "down_proj"]
CASES = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2, r"model\.layers\.1\..*o_proj": 5},
            "alpha_pattern": {"0.self_attn.v_proj": 3, "down_proj": 1},
        },
    ),
    "patterns of rslora": (
        "llama",
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6},
        },
    ),
    "whole modules": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "biases": ("llama", {"target_modules": ATTENTION[:2], "bias": "all"}),
    "bias of B": ("llama", {"target_modules": ATTENTION[:3], "lora_bias": True}),
    "head": ("llama", {"target_modules": ["lm_head", "up_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "dora": ("llama", {"target_modules": ATTENTION, "use_dora": True}),
    "dora of an embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "gate_proj"], "use_dora": True},
    ),
    "conv": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv, square only": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "conv, wrongly set": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": False},
    ),
    "linear, wrongly set": (
        "llama",
        {"target_modules": ATTENTION, "fan_in_fan_out": True},
    ),
    "conv and dora": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    ),
    "conv and embeddings": ("gpt2", {"target_modules": ["c_fc", "wpe", "wte"]}),
    "conv and biases": ("gpt2", {"target_modules": ["c_fc"], "bias": "lora_only"}),
}


def make(folder, name, settings, dtype, factors=None):
    """Writes a base and an adapter with numbers in all of its tensors."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[name])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    )
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter, dtype=torch.float32) / 4
                if "magnitude" in key:  # it stays near the norms
                    noise = noise + parameter
                parameter.copy_(noise)
                if factors is not None:
                    parameter.data = parameter.data.to(factors)
    adapted.save_pretrained(folder / "adapter")
    if "fan_in_fan_out" in settings:  # PEFT corrects it, and again when it reads it
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def merged(folder, dtype):
    """What PEFT makes of the files."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter")
    return model.merge_and_unload().state_dict()


def number(tensor):
    return tensor.double().numpy()


def compare(folder, dtype):
    """All tensors, within rounding; the number of those that the adapter changed."""
    expected = merged(folder, dtype)
    base = open_weights(folder / "base")
    found = with_lora(base, folder / "adapter")
    assert found.layouts == base.layouts
    changed = 0
    for name in found.layouts:
        key = name if name in expected else f"transformer.{name}"
        array, reference = found.read(name), number(expected[key])
        assert found.layouts[name] == (array.dtype, array.shape)
        assert not array.flags.writeable
        wide = array.astype(np.float64)
        scale = np.abs(reference) + np.abs(reference).max()
        if dtype == torch.float32:
            assert np.all(np.abs(wide - reference) <= 1e-6 * scale), name
        else:  # one unit in the last place, and that seldom
            unit = float(ml_dtypes.finfo(array.dtype).eps)
            gap = np.abs(wide - reference)
            assert np.all(gap <= unit * np.abs(reference) + 1e-12), name
            assert np.mean(gap > 0) < 0.01, name
        changed += not np.array_equal(wide, base.read(name).astype(np.float64))
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_as_merge_and_unload(tmp_path, case, dtype):
    """Every variant, in float32 and with rounding."""
    name, settings = CASES[case]
    make(tmp_path, name, settings, dtype)
    assert compare(tmp_path, dtype) >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factors", [torch.float16, torch.bfloat16])
def test_factors_of_another_type(tmp_path, dtype, factors):
    """Half factors on any base."""
    make(tmp_path, *CASES["embedding"], dtype, factors)
    assert compare(tmp_path, dtype) == 3


def test_adapter_in_a_pickle(tmp_path):
    """adapter_model.bin, and a base without the head's prefix."""
    make(tmp_path, *CASES["conv"], torch.float32)
    folder = tmp_path / "adapter"
    from safetensors.torch import load_file

    state = load_file(folder / "adapter_model.safetensors")
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    base = tmp_path / "base"
    state = load_file(base / "model.safetensors")
    short = {key.removeprefix("transformer."): x for key, x in state.items()}
    assert short != state
    torch.save(short, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert compare(tmp_path, torch.float32) == 8


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_refused(tmp_path, start):
    """W + B A would be another model than the one that was trained."""
    make(
        tmp_path,
        "llama",
        {"target_modules": ["q_proj"], "init_lora_weights": start},
        torch.float32,
    )
    with pytest.raises(ValueError, match="changes the base"):
        with_lora(open_weights(tmp_path / "base"), tmp_path / "adapter")
    # negative control: PEFT itself, told that the start was plain, gets another model
    path = tmp_path / "adapter" / "adapter_config.json"
    right = merged(tmp_path, torch.float32)["model.layers.0.self_attn.q_proj.weight"]
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"init_lora_weights": True}))
    wrong = merged(tmp_path, torch.float32)["model.layers.0.self_attn.q_proj.weight"]
    assert (right - wrong).abs().max() > 0.1
