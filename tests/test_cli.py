"""The command line as a user meets it, on a tiny model and a real one."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from command_line import generate, refused, run


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
