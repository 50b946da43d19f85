"""What is said about models that differ."""

import json

import pytest
from small_tokenizers import first, second, third, write_llama

from collab_jax.io.compatible import Facts, check_models, read_facts

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def facts(name, **change):
    return Facts(name, LLAMA | change)


CHANGES = {
    "model_type": ({"model_type": "qwen2"}, "wrong"),
    "hidden_size": ({"hidden_size": 32, "head_dim": 4}, "wrong"),
    "num_attention_heads": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        "wrong",
    ),
    "num_key_value_heads": ({"num_key_value_heads": 2}, "wrong"),
    "head_dim": ({"head_dim": 8}, "wrong"),
    "num_hidden_layers": ({"num_hidden_layers": 3}, "wrong"),
    "activation": ({"hidden_act": "gelu"}, "wrong"),
    "rope_theta": ({"rope_theta": 5e5}, "wrong"),
    "rope_scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "wrong"),
    "vocab_size": ({"vocab_size": 9}, "wrong"),
    "norm_eps": ({"rms_norm_eps": 1e-5}, "suspicious"),
    "tie_word_embeddings": ({"tie_word_embeddings": True}, "suspicious"),
    "dtype": ({"torch_dtype": "bfloat16"}, "suspicious"),
    "eos_token_id": ({"eos_token_id": 2}, "suspicious"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_one_difference(key):
    """One line, with its weight, its key, and both values."""
    change, weight = CHANGES[key]
    lines = check_models([facts("a"), facts("b", **change)])
    assert len(lines) >= 1
    [line] = [x for x in lines if f": {key}: " in x]
    assert line.startswith(f"{weight}: {key}: a ")
    assert ", b " in line
    if key != "model_type":  # which brings other defaults
        assert lines == [line]


SAME = [
    ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 1e4}}),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    ),
    ({"torch_dtype": "float16"}, {"dtype": "float16"}),
    ({"num_key_value_heads": 4}, {}),
    ({"head_dim": 4}, {"head_dim": None}),
    ({"hidden_act": "silu"}, {}),
    ({"rms_norm_eps": 1e-6}, {}),
    ({"tie_word_embeddings": False}, {}),
]


@pytest.mark.parametrize(("one", "two"), SAME)
def test_other_spellings_are_no_difference(one, two):
    """Defaults left out, and the keys of transformers 4 and 5."""
    assert check_models([facts("a", **one), facts("b", **two)]) == []


def test_gpt2_has_other_names():
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2}
    one = Facts("a", {"model_type": "gpt2", **sizes})
    two = Facts("b", {"model_type": "gpt2", **sizes, "n_head": 4})
    keys = [line.split(": ")[1] for line in check_models([one, two])]
    assert keys == ["num_attention_heads", "num_key_value_heads", "head_dim"]


def test_tokens():
    """Moved tokens and clashing ids are wrong; tokens of one model alone are not."""
    mine = {"x": 0, "y": 1, "z": 2}
    one = facts("a")._replace(tokens=mine)

    def lines(yours):
        return check_models([one, facts("b")._replace(tokens=yours)])

    assert lines(dict(mine)) == []
    [moved] = lines({"x": 1, "y": 0, "z": 2})
    assert moved.startswith("wrong: token ids: a 'x' is 0, b 'x' is 1; 2 tokens have")
    [clash] = lines({"x": 0, "y": 1, "w": 2})
    assert clash.startswith("wrong: token ids: a 2 is 'z', b 2 is 'w'; 1 ids stand")
    [more] = lines(mine | {"w": 3})
    assert more.startswith("suspicious: tokens: a 0 of its own, b 1 of its own")
    [unknown] = check_models([one, facts("b")])
    assert unknown.startswith("suspicious: tokens: a 3, b none")


def test_special_tokens_go_by_their_names():
    """The same token at another place is told once, as a token that moved."""
    one = facts("a", eos_token_id=1)._replace(tokens={"x": 0, "</s>": 1})
    two = facts("b", eos_token_id=0)._replace(tokens={"x": 1, "</s>": 0})
    [line] = check_models([one, two])
    assert line.startswith("wrong: token ids")
    three = facts("c", eos_token_id=[0, 1])._replace(tokens={"x": 0, "</s>": 1})
    [line] = check_models([one, three])
    assert line.startswith("suspicious: eos_token_id: a </s>, c </s> x")


def test_folders(tmp_path):
    """From what is on disk; each model is compared with the first."""
    made = {"a": first(), "b": second(), "c": first(), "d": third()}
    for name, tokenizer in made.items():
        write_llama(tmp_path / name, tokenizer)
    found = {name: read_facts(name, tmp_path / name) for name in made}
    assert check_models([found["a"], found["c"]]) == []
    lines = check_models([found["a"], found["b"], found["d"]])
    assert all(line.startswith(("wrong: ", "suspicious: ")) for line in lines)
    assert not any("\n" in line for line in lines)
    keys = [line.split(": ")[1] for line in lines if "b " in line.split(";")[0]]
    assert keys[:2] == ["vocab_size", "token ids"]
    assert "chat_template" in keys
    own = [line for line in check_models([found["c"], found["b"]]) if "wrong" in line]
    assert own[0].startswith("wrong: vocab_size: c 7, b 9; set tokenizer: {source:")


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m: .* holds no config\.json"):
        read_facts("m", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"m: a file of .* is damaged"):
        read_facts("m", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.json").write_text("{")
    assert read_facts("m", tmp_path).tokens is None


def test_nothing_to_compare():
    assert check_models([]) == check_models([facts("a")]) == []
