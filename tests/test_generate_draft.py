"""`collab-jax generate --draft` as a user meets it, on a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import generate, refused, run
from safetensors.numpy import load_file, save_file

PROMPTS = "--prompt", "the cat sat the cat", "--prompt", "a"


@pytest.fixture(scope="module")
def smaller(tiny, tmp_path_factory):
    """A model with the same tokenizer whose laws are a little off."""
    folder = tmp_path_factory.mktemp("smaller") / "model"
    shutil.copytree(tiny, folder)
    rng = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    changed = {
        name: x + np.float32(0.03) * rng.standard_normal(x.shape, np.float32)
        for name, x in tensors.items()
    }
    save_file(changed, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("draft", ["ngram", "adaptive", "suffix", "model"])
def test_greedy_text_is_that_without_a_draft(tiny, smaller, draft):
    plain = generate(tiny, *PROMPTS, "--max-new-tokens", 24)
    source = smaller if draft == "model" else draft
    found = generate(tiny, *PROMPTS, "--max-new-tokens", 24, "--draft", source)
    assert [x["tokens"] for x in found] == [x["tokens"] for x in plain]
    assert [x["finish"] for x in found] == [x["finish"] for x in plain]
    np.testing.assert_allclose(
        [x["logprob"] for x in found], [x["logprob"] for x in plain], rtol=1e-4
    )
    assert sum(x["calls"] for x in found) < sum(len(x["tokens"]) for x in found)


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_gumbel_gives_the_samples_of_the_seed(tiny, smaller, draft):
    flags = [*PROMPTS, "--temperature", 0.7, "--top-p", 0.9, "--seed", 3]
    flags += ["--max-new-tokens", 16]
    plain = generate(tiny, *flags)
    source = smaller if draft == "model" else draft
    coupled = generate(tiny, *flags, "--draft", source, "--verify", "gumbel")
    assert [x["tokens"] for x in coupled] == [x["tokens"] for x in plain]
    # the control: another coupling has the same law, and other draws
    block = generate(tiny, *flags, "--draft", smaller, "--draft-length", 3)
    assert [x["tokens"] for x in block] != [x["tokens"] for x in plain]


def test_stop_strings_and_streams(tiny):
    flags = ["--prompt", "the cat sat", "--max-new-tokens", 20]
    (plain,) = generate(tiny, *flags)
    stop = plain["text"][5:7]
    (stopped,) = generate(tiny, *flags, "--stop", stop)
    (found,) = generate(tiny, *flags, "--stop", stop, "--draft", "ngram")
    assert found["text"] == stopped["text"]
    assert found["finish"] == "stop"
    streamed = run("generate", tiny, *flags, "--draft", "ngram", "--stream")
    assert streamed.exit_code == 0, streamed.stderr
    assert streamed.stdout == plain["text"] + "\n"


def test_the_worth_of_drafts_is_told(tiny):
    result = run("generate", tiny, *PROMPTS, "--max-new-tokens", 8, "--draft", "ngram")
    assert "tokens a call of the model" in result.stderr


def test_bad_flags(tiny, smaller, tmp_path):
    flags = ["generate", tiny, "--prompt", "a"]
    assert "--draft-length goes with --draft" in refused(*flags, "--draft-length", 3)
    assert "--verify goes with --draft" in refused(*flags, "--verify", "block")
    assert "--verify goes with sampling" in refused(
        *flags, "--draft", "ngram", "--verify", "block"
    )
    assert "without --beams" in refused(*flags, "--draft", "ngram", "--beams", 2)
    assert "0 is not in the range" in refused(
        *flags, "--draft", "ngram", "--draft-length", 0
    )
    assert "no folder, file or short name" in refused(*flags, "--draft", "n-gram")
    # a model that shares no token
    other = tmp_path / "other"
    shutil.copytree(smaller, other)
    _renamed(other / "tokenizer.json", lambda letter: f"{letter}ZZ", added_tokens=[])
    config = json.loads((other / "tokenizer_config.json").read_text())
    left = {k: v for k, v in config.items() if not k.endswith("_token")}
    (other / "tokenizer_config.json").write_text(json.dumps(left))
    assert "cannot draft for a model of another tokenizer" in refused(
        *flags, "--draft", other
    )


@pytest.mark.parametrize("flags", [(), ("--temperature", 0.7, "--verify", "gumbel")])
def test_a_draft_with_another_tokenizer(tiny, smaller, tmp_path, flags):
    """The same model with two letters in each other's place drafts through a bridge."""
    plain = generate(tiny, *PROMPTS, "--max-new-tokens", 16, *flags[:2])
    other = tmp_path / "other"
    shutil.copytree(smaller, other)
    swapped = {"a": "t", "t": "a"}
    _renamed(other / "tokenizer.json", lambda letter: swapped.get(letter, letter))
    run_flags = ["generate", tiny, *PROMPTS, "--max-new-tokens", 16, "--draft", other]
    result = run(*run_flags, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    assert "of the target's 258 tokens it drafts the 25" in result.stderr
    found = json.loads(result.stdout)
    assert [x["tokens"] for x in found] == [x["tokens"] for x in plain]
    assert sum(x["drafted"] for x in found) > 0


def _renamed(path: Path, name, **changes):
    raw = json.loads(path.read_text()) | changes
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] = {name(letter): i for letter, i in vocab.items()}
    path.write_text(json.dumps(raw))
