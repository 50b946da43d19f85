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


PROGRAM = """HloModule jit_run

%one (z.1: f32[]) -> f32[] {
  %z.1 = f32[]{:T(128)} parameter(0)
  ROOT %f.1 = f32[]{:T(128)} fusion(%z.1), kind=kLoop, calls=%fused
}

%body.1 (p.1: (s32[], bf16[8,1024,128])) -> (s32[], bf16[8,1024,128]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,1024,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %x.1 = bf16[8,1024,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %copy.1 = bf16[8,1024,128]{2,1,0:T(8,128)(2,1)} copy(%x.1)
  %copy.2 = bf16[8,1024,128]{2,1,0:T(8,128)(2,1)S(1)} copy(%copy.1)
  %copy.3 = s32[8]{0:T(128)} copy(%x.1)
  %sum.1 = f32[4,8]{1,0:T(8,128)} all-reduce(%x.1), to_apply=%add
  %while.3 = (s32[]{:T(128)}) while(%p.1), condition=%c, body=%inner
  %choice.1 = f32[]{:T(128)} conditional(%q, %a, %a), branch_computations={%one, %two}
  ROOT %t.1 = (s32[]{:T(128)}, bf16[8,1024,128]{2,1,0}) tuple(%p.1, %copy.2)
}

ENTRY %main (a.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %while.1 = (s32[]{:T(128)}) while(%a.1), condition=%c, body=%prompt
  %while.2 = (s32[]{:T(128)}) while(%while.1), condition=%c, body=%body.1
  ROOT %while.4 = (s32[]{:T(128)}) while(%while.2), condition=%c, body=%inner
}
"""


def test_what_a_turn_of_a_loop_does_is_read_off_a_program(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from compiling.text import Turn, last_loop

    found = last_loop(PROGRAM)
    assert found == Turn(started=7, loops=1, copied=8 * 1024 * 128 * 2, sent=128)
    assert last_loop(PROGRAM.replace(" while(", " call(")) is None
