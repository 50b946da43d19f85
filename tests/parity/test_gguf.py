"""GGUF files as transformers itself reads them, tensor by tensor and by logits."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from gguf_files import FAMILIES, llama_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from collab_jax import decode
from collab_jax.io import canonical, gguf, hub
from collab_jax.io.load import Model, load
from collab_jax.io.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # what torch and its friends warn of
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n",
    "Die Würde des Menschen ist unantastbar. 人类的尊严不可侵犯。",
]
NUMBERS = [
    "In 1969,  3 men",
    "x = 12\n    y = 5",
    "a  1 b   23 ",
    "555-1234",
    "٣٤ and 3.14159",
]


@pytest.fixture
def alone(tmp_path):
    """A file in a folder of its own: transformers sees nothing that we wrote."""

    def link(name: str) -> Path:
        path = tmp_path / hub.MODELS[name].file
        path.symlink_to(hub.fetch(name) / path.name)
        return path

    return link


def reference(path: Path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def compare_tensors(model: Model, torch_model) -> None:
    ours = dict(canonical.save_tree(model.config, model.params))
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


def logit_errors(model: Model, torch_model, texts: list[list[int]]) -> list[float]:
    """Of each text, the largest |difference| in standard deviations of the logits."""

    @jax.jit
    def read(params, tokens):
        backbone = model.backbone
        features, _ = backbone.features(params, None, backbone.embed(params, tokens))
        return backbone.unembed(params, features.hidden)

    tokens, _ = decode.pad(texts)
    found = np.asarray(read(model.params, tokens))
    errors = []
    for row, ids in enumerate(texts):
        with torch.no_grad():
            expected = torch_model(torch.tensor([ids])).logits[0].numpy()
        gap = np.abs(found[row, : len(ids)] - expected).max()
        errors.append(float(gap / expected.std()))
    return errors


@pytest.mark.parametrize("architecture", FAMILIES)
def test_small_files(tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("COLLAB_JAX_CACHE", str(tmp_path / "cache"))
    path, _ = llama_file(tmp_path, architecture)
    model, torch_model = load(path), reference(path)
    compare_tensors(model, torch_model)
    ids = np.random.default_rng(0).integers(0, 250, 20).tolist()
    assert max(logit_errors(model, torch_model, [ids])) < 1e-4


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_files(name, alone):
    path = alone(name)
    model, torch_model = load(hub.fetch(name) / path.name), reference(path)
    compare_tensors(model, torch_model)
    texts = [model.tokenizer(text).input_ids for text in TEXTS]
    assert max(logit_errors(model, torch_model, texts)) < 1e-4


@pytest.mark.real
def test_tokens_of_gemma_are_those_of_transformers(alone):
    path = alone("gemma-3-270m")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(hub.fetch("gemma-3-270m"))
    for text in [*TEXTS, *NUMBERS]:
        assert ours(text).input_ids == theirs(text).input_ids


@pytest.mark.real
def test_tokens_of_smollm2_are_those_of_its_pre_tokenizer(alone):
    """Every digit stands alone, which transformers leaves out when it reads a file.

    Where a text is cut at its digits beforehand, its tokens are ours.
    """
    path = alone("smollm2-135m-instruct")
    stated = gguf.open_file(path).metadata
    merges = stated["tokenizer.ggml.merges"]
    assert stated["tokenizer.ggml.pre"] == "smollm"
    assert not any(re.search("[0-9]", merge) for merge in merges)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(hub.fetch("smollm2-135m-instruct"))
    for text in [*TEXTS, *NUMBERS]:
        pieces = [piece for piece in re.split(r"(\d)", text) if piece]
        expected = [i for piece in pieces for i in theirs(piece).input_ids]
        assert ours(text).input_ids == expected
    assert any(ours(t).input_ids != theirs(t).input_ids for t in NUMBERS)
