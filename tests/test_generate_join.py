"""`collab-jax generate` with several models as one, on tiny models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import generate, refused, run
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from collab_jax.commands.joining import spread

PROMPTS = "--prompt", "the cat sat the cat", "--prompt", "a"
FLAGS = *PROMPTS, "--max-new-tokens", 12


def copied(folder, path, change=lambda tensors: tensors):
    """A copy of a model with other weights."""
    shutil.copytree(folder, path)
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """A model of the same tokenizer, with another template of chats."""
    rng = np.random.default_rng(0)

    def change(tensors):
        return {
            name: x + np.float32(0.3) * rng.standard_normal(x.shape, np.float32)
            for name, x in tensors.items()
        }

    path = copied(tiny, tmp_path_factory.mktemp("other") / "model", change)
    for file in path.glob("*.jinja"):
        file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return str(path)


@pytest.fixture(scope="module")
def permuted(tiny, tmp_path_factory):
    """The same model, whose tokens have other numbers."""
    path = tmp_path_factory.mktemp("permuted") / "model"
    order = np.random.default_rng(1).permutation(256)  # the special tokens stay
    whole = np.concatenate([order, [256, 257]])

    def change(tensors):
        return {
            name: np.ascontiguousarray(x[whole]) if x.shape[0] == 258 else x
            for name, x in tensors.items()
        }

    copied(tiny, path, change)
    file = path / "tokenizer.json"
    state = json.loads(file.read_text())
    known = {i: token for token, i in state["model"]["vocab"].items()}
    state["model"]["vocab"] = {known[int(old)]: new for new, old in enumerate(order)}
    Tokenizer.from_str(json.dumps(state)).save(str(file))
    return str(path)


def tokens(records):
    return [record["tokens"] for record in records]


def texts(records):
    return [record["text"] for record in records]


def test_lists_of_values_are_spread():
    given = ["a", "--ensemble", "b", "c", "--weights", "1", "2", "--chat", "--", "-x"]
    assert spread(given) == [
        "a", "--ensemble", "b", "--ensemble", "c", "--weights", "1", "--weights", "2",
        "--chat", "--", "-x",
    ]  # fmt: skip
    assert spread(["--ensemble"]) == ["--ensemble"]


def test_joins_that_change_nothing(tiny, other):
    plain = generate(tiny, *FLAGS)
    for flags in (
        ("--ensemble", tiny, tiny),
        (tiny, "--ensemble", other, "--weights", 1, 0),
        (tiny, "--contrast", other, "--strength", 0),
        (tiny, "--proxy", other, other),
    ):
        found = generate(*flags, *FLAGS)
        assert tokens(found) == tokens(plain), flags
    # the controls: members that do count
    second = generate(other, *FLAGS)
    found = generate(tiny, "--ensemble", other, "--weights", 0, 1, *FLAGS)
    assert tokens(found) == tokens(second) != tokens(plain)
    for flags in ("--contrast", other), ("--proxy", other, tiny):
        assert tokens(generate(tiny, *flags, *FLAGS)) != tokens(plain)


def test_a_join_is_searched_by_beams(tiny, other):
    flags = *FLAGS, "--beams", 2
    plain = generate(tiny, *flags)
    given = tiny, "--ensemble", other, "--weights"
    assert tokens(generate(*given, 1, 0, *flags)) == tokens(plain)
    assert tokens(generate(*given, 0, 1, *flags)) == tokens(generate(other, *flags))
    assert tokens(plain) != tokens(generate(other, *flags))


def test_a_context_stands_before_the_prompt(tiny):
    flags = "--max-new-tokens", 10
    inside = generate(tiny, "--prompt", "dogs\n\nthe cat", *flags)
    without = generate(tiny, "--prompt", "the cat", *flags)
    given = tiny, "--prompt", "the cat", *flags, "--context", "dogs", "--strength"
    assert tokens(generate(*given, 0)) == tokens(inside) != tokens(without)
    assert tokens(generate(*given, -1)) == tokens(without)
    assert tokens(generate(*given, 3)) != tokens(inside)


def test_every_member_has_its_own_template(tiny, other):
    flags = *FLAGS, "--chat", "--ensemble", tiny, other
    for weights, source in ((1, 0), tiny), ((0, 1), other):
        plain = generate(source, *FLAGS, "--chat")
        found = generate(*flags, "--weights", *weights)
        assert tokens(found) == tokens(plain)
    first = generate(*flags)
    streamed = run("generate", *flags[2:], "--stream")
    assert streamed.exit_code == 0, streamed.stderr
    assert streamed.stdout == first[1]["text"] + "\n"


@pytest.mark.parametrize(
    "bridge", ["union", "unite", "exact", "mined", "eva", "deepen"]
)
def test_a_bridge_to_the_same_tokens_changes_nothing(tiny, permuted, bridge):
    plain = generate(tiny, *FLAGS)
    found = generate(tiny, "--ensemble", permuted, "--bridge", bridge, *FLAGS)
    assert texts(found) == texts(plain)
    assert tokens(found) == tokens(plain)  # the first member's numbers
    # the control: read as if the numbers meant the same
    shuffled = generate(permuted, *FLAGS)
    assert tokens(shuffled) != tokens(plain)


def test_a_join_is_the_target_of_drafts(tiny, other, permuted):
    for flags in (
        (tiny, "--ensemble", other),
        (tiny, "--context", "dogs"),
        (tiny, "--ensemble", permuted),
    ):
        plain = generate(*flags, *FLAGS)
        found = generate(*flags, *FLAGS, "--draft", "ngram", "--draft-length", 3)
        assert tokens(found) == tokens(plain), flags
    # a drafting model reads the prompt that the members read apart
    flags = tiny, "--context", "dogs"
    plain = generate(*flags, *FLAGS)
    for draft in tiny, permuted:
        found = generate(*flags, *FLAGS, "--draft", draft, "--draft-length", 3)
        assert tokens(found) == tokens(plain)
        assert sum(x["accepted"] for x in found) > 0


def test_a_run_goes_on_only_with_the_same_members(tiny, other, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n')
    flags = "--input", source, "--output", output, "--max-new-tokens", 4
    assert run("generate", tiny, "--ensemble", other, *flags).exit_code == 0
    assert Path(output).exists()
    again = run("generate", tiny, *flags)
    assert again.exit_code == 2
    assert "join" in again.stderr


def test_bad_flags(tiny, other, permuted):
    one = "generate", tiny, "--prompt", "a"
    assert "--weights goes with --ensemble" in refused(*one, "--weights", 1)
    assert "--bridge goes with --ensemble" in refused(*one, "--bridge", "eva")
    assert "--strength goes with" in refused(*one, "--strength", 1)
    assert "--ensemble goes without --context" in refused(
        *one, "--ensemble", other, "--context", "x"
    )
    assert "3 --weights for 2 members" in refused(
        *one, "--ensemble", other, "--weights", 1, 2, 3
    )
    assert "not all 0" in refused(*one, "--ensemble", other, "--weights", 0, 0)
    assert "two models at least" in refused(
        "generate", "--ensemble", tiny, "--prompt", "a"
    )
    assert "--context wants a text" in refused(*one, "--context", " ")
    assert "Missing argument 'SOURCE'" in refused("generate", "--prompt", "a")
    assert "another tokenizer" in refused(*one, "--contrast", permuted)
    # a union is told of before it is refused
    result = run(*one, "--ensemble", permuted, "--draft", tiny)
    assert result.exit_code == 2
    assert "those of a union" in result.stderr.splitlines()[-1]
