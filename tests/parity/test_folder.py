"""The folder of a merge against mergekit's, and loaded by torch."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_tokenizers import first, second, write_llama
from transformers import AutoModelForCausalLM

from collab_jax.io.folder import Shape, describe
from collab_jax.io.rows import align
from collab_jax.io.tokenizer import load_tokenizer
from collab_jax.io.vocabulary import Member, Wish, vocabulary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # mergekit still reads numpy.core
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["abc", "a hello cd</s>", "<s>xab<pad>dba"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"a": first(), "b": second()}
    return {n: Path(write_llama(root / n, t, ord(n))) for n, t in made.items()}


def theirs(out, folders, **keys):
    """The folder that mergekit writes."""
    config = {"base_model": str(folders["a"]), "dtype": "float32", **keys}
    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return out


def arithmetic(folders):
    models = [{"model": str(folders["b"]), "parameters": {"weight": 0.5}}]
    return {"merge_method": "task_arithmetic", "models": models}


def read(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("source", ["union", "base", "b"])
@pytest.mark.parametrize("template", [None, "chatml", "mistral"])
def test_same_as_theirs(tmp_path, folders, source, template):
    """Sizes, what texts are cut into, and what a chat becomes."""
    keys = arithmetic(folders) | {"tokenizer_source": source}
    keys["tokenizer_source"] = str(folders.get(source, source))
    if template:
        keys["chat_template"] = template
    want = theirs(tmp_path / "theirs", folders, **keys)
    members = [Member(n, f, len(load_tokenizer(f))) for n, f in folders.items()]
    made = vocabulary(members, "a", Wish(source))
    out = tmp_path / "ours"
    out.mkdir()
    describe(out, folders, "a", Shape(), "", "", made, template)
    for key in ("vocab_size", "num_hidden_layers", "dtype", "tie_word_embeddings"):
        assert read(out)[key] == read(want)[key]
    ours, their = load_tokenizer(out), load_tokenizer(want)
    for text in TEXTS:
        have, expected = (
            t.convert_ids_to_tokens(t(text).input_ids) for t in (ours, their)
        )
        assert have == expected
    chat = [{"role": r, "content": r} for r in ("user", "assistant", "user")]
    said = [
        t.apply_chat_template(chat, tokenize=False, bos_token="<s>", eos_token="</s>")
        for t in (ours, their)
    ]
    assert said[0] == said[1]


def test_auto_counts_the_merged_models(tmp_path, folders):
    """Not the one that the tokenizer alone is from; spaces around a template go."""
    named = {}
    for name, template in {
        "m": "2",
        "n": " {{ 1 }}\n",
        "k": "{{ 1 }}",
        "x": "2",
    }.items():
        made = first()
        made.chat_template = template
        named[name] = Path(write_llama(tmp_path / name, made, ord(name)))
    models = [{"model": str(named[n]), "parameters": {"weight": 0.5}} for n in "nk"]
    keys = {"merge_method": "task_arithmetic", "models": models}
    keys |= {"base_model": str(named["m"]), "tokenizer_source": str(named["x"])}
    want = theirs(tmp_path / "theirs", folders, **keys, chat_template="auto")
    members = [Member(n, f, len(load_tokenizer(f))) for n, f in named.items()]
    made = vocabulary(members, "m", Wish("x"))
    said = []
    for counted in ("mnk", None):
        out = tmp_path / f"ours {counted}"
        out.mkdir()
        describe(out, named, "m", Shape(), "", "", made, "auto", counted)
        said.append(load_tokenizer(out).chat_template)
    assert said[0] == load_tokenizer(want).chat_template == "{{ 1 }}"
    assert said[1] == "2"  # the control: all that are named


def test_their_special_tokens_are_left_behind(tmp_path, folders):
    """A quirk: under another tokenizer mergekit keeps the donor's ids. Ours move."""
    keys = arithmetic(folders) | {"tokenizer_source": str(folders["b"])}
    want = theirs(tmp_path / "theirs", folders, **keys)
    members = [Member(n, f, len(load_tokenizer(f))) for n, f in folders.items()]
    out = tmp_path / "ours"
    out.mkdir()
    describe(out, folders, "a", Shape(), "", "", vocabulary(members, "a", Wish("b")))
    end = load_tokenizer(out).convert_tokens_to_ids("</s>")
    assert read(out)["eos_token_id"] == end == 8
    assert read(want)["eos_token_id"] == 6


def test_stacked_layers(tmp_path, folders):
    slices = [(0, 2), (1, 2)]
    keys = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(folders["a"]), "layer_range": list(span)}]}
            for span in slices
        ],
    }
    want = read(theirs(tmp_path / "theirs", folders, **keys))
    layers = [("a", i) for start, end in slices for i in range(start, end)]
    out = tmp_path / "ours"
    out.mkdir()
    describe(out, folders, "a", Shape(layers), "", "")
    assert read(out)["num_hidden_layers"] == want["num_hidden_layers"] == 3


@pytest.mark.parametrize("pad", [None, 16])
def test_torch_loads_a_union(tmp_path, folders, pad):
    """Weights through `align`, files through `describe`: torch generates."""
    members = [Member(n, f, len(load_tokenizer(f))) for n, f in folders.items()]
    made = vocabulary(members, "a", Wish("union", {}, pad))
    inputs = {n: load_file(f / "model.safetensors") for n, f in folders.items()}
    tensors = {}
    for name in inputs["a"]:
        both = {n: x[name] for n, x in inputs.items()}
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            both = align(made.rows, both)
        tensors[name] = (both["a"] + both["b"]) / np.float32(2)
    describe(tmp_path, folders, "a", Shape(dtype="float32"), "", "", made)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert model.get_input_embeddings().weight.shape[0] == made.rows.padded
    tokenizer = load_tokenizer(tmp_path)
    given = torch.tensor([tokenizer("abhello").input_ids])
    out = model.generate(given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert given.shape[1] < out.shape[1] <= given.shape[1] + 4
    own = inputs["b"]["model.embed_tokens.weight"][6]  # only b has this token
    row = model.get_input_embeddings().weight[made.tokens["hello"]]
    np.testing.assert_allclose(row.detach().numpy(), own, rtol=1e-6)
