"""The files beside the weights of a merge's result."""

import json
import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from small_tokenizers import first, second, third, write_llama

from collab_jax.io.card import METHODS, card
from collab_jax.io.described import Change, result_config, result_generation
from collab_jax.io.folder import Shape, describe, donor
from collab_jax.io.templates import TEMPLATES, choose_template, read_template
from collab_jax.io.tokenizer import load_tokenizer
from collab_jax.io.vocabulary import Member, Wish, vocabulary

RECIPE = "merge_method: linear  # as it was written\nmodels: []\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with unlike tokenizers, and files of all sorts in the first."""
    root = tmp_path_factory.mktemp("models")
    made = {"a": first(), "b": second()}
    found = {n: Path(write_llama(root / n, t, ord(n))) for n, t in made.items()}
    generation = {"eos_token_id": [6, 3], "temperature": 0.5}
    (found["a"] / "generation_config.json").write_text(json.dumps(generation))
    for name in ("LICENSE", "README.md", "notes.txt", "modeling_x.py", "vocab.json"):
        (found["a"] / name).write_text(f"the {name} of a")
    (found["a"] / "preprocessor_config.json").write_text("{}")
    return found


def members(folders):
    return [Member(n, f, len(load_tokenizer(f))) for n, f in folders.items()]


def written(out):
    return sorted(path.name for path in out.iterdir())


def read(out, name="config.json"):
    return json.loads((out / name).read_text())


def test_what_is_written(folders, tmp_path):
    """The donor's files, the recipe and the card; no code and no one else's card."""
    seen = []
    notes = describe(
        tmp_path,
        folders,
        "a",
        Shape(),
        RECIPE,
        lambda notes: seen.append(1) or "# card",
    )
    assert (notes, seen) == ([], [1])
    assert written(tmp_path) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert (tmp_path / "mergekit_config.yml").read_text() == RECIPE
    assert (tmp_path / "README.md").read_text() == "# card"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folders["a"] / name).read_bytes()
    assert read(tmp_path) == read(folders["a"])
    generation = "generation_config.json"
    assert read(tmp_path, generation) == read(folders["a"], generation)


def test_links_are_followed(folders, tmp_path):
    """The cache of the Hub holds links, which would dangle elsewhere."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folders["a"].iterdir():
        (linked / path.name).symlink_to(path)
    out = tmp_path / "out"
    out.mkdir()
    describe(out, {"a": linked}, "a", Shape(), RECIPE, "")
    assert not any(path.is_symlink() for path in out.iterdir())


def test_code_comes_with_a_note(folders, tmp_path):
    source, out = tmp_path / "coded", tmp_path / "out"
    out.mkdir()
    write_llama(source, first(), auto_map={"AutoModel": "modeling_x.X"})
    (source / "modeling_x.py").write_text("")
    [note] = describe(out, {"m": source}, "m", Shape(), RECIPE, "")
    assert "modeling_x.py" in note
    assert "trust_remote_code" in note
    assert "modeling_x.py" in written(out)


def test_union(folders, tmp_path):
    """A new vocabulary: its size, its files, the ids of special tokens."""
    made = vocabulary(members(folders), "b", Wish("union", {}, 16))
    notes = describe(tmp_path, folders, "a", Shape(), RECIPE, "", made)
    config = read(tmp_path)
    tokens = load_tokenizer(tmp_path).get_vocab()
    assert tokens == made.tokens
    assert config["vocab_size"] == 16
    assert config["bos_token_id"] == tokens["<s>"] == 11
    assert config["eos_token_id"] == tokens["</s>"] == 8
    assert config["pad_token_id"] is None
    generation = read(tmp_path, "generation_config.json")
    assert generation == {"eos_token_id": [8, 2], "temperature": 0.5}  # </s> and c
    assert notes == []
    settings = read(tmp_path, "tokenizer_config.json")
    assert not {"is_local", "local_files_only"} & settings.keys()
    assert read_template(tmp_path) == second().chat_template
    # the tokenizer of the vocabulary is as it was
    assert made.tokenizer.chat_template == second().chat_template


def test_special_tokens_that_are_gone(folders, tmp_path):
    """Another model's tokenizer lacks the donor's <s>; that is told."""
    made = vocabulary(members(folders), "a", Wish("b"))
    notes = describe(tmp_path, folders, "a", Shape(), RECIPE, "", made)
    config = read(tmp_path)
    assert config["vocab_size"] == 9
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 8)
    assert notes == ["config.json: bos_token_id 5 has no token in the new vocabulary"]
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        folders["b"] / "tokenizer.json"
    ).read_bytes()


def test_transformers_reads_it(folders, tmp_path):
    """config.json with another depth, type, and head; the torch model is in parity."""
    from transformers import AutoConfig

    layers = [("a", 0), ("b", 1), ("a", 1)]
    shape = Shape(layers, None, "bfloat16", True)
    describe(tmp_path, folders, "a", shape, RECIPE, "")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_hidden_layers == 3
    assert str(config.dtype).endswith("bfloat16")
    assert config.tie_word_embeddings is True


def test_the_donor_is_the_same_in_every_run():
    assert donor(["b", "c", "a"], None) == "b"
    assert donor(["b", "c", "a"], "a") == "a"


def test_lists_of_layers_follow_their_layers():
    one = {
        "num_hidden_layers": 3,
        "layer_types": ["x", "y", "z"],
        "mlp_only_layers": [1],
        "eos_token_id": [1, 2, 3],
        "first_k_dense_replace": 0,
    }
    two = one | {"layer_types": ["u", "v", "w"], "mlp_only_layers": []}
    layers = [(one, 0), (two, 1), (one, 1), (two, 2)]
    made, notes = result_config(one, Change(layers))
    assert made["num_hidden_layers"] == 4
    assert made["layer_types"] == ["x", "v", "y", "w"]
    assert made["mlp_only_layers"] == [2]
    assert made["eos_token_id"] == [1, 2, 3]
    assert notes == []
    assert one["layer_types"] == ["x", "y", "z"]  # the donor's own is left alone


def test_rules_of_the_index_are_told():
    one = {"n_layer": 2, "sliding_window_pattern": 6, "block_types": ["m", "a"]}
    other = {"n_layer": 2}
    made, notes = result_config(one, Change([(one, 1), (other, 1)]))
    assert made["block_types"] == ["m", "a"]
    assert "sliding_window_pattern = 6 goes by a layer's index" in notes[0]
    assert "block_types is missing from one of the models" in notes[1]
    whole, notes = result_config(one, Change([(one, 0), (one, 1)]))
    assert (whole, notes) == (one, [])
    begun, notes = result_config(one, Change([(one, 0)]))  # no layer has moved
    assert (begun["block_types"], notes) == (["m"], [])


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"max_window_layers": 28}, False),
        ({"max_window_layers": 1, "use_sliding_window": True}, True),
        ({"decoder_sparse_step": 1}, False),
        ({"decoder_sparse_step": 2}, True),
        ({"first_k_dense_replace": 1}, True),
        ({"sliding_window_pattern": 6, "layer_types": ["x", "y"]}, False),
    ],
)
def test_rules_that_tell_no_layers_apart(rule, told):
    """Every Qwen2 has a max_window_layers, and hardly one has windows."""
    one = {"num_hidden_layers": 2, **rule}
    _, notes = result_config(one, Change([(one, 1), (one, 0)]))
    assert bool(notes) == told


def test_the_text_part_of_a_larger_model():
    """Depth and vocabulary stand inside; the image token follows its text."""
    inner = {"num_hidden_layers": 2, "vocab_size": 9, "layer_types": ["a", "b"]}
    one = {
        "model_type": "seen",
        "text_config": inner | {"dtype": "float32"},
        "image_token_index": 4,
        "vision_config": {"num_hidden_layers": 7},
        "dtype": "float32",
    }
    change = Change([(one, 1)], 12, "bfloat16", False, {4: 11}.get)
    made, notes = result_config(one, change)
    text = {"num_hidden_layers": 1, "vocab_size": 12, "layer_types": ["b"]}
    assert made == {
        "model_type": "seen",
        "text_config": text | {"dtype": "bfloat16"},
        "image_token_index": 11,
        "vision_config": {"num_hidden_layers": 7},
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    assert notes == []


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_keeps_its_key(key):
    made, _ = result_config({key: "float32"}, Change(dtype="float16"))
    assert made == {key: "float16"}


def test_no_depth():
    with pytest.raises(ValueError, match="states no number of layers"):
        result_config({}, Change([({}, 0)]))


def test_generation_falls_back_to_the_new_tokenizer():
    change = Change(place={}.get, special={"eos_token_id": 8})
    assert result_generation({"eos_token_id": 3}, change) == ({"eos_token_id": 8}, [])
    change = Change(place={3: 5}.get, special={"eos_token_id": 8})
    made, notes = result_generation({"suppress_tokens": [3, 4]}, change)
    assert made == {"suppress_tokens": [5]}
    assert "suppress_tokens 4 has no token" in notes[0]


def conversation(*roles):
    return [{"role": role, "content": f"{role} says"} for role in roles]


SAID = {
    "alpaca": "system says\n\n### Instruction:\nuser says\n\n### Response:\n"
    "assistant says\n\n### Instruction:\nuser says\n\n### Response:\n",
    "chatml": "<|im_start|>system\nsystem says<|im_end|>\n<|im_start|>user\nuser says"
    "<|im_end|>\n<|im_start|>assistant\nassistant says<|im_end|>\n<|im_start|>user\n"
    "user says<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]system says[|endofturn|]\n[|user|]user says\n[|assistant|]"
    "assistant says[|endofturn|]\n[|user|]user says\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nsystem says<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nuser says<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nassistant says<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nuser says<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] system says\n\nuser says [/INST] assistant says</s>"
    " [INST] user says [/INST]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(folders, tmp_path, name):
    """Each known template, written into a folder and rendered from there."""
    describe(tmp_path, folders, "a", Shape(), RECIPE, "", chat_template=name)
    tokenizer = load_tokenizer(tmp_path)
    text = tokenizer.apply_chat_template(
        conversation("system", "user", "assistant", "user"),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == SAID[name]


def test_mistral_objects_to_two_of_a_kind(folders, tmp_path):
    describe(tmp_path, folders, "a", Shape(), RECIPE, "", chat_template="mistral")
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(Exception, match="must alternate"):
        tokenizer.apply_chat_template(conversation("user", "user"), tokenize=False)


def test_a_new_template_is_the_only_one(folders, tmp_path):
    """Older folders keep it in tokenizer_config.json, or in chat_template.json."""
    source, out = tmp_path / "old", tmp_path / "out"
    out.mkdir()
    write_llama(source, third())
    settings = read(source, "tokenizer_config.json") | {"chat_template": "old"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.json").write_text('{"chat_template": "older"}')
    assert read_template(source) == "old"
    wanted = "{% for m in messages %}{{ m.content }}{% endfor %}"
    describe(out, {"m": source}, "m", Shape(), RECIPE, "", chat_template=wanted)
    assert read_template(out) == load_tokenizer(out).chat_template == wanted
    assert "chat_template" not in read(out, "tokenizer_config.json")
    assert not (out / "chat_template.json").exists()


def test_auto_is_the_most_common(folders, tmp_path):
    a, b = folders["a"], folders["b"]
    one, two = first().chat_template, second().chat_template
    assert choose_template("auto", [a, b]) == one
    assert choose_template("auto", [b, a]) == two
    assert choose_template("auto", [a, b, b]) == two
    write_llama(tmp_path / "none", third())
    assert choose_template("auto", [tmp_path / "none", b]) == two
    assert choose_template("auto", [tmp_path / "none"]) is None


def test_one_of_several_named_templates(tmp_path):
    named = [{"name": n, "template": f"{n}!"} for n in ("tool_use", "default")]
    text = json.dumps({"chat_template": named})
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert read_template(tmp_path) == "default!"


def test_templates_that_are_none():
    with pytest.raises(ValueError, match="line 1 is no Jinja"):
        choose_template("{% for m in %}{{ m }}", [])
    with pytest.raises(ValueError, match="neither auto, alpaca"):
        choose_template("a plain text that is long enough", [])
    generation = "{% generation %}{{ messages }}{% endgeneration %}"
    assert choose_template(generation, []) == generation


def test_failures_come_before_files(folders, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        describe(out, {"m": empty}, "m", Shape(), RECIPE, "")
    (empty / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        describe(out, {"m": empty}, "m", Shape(), RECIPE, "")
    with pytest.raises(ValueError, match="chat_template"):
        describe(out, folders, "a", Shape(), RECIPE, "", chat_template="nil")
    assert written(out) == []


def test_card():
    recipe = "merge_method: ties\n# with a ``` in it\n"
    command = "collab-jax merge a.yml out --seed 7"
    models = ["org/base@v1", "./mine", "org/two+me/lora", "./mine"]
    text = card("mix", ["ties", "linear", "ties"], models, models[0], recipe, command,
                "0.1", 7, ["look here"])  # fmt: skip
    front = text.split("---\n")[1]
    assert front == (
        "base_model:\n- org/base\n- org/two\nlibrary_name: transformers\n"
        "tags:\n- merge\n- collab_jax\n- mergekit\n"
    )
    assert text.count("[TIES](https://arxiv.org/abs/2306.01708)") == 1
    assert "[org/base@v1](https://huggingface.co/org/base)" in text
    assert text.count("- `./mine`") == 1
    assert f"````yaml\n{recipe}````" in text
    assert f"```bash\n{command}\n```" in text
    assert "collab_jax 0.1, seed 7." in text
    assert text.endswith("## Notes\n\n- look here\n")


def test_a_card_without_seed_or_repositories():
    text = card("m", ["new_method"], ["./x"], None, "a: 1", "c", "0.1")
    assert text.startswith("---\nbase_model: []\n")
    assert "- new_method (`new_method`)" in text
    assert "collab_jax 0.1." in text
    assert "base model" not in text


def test_every_method_has_a_title():
    from collab_jax.merge.mergekit_table import TABLE

    assert METHODS.keys() == TABLE.keys()
    links = [source for _, source in METHODS.values() if source]
    assert all(
        re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{5}$|doi)", x) for x in links
    )


def test_the_fixture_is_a_model(folders):
    assert len(load_file(folders["a"] / "model.safetensors")) == 21
