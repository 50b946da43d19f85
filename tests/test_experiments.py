"""Every experiment runs in its small form, and says what its docstring must say."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_docstring(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    for word in ("Claim:", "Command:", "Hardware:", "Expected:"):
        assert word in text, f"{path.name} does not say {word}"


def test_the_index_names_every_script():
    index = (FOLDER / "README.md").read_text()
    assert [p.name for p in SCRIPTS if f"| `{p.name}` |" not in index] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_smoke(path, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # as `python experiments/NAME.py` does
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        output = tmp_path / "result.json"
        status = module.main(["--smoke", "--output", str(output)])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        pytest.skip("compares with torch, which is not installed")
    finally:
        del sys.modules[spec.name]
    assert not status
    assert output.stat().st_size > 0
    assert capsys.readouterr().out.strip()


def test_a_shared_report_gives_each_case_to_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from measuring.sharing import Report

    path, setting = tmp_path / "report.json", {"rows": 2}
    one, other = Report(path, setting), Report(path, setting)
    assert one.claim("a")
    assert not other.claim("a")  # somebody runs it
    assert other.claim("b")
    one.found["plain"]["p"] = ["1 2"]
    one.add("a", {"tokens": 1})
    other.add("b", {"tokens": 2})
    assert not other.claim("a")  # it is known
    third = Report(path, setting)
    assert third.found["cases"] == {"a": {"tokens": 1}, "b": {"tokens": 2}}
    assert third.found["plain"] == {"p": ["1 2"]}
    assert Report(path, {"rows": 3}).found["cases"] == {}
    for report in one, other:  # what ends with its process
        for lock in report.claimed:
            lock.release()
