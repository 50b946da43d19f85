"""JSONL: errors that name the place, and runs that survive a kill."""

import json
import re

import pytest

from collab_jax import records


@pytest.fixture
def file(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3: expected a JSON object"),
        (
            '{"prompt": "a"}\n{"text": "b"}',
            'line 2: no key "prompt"; the record has',
        ),
        ("\n \n", "no records"),
        (b'{"prompt": "\xff"}', "line 1: not JSON"),
    ],
)
def test_bad_lines_are_named(file, text, message):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(f"{file}")) as error:
        records.read(file, ["prompt"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_alternative_keys_and_unicode_line_ends(file):
    # U+2028 ends a line for str.splitlines, not for JSONL
    record = {"question": "a\u2028b"}
    file.write_text(json.dumps(record, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert records.read(file, [("prompt", "question")]) == [record]
    with pytest.raises(ValueError, match='no key "answer"'):
        records.read(file, [("prompt", "question"), "answer"])


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        records.read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        records.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        records.journal(tmp_path / "none" / "out.jsonl", {})


def result(index):
    return {"index": index, "text": f"t{index} \u00e9\n"}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_run_cut_anywhere_ends_as_if_uncut(file, cut):
    whole = records.journal(file, {"seed": 0})
    whole.append([result(2), result(0)])
    whole.append([result(1)])
    expected = whole.finish()
    assert [record["index"] for record in expected] == [0, 1, 2]
    complete = file.read_bytes()
    file.write_bytes(complete[: len(complete) - cut])
    again = records.journal(file, {"seed": 0})
    assert len(again.done) < 3
    again.append(result(i) for i in range(3) if i not in again.done)
    assert again.finish() == expected
    assert file.read_bytes() == complete
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "out.jsonl",
        "out.jsonl.run.json",
    ]


def test_another_configuration_is_refused(file):
    records.journal(file, {"seed": 0, "prompts": "abc"}).append([result(0)])
    before = file.read_bytes()
    with pytest.raises(ValueError, match="begun with seed 0, now 1"):
        records.journal(file, {"seed": 1, "prompts": "abc"})
    with pytest.raises(ValueError, match="begun with other prompts"):
        records.journal(file, {"seed": 0, "prompts": "abd"}, identity="prompts")
    with pytest.raises(ValueError, match="begun with stop null"):
        records.journal(file, {"seed": 0, "prompts": "abc", "stop": ["x"]})
    assert file.read_bytes() == before
    assert records.journal(file, {"seed": 0, "prompts": "abc"}).done == {0: result(0)}


def test_a_run_that_wrote_nothing_may_change_its_configuration(file):
    records.journal(file, {"seed": 0})
    records.journal(file, {"seed": 1}).append([result(0)])
    assert records.journal(file, {"seed": 1}).done


def test_a_file_of_somebody_else_is_left_alone(file):
    file.write_text("precious\n")
    with pytest.raises(ValueError, match="not an unfinished run"):
        records.journal(file, {})
    file.with_name("out.jsonl.run.json").write_text("{}")
    with pytest.raises(ValueError, match="line 1: not a result"):
        records.journal(file, {})
    assert file.read_text() == "precious\n"
