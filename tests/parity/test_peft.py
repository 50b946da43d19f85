"""Adapters to and from the PEFT package: equal logits in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collab_jax.io.canonical import load_tree
from collab_jax.io.peft import load_adapter, save_adapter
from collab_jax.lm import language_model
from collab_jax.models import lora, transformer
from collab_jax.models.config import from_hf, to_hf

# peft 0.21 asks transformers 5.23 for an attribute by its old name
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 29, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 32}
CASES = {  # one linear module a kernel, fused qkv and gate_up, Conv1D, per-head qkv
    "llama": ({"model_type": "llama", **SIZES}, ["q_proj", "v_proj", "down_proj"]),
    "phi3": ({"model_type": "phi3", **SIZES}, ["qkv_proj", "gate_up_proj", "o_proj"]),
    "gpt2": ({"model_type": "gpt2", **GPT2}, ["c_attn", "c_fc"]),
    "gpt_neox": (
        {"model_type": "gpt_neox", **SIZES},
        ["query_key_value", "dense_4h_to_h"],
    ),
}
TOKENS = np.random.default_rng(0).integers(3, 29, (2, 9))


def pair(name):
    """The same random model in both libraries."""
    config = from_hf(CASES[name][0])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf(config)))
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    # its files say embed_out, the module in memory says lm_head
    state.setdefault("embed_out.weight", state["lm_head.weight"])
    return config, load_tree(config, lambda tensor: state[tensor]), model.eval()


def logits(config, params):
    lm = language_model(transformer.transformer(config))
    return np.asarray(lm.extend(params, lm.init(params, 2, 9), TOKENS)[0].logits)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def close(got, want):
    return abs(got - want).max() <= 1e-4 * want.std()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_is_read(name, rslora, tmp_path):
    config, params, model = pair(name)
    base = torch_logits(model)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=CASES[name][1],
        init_lora_weights=False,
        use_rslora=rslora,
        fan_in_fan_out=name == "gpt2",
    )
    with_it = peft.get_peft_model(model, settings).eval()
    with_it.save_pretrained(tmp_path)
    want = torch_logits(with_it)
    adapter, scale = load_adapter(tmp_path, config)
    assert scale == pytest.approx(12 / (3**0.5 if rslora else 3))
    assert close(logits(config, lora.apply(params, adapter, scale)), want)
    assert not close(base, want)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_written_for_peft(name, tmp_path):
    config, params, model = pair(name)
    select = lora.LINEAR if name != "phi3" else r".*/(q|v|o|up)/kernel"
    adapter = lora.init(jax.random.key(1), params, 2, select)
    adapter = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.3, adapter
    )
    save_adapter(tmp_path, adapter, 1.5, config)
    want = logits(config, lora.apply(jax.tree.map(jnp.asarray, params), adapter, 1.5))
    got = torch_logits(peft.PeftModel.from_pretrained(model, tmp_path).eval())
    assert close(got, want)
    assert not close(logits(config, params), want)
    again, scale = load_adapter(tmp_path, config)
    assert close(logits(config, lora.apply(params, again, scale)), want)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}]
)
def test_other_kinds_are_refused(change, tmp_path):
    config, _, model = pair("llama")
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], **change)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(change))):
        load_adapter(tmp_path, config)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _, _, model = pair("gpt2")
    settings = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no LoRA factor of a kernel of this llama"):
        load_adapter(tmp_path, pair("llama")[0])


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_what_both_read(name):
    config, params, model = pair(name)
    assert close(logits(config, params), torch_logits(model))
