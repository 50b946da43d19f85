"""An engine in a process of its own: memory, loading, and the first text's delay."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoding import ours
from measuring.process import measure, peak

LIMIT = 600.0  # seconds a process may take


def here(make: Callable[[], Callable], subject: ours.Subject, began: float) -> None:
    """Writes a text twice with the engine, and prints what that took.

    Args:
      make: the engine.
      subject: what it reads.
      began: when the model was started to be loaded.
    """
    engine = make()
    loaded = time.perf_counter()
    engine(subject.prompts(1))
    first = time.perf_counter()
    engine(subject.prompts(1))
    again = time.perf_counter() - first
    line = {"loading": loaded - began, "first": first - loaded, "again": again}
    print(json.dumps({"peak": peak()} | line))


def memories(
    names: list[str], options: list[str], found: dict[str, Any], save: Callable
) -> None:
    """Starts what is missing, one after the other, each with no compiled programs.

    Args:
      names: of engines.
      options: for bench_decode.py.
      found: by name: bytes at most, seconds of loading, of the first text, and of the
        second; or why it failed.
      save: called after each.
    """
    script = str(Path(__file__).parents[1] / "bench_decode.py")
    for name in (name for name in names if name not in found):
        print(f"alone: {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            around = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
            around |= {"TORCHINDUCTOR_CACHE_DIR": folder}
            command = [sys.executable, script, *options, "--alone", name]
            line = measure(command, around, log, LIMIT)
            if "failed" in line:
                found[name] = {"failed": line["failed"]}
            else:
                found[name] = json.loads(log.read_text("utf-8").splitlines()[-1])
        save()


def show(found: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"\n{'alone, batch 1':32}{'GiB':>6}{'loading':>9}{'first':>8}{'again':>8}")
    for name, x in found.items():
        if "failed" in x:
            print(f"{name:32}  {x['failed']}")
            continue
        cells = f"{x['peak'] / 2**30:6.2f}{x['loading']:8.1f}s"
        print(f"{name:32}{cells}{x['first']:7.1f}s{x['again']:7.1f}s")
