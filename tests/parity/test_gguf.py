"""GGUF files as transformers itself reads them, tensor by tensor and by logits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf_files import FAMILIES, llama_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from collab_jax.io import hub, names
from collab_jax.io.load import Model, load

pytestmark = pytest.mark.filterwarnings("default")  # what torch and its friends warn of
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n",
    "Die Würde des Menschen ist unantastbar. 人类的尊严不可侵犯。",
]


def reference(path: Path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def compare_tensors(model: Model, torch_model) -> None:
    ours = dict(names.save_tree(model.config, model.params))
    theirs = torch_model.state_dict()
    for name, tensor in ours.items():
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            number, part = after.split(".")[:2]
            fused = {"down_proj": "down_proj"}.get(part, "gate_up_proj")
            whole = theirs[f"{before}.experts.{fused}"][int(number)]
            if fused == "gate_up_proj":
                whole = whole.chunk(2)[part == "up_proj"]
            expected = whole.numpy()
        else:
            expected = theirs[name].numpy()
        np.testing.assert_array_equal(tensor, expected, name)


def compare_logits(model: Model, torch_model, ids: list[int]) -> float:
    with torch.no_grad():
        expected = torch_model(torch.tensor([ids])).logits[0].numpy()

    @jax.jit
    def read(params, tokens):
        backbone = model.backbone
        features, _ = backbone.features(params, None, backbone.embed(params, tokens))
        return backbone.unembed(params, features.hidden)

    found = np.asarray(read(model.params, jnp.array([ids])))[0]
    return float(np.abs(found - expected).max() / expected.std())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_small_files(tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("COLLAB_JAX_CACHE", str(tmp_path / "cache"))
    path, _ = llama_file(tmp_path, architecture)
    model, torch_model = load(path), reference(path)
    compare_tensors(model, torch_model)
    ids = np.random.default_rng(0).integers(0, 250, 20).tolist()
    assert compare_logits(model, torch_model, ids) < 1e-4


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_files(name):
    path = hub.fetch(name) / hub.MODELS[name].file
    model, torch_model = load(path), reference(path)
    compare_tensors(model, torch_model)
    for text in TEXTS:
        assert (
            compare_logits(model, torch_model, model.tokenizer(text).input_ids) < 1e-4
        )


@pytest.mark.real
def test_tokens_of_gemma_are_those_of_transformers():
    path = hub.fetch("gemma-3-270m") / hub.MODELS["gemma-3-270m"].file
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer_of("gemma-3-270m")
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids


def load_tokenizer_of(name: str):
    from collab_jax.io.tokenizer import load_tokenizer

    return load_tokenizer(hub.fetch(name))
