"""The command line as a user meets it, on a tiny model and a real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from collab_jax.cli import cli

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


@pytest.fixture(autouse=True, scope="module")
def programs(tmp_path_factory):
    """Equal programs compile once, as they do for a user, but in a folder of ours."""
    folder = str(tmp_path_factory.mktemp("programs"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder in the Hugging Face layout: one layer, a vocabulary of bytes."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from collab_jax import tree
    from collab_jax.io.names import rules
    from collab_jax.models.config import from_hf
    from collab_jax.models.transformer import init

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<|start|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    config = from_hf(raw)
    # large enough, so that the greedy path is far from ties
    params = jax.tree.map(
        lambda x: 1.5 * np.asarray(x), init(jax.random.key(0), config)
    )
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    tensors = {}
    for rule in rules(config):
        arrays = rule.save([leaves["/".join(path)] for path in rule.paths])
        tensors |= dict(zip(rule.names, map(np.ascontiguousarray, arrays), strict=True))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def generate(*arguments):
    """The JSON of a run that went well."""
    result = run("generate", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments):
    """The one line of a run that did not."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout
    lines = result.stderr.strip().split("\n")
    assert lines[-1].startswith("collab-jax: ")
    assert "Traceback" not in result.stderr
    # the plan may have been told before
    assert all(line.startswith("plan: ") for line in lines[:-1])
    return lines[-1]


def test_help_everywhere():
    overview = run("--help")
    assert overview.exit_code == 0
    for name in ("pull", "models", "generate", "score", "evaluate", "demo"):
        assert name in overview.stdout
        page = run(name, "--help")
        assert page.exit_code == 0
        assert f"collab-jax {name}" in page.stdout  # an example
    assert run("generate", "-h").stdout.count("--") > 15


def test_help_does_not_import_jax():
    check = (
        "import sys, collab_jax.cli; "
        "heavy = {'jax', 'numpy', 'transformers', 'flax', 'rich'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


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
    prompts.write_text((prompts.read_text() + "\n") * 20)
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
    assert 0 < len(done) < 140


def test_score(tiny):
    result = run("score", tiny, "--text", "the cat", "--text", "mat", "--json")
    assert result.exit_code == 0, result.stderr
    first, second = json.loads(result.stdout)
    assert first["text"] == "the cat"
    assert len(first["tokens"]) == len(first["logprobs"]) == len(first["pieces"])
    assert first["logprobs"][0] is None
    mean = np.mean(first["logprobs"][1:])
    assert first["perplexity"] == pytest.approx(np.exp(-mean))
    assert "".join(second["pieces"]) == "mat"
    table = run("score", tiny, "--text", "mat").stdout
    assert f"{second['logprobs'][2]:.2f}" in table
    assert f"perplexity {second['perplexity']:.1f}" in table


def test_evaluate_choices(tiny, tmp_path):
    task = tmp_path / "task.jsonl"
    lines = [
        {"prompt": "the cat sat on", "choices": ["a mat", "what"], "answer": i % 2}
        for i in range(6)
    ]
    task.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "results.jsonl"
    flags = ["evaluate", tiny, "--task", task, "--output", out, "--json"]
    result = run(*flags)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["records"] == 6
    assert set(summary["accuracy"]) == {"sum", "token", "byte"}
    assert summary["accuracy"]["sum"]["estimate"] == 0.5
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert json.loads(run(*flags).stdout) == summary
    assert len(out.read_bytes().splitlines()) == 6
    assert "50.0%" in run("evaluate", tiny, "--task", task).stdout


def test_evaluate_generations(tiny, tmp_path):
    task = tmp_path / "task.jsonl"
    (record,) = generate(tiny, "--prompt", "the", "--max-new-tokens", 3)
    lines = [
        {"prompt": "the", "answer": record["text"]},
        {"question": "a", "answer": "impossible"},
    ]
    task.write_text("\n".join(map(json.dumps, lines)))
    result = run("evaluate", tiny, "--task", task, "--max-new-tokens", 3, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["accuracy"]["exact"]["estimate"] == 0.5


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


def test_bad_sources(tiny, tmp_path):
    assert "nowhere" in refused("generate", tmp_path / "nowhere", "--prompt", "a")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refused("generate", empty, "--prompt", "a")
    (empty / "config.json").write_text('{"model_type": "perceptron"}')
    assert "perceptron" in refused("generate", empty, "--prompt", "a")
    assert re.search("model|name", refused("pull", "no-such-model"))


def test_what_cannot_fit_is_refused(tiny, monkeypatch):
    from collab_jax.commands import plan

    monkeypatch.setattr(plan, "free_memory", lambda: (1000, "cpu"))
    line = refused("generate", tiny, "--prompt", "a")
    assert "only 1 kB are free" in line


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


def test_models_lists_the_short_names():
    result = run("models", "--json")
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert {"smollm2-135m-instruct", "gemma-3-270m", "minilm-l6-v2"} <= set(rows)
    assert all(row["licence"] and row["size"] for row in rows.values())
    assert "smollm2-135m-instruct" in run("models").stdout


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_answers():
    command = [sys.executable, "-c", "from collab_jax.cli import main; main()"]
    flags = ["generate", "smollm2-135m-instruct", "--json", "--max-new-tokens", "24"]
    flags += ["--prompt", "The capital of France is", "--prompt", "1, 2, 3, 4,"]
    result = subprocess.run(
        [*command, *flags], check=True, capture_output=True, text=True, env=os.environ
    )
    paris, numbers = json.loads(result.stdout)
    assert "Paris" in paris["text"]
    assert "5, 6, 7" in numbers["text"]
    assert "plan: params 538 MB" in result.stderr
