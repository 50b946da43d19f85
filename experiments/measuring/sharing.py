"""Results that several processes fill at once."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from measuring.atomic import write_json


class Report:
    """A report of cases by name; each is run by one of the processes that share it."""

    def __init__(self, path: Path, setting: dict[str, Any]):
        """Takes up what the file holds, where it is of the same setting."""
        self.path = path
        self.found: dict[str, Any] = {"setting": setting, "plain": {}, "cases": {}}
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        self.folder = Path(tempfile.gettempdir()) / f"collab_jax-{name}"
        self.folder.mkdir(exist_ok=True)
        self.writing = FileLock(self.folder / "report.lock")
        self.claimed: list[FileLock] = []
        self.read()

    def read(self) -> None:
        """Adds what others have written since."""
        if not self.path.exists():
            return
        other = json.loads(self.path.read_text("utf-8"))
        if other["setting"] == self.found["setting"]:
            for part in "plain", "cases":
                self.found[part] = other[part] | self.found[part]

    def claim(self, key: str) -> bool:
        """Whether a case is this process's to run: nobody has run it, nobody runs it.

        A claim ends with the process, however that ends.
        """
        self.read()
        if key in self.found["cases"]:
            return False
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        lock = FileLock(self.folder / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        self.claimed.append(lock)
        self.read()  # it may have been written while the claim was made
        return key not in self.found["cases"]

    def add(self, key: str, case: Any) -> None:
        """Writes a case with those of the others."""
        with self.writing:
            self.read()
            self.found["cases"][key] = case
            write_json(self.path, self.found)
