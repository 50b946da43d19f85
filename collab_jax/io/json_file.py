"""Files of JSON."""

import json
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Writes one JSON file, indented.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"layers": 2})
    >>> json.loads(path.read_text())
    {'layers': 2}
    """
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
