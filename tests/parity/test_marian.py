"""Marian beside torch transformers: logits, searches, and folders of both."""

import shutil

import jax
import marians
import numpy as np
import pytest

from collab_jax import beam, decode
from collab_jax.io.marian import load_translator, save_translator
from collab_jax.models.marian_config import from_hf, to_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

KEY = jax.random.key(0)


def reference(made, raw):
    """The model in torch, with the weights of `marians.tensors`."""
    config = transformers.MarianConfig(**raw, forced_eos_token_id=None)
    config._attn_implementation = "eager"
    model = transformers.MarianMTModel(config).eval()
    state = {k: torch.tensor(v) for k, v in marians.tensors(made).items()}
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    tied = ("embed_positions.weight", "embed_tokens.weight", "lm_head.weight")
    assert all(key.endswith(tied) for key in left.missing_keys), left.missing_keys
    model.tie_weights()
    return model


def arguments(made):
    """The sources as torch takes them."""
    tokens, length = marians.sources(made)
    real = np.arange(tokens.shape[1]) < length[:, None]
    ids = torch.tensor(np.where(real, tokens, made.pad)).long()
    return {"input_ids": ids, "attention_mask": torch.tensor(real).long()}


def logits(model, made):
    """Of the texts of `marians.texts`, `[3, 8, V]`."""
    text = torch.tensor(marians.texts(made)).long()
    with torch.no_grad():
        return model(**arguments(made), decoder_input_ids=text).logits.numpy()


def search(model, made, beams):
    """New tokens `[3, NEW]`, -1 behind their end, and the scores where there are."""
    found = model.generate(
        **arguments(made),
        do_sample=False,
        num_beams=beams,
        max_new_tokens=marians.NEW,
        length_penalty=1.0,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = found.sequences[:, 1:].numpy()
    out = np.full((len(marians.LENGTHS), marians.NEW), -1, np.int32)
    for row, text in enumerate(new):
        ends = np.flatnonzero(np.isin(text, made.eos))
        size = ends[0] + 1 if len(ends) else len(text)
        out[row, :size] = text[:size]
    return out, found.sequences_scores.numpy() if beams > 1 else None


def read(model, made):
    """Our logits of the same texts."""
    text, own = marians.texts(made), (model.params, *marians.sources(made))
    state = model.lm.init(own, *text.shape)
    return np.asarray(jax.jit(model.lm.extend)(own, state, text)[0].logits)


def new_tokens(result):
    at = np.arange(result.tokens.shape[1])
    kept = at < np.asarray(result.length)[:, None]
    return np.where(kept, result.tokens, -1)[:, 1:]


@pytest.mark.parametrize("name", marians.CASES)
def test_a_folder_of_torch(name, tmp_path):
    """Written by torch in both formats, read here; logits, greedy and beams."""
    made = marians.config(name)
    torch_model = reference(made, marians.CASES[name])
    torch_model.save_pretrained(tmp_path / "safe")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tmp_path / "safe" / "config.json", pickled)
    torch.save(torch_model.state_dict(), pickled / "pytorch_model.bin")
    want = logits(torch_model, made)
    model = load_translator(tmp_path / "safe")
    assert model.config == made
    for folder in (model, load_translator(pickled)):
        assert abs(read(folder, made) - want).max() <= 1e-5 * want.std()
    own = (model.params, *marians.sources(made))
    prompts = decode.pad([[made.start]] * len(marians.LENGTHS))
    for beams in (1, marians.BEAMS):
        decoder = (
            decode.greedy(model.lm, marians.NEW, eos=made.eos)
            if beams == 1
            else beam.search(model.lm, marians.NEW, beams, eos=made.eos)
        )
        result = decode.run(decoder, own, *prompts, KEY)
        theirs, scores = search(torch_model, made, beams)
        np.testing.assert_array_equal(new_tokens(result), theirs)
    np.testing.assert_allclose(result.info.beams.score[:, 0], scores, rtol=1e-4)


@pytest.mark.parametrize("name", marians.CASES)
def test_a_folder_of_ours(name, tmp_path):
    made = marians.config(name)
    torch_model = reference(made, marians.CASES[name])
    torch_model.save_pretrained(tmp_path / "given")
    model = load_translator(tmp_path / "given")
    folder = save_translator(model, tmp_path / "saved")
    again = transformers.MarianMTModel.from_pretrained(folder).eval()
    np.testing.assert_allclose(
        logits(again, made), logits(torch_model, made), atol=1e-5
    )
    whole = transformers.MarianConfig(**to_hf(made)).to_dict()
    assert from_hf(whole) == made
