"""The README says what is true: Python runs, commands parse, the table is whole."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCK = re.compile(r"(<!-- real -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(bool(real), kind, code) for real, kind, code in BLOCK.findall(TEXT)]


def python(*, real):
    """The Python blocks in their order, as one program with the lines of the README."""
    blocks = [
        code for is_real, kind, code in BLOCKS if (is_real, kind) == (real, "python")
    ]
    assert blocks
    return "\n".join(blocks)


def commands():
    """Lines of the README that call the command line by its plain name."""
    lines = [
        line for _, kind, code in BLOCKS if kind == "bash" for line in code.split("\n")
    ]
    return [line for line in lines if line.startswith("collab-jax ")]


def test_python_runs():
    """Every block without a real model runs, one after the other."""
    exec(compile(python(real=False), "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.real
def test_python_runs_on_real_models(capsys):
    """So do those with real models, and they print what the text around them says."""
    exec(compile(python(real=True), "README.md", "exec"), {"__name__": "readme"})
    gemma, smollm, with_context = capsys.readouterr().out.strip("\n").split("\n")
    assert "five, six" in gemma
    assert "five, six" in smollm
    assert with_context == " Lyon."


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line, tmp_path, monkeypatch):
    """Commands and options of the README exist, and take the values shown."""
    from collab_jax.cli import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n')
    _, name, *arguments = shlex.split(line)
    # a command keeps the spelling of help that its first context had
    with click.Context(cli, **cli.context_settings) as context:
        command = cli.get_command(context, name)
        assert command is not None, f"no command {name}"
        command.make_context(name, arguments, parent=context)


def test_table_is_whole():
    """All 66 systems are there once, each with a status that the text explains."""
    rows = [
        line.split(" | ") for line in TEXT.split("\n") if re.match(r"\| \d+ \|", line)
    ]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 67))
    assert {len(row) for row in rows} == {7}
    assert {row[5] for row in rows} <= {"works", "formula", "planned"}


def test_the_performance_table_is_what_the_results_say():
    script = Path(__file__).parents[1] / "experiments" / "performance.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
