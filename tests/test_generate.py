"""`collab-jax generate` as a user meets it, on a tiny model."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import generate, refused, run

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    ".",
    "then",
    "it",
    "ran",
    "off",
    "to",
    "see",
]


def test_json_of_generate(tiny):
    first, second = generate(
        tiny, "--prompt", "the cat", "--prompt", "a", "--max-new-tokens", 5
    )
    assert first["prompt"] == "the cat"
    assert len(first["prompt_tokens"]) == 7
    assert 1 <= len(first["tokens"]) <= 5
    assert isinstance(first["text"], str)
    assert first["logprob"] < 0
    assert first["finish"] in ("eos", "length")
    assert second["prompt"] == "a"


def test_greedy_is_the_argmax_of_the_model(tiny):
    from collab_jax import load, score

    (found,) = generate(tiny, "--prompt", "the cat sat", "--max-new-tokens", 6)
    model = load(tiny)
    ids = np.array([found["prompt_tokens"] + found["tokens"]])
    scores = score.score(model.lm, model.params, ids, np.array([ids.size]))
    new = slice(len(found["prompt_tokens"]), ids.size)
    assert not scores.rank[0, new].any()
    assert scores.rank[0].any()
    assert found["logprob"] == pytest.approx(float(scores.logprob[0, new].sum()), 1e-4)


def test_sampling_follows_the_seed_and_not_the_batch(tiny):
    flags = [
        "--max-new-tokens",
        8,
        "--temperature",
        1.5,
        "--top-k",
        40,
        "--top-p",
        0.95,
    ]
    prompts = [x for word in WORDS[:5] for x in ("--prompt", word)]

    def tokens(*more):
        return [record["tokens"] for record in generate(tiny, *prompts, *more)]

    one = tokens(*flags, "--seed", 1)
    assert one == tokens(*flags, "--seed", 1, "--batch-size", 2)
    assert one != tokens(*flags, "--seed", 2)
    greedy = tokens("--max-new-tokens", 8)
    assert one != greedy
    assert greedy == tokens("--max-new-tokens", 8, "--temperature", 0)


def test_beams_find_more_likely_texts(tiny):
    flags = [tiny, "--prompt", "then", "--max-new-tokens", 6, "--length-penalty", 0]
    (greedy,) = generate(*flags)
    (best,) = generate(*flags, "--beams", 4)
    assert best["logprob"] >= greedy["logprob"] - 1e-4


def test_plain_output_and_plan(tiny):
    result = run("generate", tiny, "--prompt", "it ran", "--max-new-tokens", 4)
    assert result.exit_code == 0
    (record,) = generate(tiny, "--prompt", "it ran", "--max-new-tokens", 4)
    assert result.stdout == record["text"] + "\n"
    plan = result.stderr.split("\n")[0]
    for part in ("plan: params", "cache", "logits", "free"):
        assert part in plan
    both = run(
        "generate", tiny, "--prompt", "a", "--prompt", "b", "--max-new-tokens", 2
    )
    assert both.stdout.startswith("[1/2] a\n")


def test_stream_prints_the_same_text(tiny):
    flags = ["generate", tiny, "--prompt", "it ran", "--max-new-tokens", 12]
    assert run(*flags, "--stream").stdout == run(*flags).stdout
    text = run(*flags).stdout
    end = next(c for c in text[2:] if c.isascii() and c.isprintable())
    cut = run(*flags, "--stop", end).stdout
    assert cut == text[: text.find(end)] + "\n"
    assert run(*flags, "--stop", end, "--stream").stdout == cut


def test_chat_uses_the_template(tiny):
    (record,) = generate(
        tiny, "--chat", "--system", "be kind", "--prompt", "hi", "--max-new-tokens", 1
    )
    template = "system: be kind\nuser: hi\nbot:"
    (plain,) = generate(tiny, "--prompt", template, "--max-new-tokens", 1)
    assert record["prompt_tokens"] == plain["prompt_tokens"]
    assert record["prompt"] == "hi"


def test_an_empty_prompt_starts_from_the_start_token(tiny):
    (record,) = generate(tiny, "--prompt", "", "--max-new-tokens", 2)
    assert record["prompt_tokens"] == [256]


@pytest.fixture
def prompts(tmp_path):
    lines = [
        {"id": f"r{i}", "prompt": " ".join(WORDS[: 1 + 5 * i % 13])} for i in range(7)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_file_of_prompts(tiny, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--input", prompts, "--output", out, "--max-new-tokens", 4]
    flags += ["--temperature", 1, "--batch-size", 3]
    result = run("generate", tiny, *flags)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(7))
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(7)]
    complete = out.read_bytes()

    # what a kill leaves: some records in any order, and a torn line
    kept = [complete.splitlines(keepends=True)[i] for i in (5, 0, 3)]
    out.write_bytes(b"".join(kept) + b'{"index": 1, "prom')
    result = run("generate", tiny, *flags, "--batch-size", 2)
    assert result.exit_code == 0, result.stderr
    assert "3 of 7 are done" in result.stderr
    again = [json.loads(line) for line in out.read_text().splitlines()]
    for a, b in zip(lines, again, strict=True):
        assert {**a, "logprob": 0} == {**b, "logprob": 0}
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)

    # a complete run does nothing, another configuration is refused
    before = out.read_bytes()
    assert run("generate", tiny, *flags).exit_code == 0
    assert "begun with seed 0, now 1" in refused("generate", tiny, *flags, "--seed", 1)
    prompts.write_text(prompts.read_text().replace("cat", "dog"))
    assert "other prompts" in refused("generate", tiny, *flags)
    assert out.read_bytes() == before


def test_an_interrupt_keeps_what_is_done(tiny, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    # minutes of work, so that the signal comes before its end on any machine
    prompts.write_text((prompts.read_text() + "\n") * 1_000)
    total = len(prompts.read_text().split())
    flags = ["generate", tiny, "--input", str(prompts), "--output", str(out)]
    flags += ["--max-new-tokens", "200", "--batch-size", "1"]
    command = [sys.executable, "-c", "from collab_jax.cli import main; main()", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.endswith("collab-jax: interrupted\n")
    assert stdout == ""
    done = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < len(done) < total


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--top-p", "0"], "--top-p"),
        (["--prompt", "a", "--top-k", "0"], "--top-k"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--temperature", "nan"], "temperature"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--dtype", "float31"], "float32"),
        (["--prompt", "a", "--beams", "0"], "--beams"),
        (["--prompt", "a", "--beams", "2", "--top-k", "3"], "without --top-k"),
        (["--prompt", "a", "--system", "x"], "--system needs --chat"),
        (["--prompt", "a", "--stop", ""], "--stop"),
        (["--prompt", "a", "--stream", "--json"], "--stream"),
        (["--prompt", "a", "--nonsense"], "--nonsense"),
        (["--prompt", "a", "--max-new-tokens", "300"], "256 positions"),
        (["--prompt", "a" * 300], "text 1 has 300 tokens"),
        ([], "--prompt"),
        (["--input", "none.jsonl", "--output", "out.jsonl"], "no file none.jsonl"),
        (["--input", "none.jsonl"], "--output"),
    ],
)
def test_bad_flags_of_generate(tiny, flags, message):
    assert message in refused("generate", tiny, *flags)


def test_no_piece_of_a_stream_is_taken_back():
    from collab_jax.commands.stream import pieces
    from collab_jax.respond import Codec

    text = "caf\u00e9 \u2603 ab abc."
    codec = Codec(
        lambda texts: [], lambda ids: bytes(ids).decode(errors="replace"), (7,)
    )
    steps = [[byte] for byte in text.encode()]
    assert "".join(pieces(iter([*steps, [7]]), codec, [])) == text
    cut = list(pieces(iter(steps), codec, ["abd", "abc"]))
    assert "".join(cut) == "caf\u00e9 \u2603 ab "
    assert "\ufffd" not in "".join(cut)
    # a text that ends in half a character is shown as far as it goes
    assert "".join(pieces(iter(steps[:4]), codec, [])) == "caf\ufffd"
