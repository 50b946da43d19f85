"""Encoders against torch transformers: hidden states, poolers, sentence embeddings."""

import json

import encoders
import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from collab_jax.io.encoder import embed_texts, load_encoder
from collab_jax.io.hub import fetch
from collab_jax.models.encoder import encoder
from collab_jax.models.encoder_config import from_hf, to_hf


def reference(made, hf=None):
    """The same weights in torch."""
    hf = to_hf(made) if hf is None else hf
    config = AutoConfig.for_model(**hf)
    config._attn_implementation = "eager"
    model = AutoModel.from_config(config)
    state = {k: torch.tensor(v) for k, v in encoders.tensors(made).items()}
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all("pooler" in key or "position_ids" in key for key in left.missing_keys)
    return model.eval()


def torch_arguments(made, tokens, length, types=None):
    # RoBERTa numbers positions by what is not padding
    tokens = np.where(np.arange(tokens.shape[1]) < length[:, None], tokens, made.pad_id)
    arguments = {
        "input_ids": torch.tensor(tokens).long(),
        "attention_mask": torch.tensor(
            np.arange(tokens.shape[1]) < length[:, None]
        ).long(),
    }
    if types is not None and made.token_types:
        arguments["token_type_ids"] = torch.tensor(types).long()
    return arguments


def torch_sentences(hidden, length):
    """Mean pooling and normalisation as in sentence-transformers."""
    mask = (torch.arange(hidden.shape[1]) < torch.tensor(length)[:, None]).float()
    total = (hidden * mask[..., None]).sum(1)
    mean = total / mask.sum(1, keepdim=True).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1).numpy()


@pytest.mark.parametrize("name", encoders.CASES)
def test_family(name):
    made = encoders.config(name)
    model = reference(made, encoders.CASES[name][0])
    tokens, length, types = encoders.texts(made)
    taps = (*(f"hidden.{i}" for i in range(made.layers + 1)), "attention.2")
    mine, params = encoder(made, taps), encoders.params(made)
    with torch.no_grad():
        out = model(
            **torch_arguments(made, tokens, length, types),
            output_hidden_states=True,
            output_attentions=True,
        )
        plain = model(**torch_arguments(made, tokens, length)).last_hidden_state
    got = jax.jit(mine.features)(params, tokens, length, types)
    real = np.arange(tokens.shape[1]) < length[:, None]
    for i, want in enumerate(out.hidden_states):
        want = want.numpy()[real]
        have = np.asarray(got.taps[f"hidden.{i}"])[real]
        assert abs(have - want).max() <= 1e-4 * want.std(), i
    want = out.attentions[1].mean(1).numpy()[real]
    np.testing.assert_allclose(got.taps["attention.2"][real], want, atol=1e-5)
    if made.pooler:
        want = out.pooler_output.numpy()
        have = mine.summary(params, got.hidden)
        assert abs(np.asarray(have) - want).max() <= 1e-4 * want.std()
    want = torch_sentences(plain, length)
    have = np.asarray(mine.embed_sentences(params, tokens, length))
    assert abs(have - want).max() <= 1e-4 * want.std()


@pytest.mark.parametrize("name", encoders.CASES)
def test_a_written_config_makes_the_same_model(name):
    made = encoders.config(name)
    hf = json.loads(json.dumps(to_hf(made)))
    assert (
        type(AutoModel.from_config(AutoConfig.for_model(**hf))).__name__
        == (hf["architectures"][0])
    )
    whole = from_hf(AutoConfig.for_model(**hf).to_dict())
    assert vars(whole) == {**vars(made), "pooler": False}


TEXTS = [
    "A cat sits on the mat.",
    "",
    "Ein Satz auf Deutsch, mit Umlauten: äöü.",
    "数学は美しい。",
    "def f(x): return x ** 2",
    "The quick brown fox jumps over the lazy dog. " * 40,  # longer than is read
    "word",
]


@pytest.mark.real
def test_minilm():
    folder = fetch("minilm-l6-v2")
    model = load_encoder(folder)
    assert model.config.pooler
    assert model.tokenizer.model_max_length == 256
    torch_model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    length = batch["attention_mask"].sum(1).numpy()
    with torch.no_grad():
        hidden = torch_model(**batch).last_hidden_state
    features = jax.jit(model.encoder.features)
    got = features(model.params, batch["input_ids"].numpy(), length).hidden
    real = np.arange(hidden.shape[1]) < length[:, None]
    want = hidden.numpy()[real]
    assert abs(np.asarray(got)[real] - want).max() <= 1e-4 * want.std()
    want = torch_sentences(hidden, length)
    have = embed_texts(model, TEXTS, batch_size=3)
    assert abs(have - want).max() <= 1e-4 * want.std()
