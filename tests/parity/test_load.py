"""Folders both ways: what we save loads in torch, what torch saves loads here."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_model import model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from collab_jax.io.load import load, save
from collab_jax.io.tokenizer import encode

pytestmark = pytest.mark.filterwarnings("default")  # what torch and its friends warn of
IDS = [[72, 3, 200, 17, 17, 44, 101]]


def logits(model) -> np.ndarray:
    backbone = model.backbone
    x = backbone.embed(model.params, jnp.array(IDS))
    features, _ = backbone.features(model.params, None, x)
    return np.asarray(backbone.unembed(model.params, features.hidden))


def close(found: np.ndarray, torch_model) -> None:
    with torch.no_grad():
        expected = torch_model.eval()(torch.tensor(IDS)).logits.numpy()
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("size", [5_000_000_000, 3000])
def test_torch_loads_what_we_save(tmp_path, size):
    ours = model()
    folder = save(ours, tmp_path / "model", max_shard_size=size)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    close(logits(ours), theirs)
    assert theirs.generation_config.eos_token_id == 257
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text == "[user]hi[answer]"
    assert tokenizer("the").input_ids == encode(ours.tokenizer, ["the"])[0]


@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_we_load_what_torch_saves(tmp_path, size):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    model().tokenizer.save_pretrained(tmp_path)
    ours = load(tmp_path)
    close(logits(ours), theirs)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model().tokenizer.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").params["norm"]["scale"].dtype == jnp.bfloat16
