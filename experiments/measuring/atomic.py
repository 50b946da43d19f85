"""Results on the disk."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, found: Any) -> None:
    """Writes a file that appears whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)
