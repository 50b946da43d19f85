"""Records in JSONL files: reading with clear errors, and writing that can be resumed.

A run over many records appends each result to its output as soon as it is known. Beside
`out.jsonl` stands `out.jsonl.run.json` with the configuration of the run, so that a
restart continues the same run and refuses another.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


def read(
    path: str | Path,
    keys: Sequence[str | tuple[str, ...]] = (),
    parse: Callable[[Record], Any] | None = None,
) -> list[Any]:
    """All records of a JSONL file: one JSON object a line, empty lines skipped.

    Args:
      path: the file.
      keys: what every record must have; a tuple names alternatives.
      parse: what to make of a record; its ValueError is given the place.

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming file, line and key, for a line that is not a JSON object, a
        missing key, what `parse` refuses, or a file without records.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.jsonl")
    ...     _ = path.write_text('{"prompt": "1 + 1 ="}' + chr(10))
    ...     read(path, ["prompt"])
    [{'prompt': '1 + 1 ='}]
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, a JSONL file was expected") from None
    records = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(
                f'{where}: expected a JSON object like {{"prompt": "..."}}, '
                f"found {type(record).__name__}"
            )
        for key in keys:
            names = (key,) if isinstance(key, str) else key
            if not any(name in record for name in names):
                wanted = " or ".join(f'"{name}"' for name in names)
                has = ", ".join(record) or "nothing"
                raise ValueError(f"{where}: no key {wanted}; the record has {has}")
        try:
            records.append(parse(record) if parse else record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no records, expected one JSON object a line")
    return records


class Journal(NamedTuple):
    """The results of a run so far, and the functions that add to them."""

    done: dict[int, Record]  # by index, as found when the run was taken up
    append: Callable[[Iterable[Record]], None]  # to the disk before it returns
    finish: Callable[[], list[Record]]  # the file in order of the index, complete


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("index"), int):
        raise ValueError(
            f'{where}: not a result of this program (an object with an "index"); '
            "give another --output or remove the file"
        )
    return record


def _write(path: Path, data: bytes) -> None:
    """Replaces the file by one that is complete on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def journal(
    path: str | Path, configuration: Mapping[str, Any], identity: str | None = None
) -> Journal:
    """Opens the output of a run, or takes up the run that wrote what is there.

    A last line without its end is what a kill left behind; it is dropped.

    Args:
      path: a JSONL file; every record in it has an "index".
      configuration: whatever decides the results, as JSON values.
      identity: a key of the configuration whose value is too long to print.

    Raises:
      FileNotFoundError: the folder of the file does not exist.
      ValueError: the file was written by a run of another configuration (naming the
        first difference), or by something else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     out = journal(Path(folder, "out.jsonl"), {"seed": 0})
    ...     out.append([{"index": 1, "text": "b"}])
    ...     again = journal(Path(folder, "out.jsonl"), {"seed": 0})
    ...     again.append([{"index": 0, "text": "a"}])
    ...     sorted(again.done), [record["text"] for record in again.finish()]
    ([1], ['a', 'b'])
    """
    path = Path(path)
    side = path.with_name(path.name + ".run.json")
    # through JSON, so that a tuple equals the list that is read back
    wanted = json.loads(json.dumps(dict(configuration)))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} in")
    data = path.read_bytes() if path.exists() else b""
    if data.strip():
        _same_run(path, side, wanted, identity)
    elif not side.exists() or json.loads(side.read_bytes()) != wanted:
        _write(side, json.dumps(wanted, ensure_ascii=False, indent=1).encode() + b"\n")
    whole, _, torn = data.rpartition(b"\n")
    if torn:
        with open(path, "r+b") as file:
            file.truncate(len(data) - len(torn))
    done: dict[int, Record] = {}
    for number, line in enumerate(whole.split(b"\n"), 1):
        if line.strip():
            record = _parse(line, f"{path}, line {number}")
            done.setdefault(record["index"], record)
    results = dict(done)

    def append(records: Iterable[Record]) -> None:
        new = list(records)
        with open(path, "ab") as file:
            file.write(b"".join(map(_line, new)))
            file.flush()
            os.fsync(file.fileno())
        results.update((record["index"], record) for record in new)

    def finish() -> list[Record]:
        ordered = [results[index] for index in sorted(results)]
        _write(path, b"".join(map(_line, ordered)))
        return ordered

    return Journal(done, append, finish)


def _same_run(path: Path, side: Path, wanted: Record, identity: str | None) -> None:
    """Refuses to continue what another run began."""
    cure = "give another --output, or remove the file to begin again"
    if not side.exists():
        raise ValueError(f"{path} exists and is not an unfinished run of ours; {cure}")
    try:
        found = json.loads(side.read_bytes())
    except ValueError:
        raise ValueError(f"{side} is not JSON; {cure}") from None
    if found == wanted:
        return
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            if key == identity:
                detail = f"other {key}"
            else:
                old, new = json.dumps(found.get(key)), json.dumps(wanted.get(key))
                detail = f"{key} {old}, now {new}"
            raise ValueError(f"{path} was begun with {detail}; {cure}")
