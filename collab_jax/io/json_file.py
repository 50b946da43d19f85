"""Files of JSON."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON file of a model's folder, such as its config.json.

    Args:
      path: of a file that holds a mapping.

    Raises:
      FileNotFoundError: where it is missing.
      ValueError: for what is not JSON, or no mapping.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "config.json"
    >>> size = path.write_text('{"layers": ')
    >>> read_json(path)
    Traceback (most recent call last):
    ValueError: ...config.json is not JSON (Expecting value: line 1 column 12 (char
    11)); fetch it again
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a folder in the Hugging Face layout was expected"
        )
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping; fetch it again")
    return found


def write_json(path: Path, content: dict) -> None:
    """Writes one JSON file, indented.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"layers": 2})
    >>> json.loads(path.read_text())
    {'layers': 2}
    """
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
