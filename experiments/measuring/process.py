"""A process and what it took of time and memory; and what it ran on."""

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PAUSE = 0.05  # seconds between two looks at a process: looking slows it down
FACTS = "VmRSS", "RssAnon", "RssFile"


def measure(command: list[str], environment: dict, log: Path, limit: float) -> dict:
    """Runs a process that may take `limit` seconds; its output goes to `log`.

    Seconds are those of the clock (`seconds`) and of the processor (`user`, `system`).
    Bytes are the kernel's (`peak`, of the largest process) and those that were seen in
    the process and its children together at one time (`rss`, `anonymous`, `mapped`);
    mapped pages belong to files, and the kernel may take them back.
    """
    peaks = dict.fromkeys(FACTS, 0)
    with log.open("wb") as file:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment
        )
        polls, family, over = 0, [process.pid], False
        try:
            while True:
                done, status, used = os.wait4(process.pid, os.WNOHANG)
                seconds = time.perf_counter() - began
                if done:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if seconds > limit and not over:
                    process.kill()
                    over = True
                if polls % 10 == 0:
                    family = _family(process.pid)
                polls += 1
                for name, value in _memory(family).items():
                    peaks[name] = max(peaks[name], value)
                time.sleep(PAUSE)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
    unit = 1 if sys.platform == "darwin" else 1024
    found: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "user": round(used.ru_utime, 3),
        "system": round(used.ru_stime, 3),
        "peak": used.ru_maxrss * unit,
        "rss": peaks["VmRSS"],
        "anonymous": peaks["RssAnon"],
        "mapped": peaks["RssFile"],
    }
    if process.returncode:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
        found["failed"] = (
            f"stopped after {limit:.0f} s"
            if over
            else f"status {process.returncode}: {' '.join(lines[-1:])[-300:]}"
        )
    return found


def peak() -> int:
    """Bytes of this process at most so far; `ru_maxrss` has those of its parent too."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _family(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for each in found:
        for path in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += [int(child) for child in path.read_text().split()]
            except OSError:  # it has ended
                continue
    return found


def _memory(family: list[int]) -> dict[str, int]:
    """Bytes, summed over processes; zeros where the system does not tell."""
    total = dict.fromkeys(FACTS, 0)
    for process in family:
        try:
            text = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name in total:
                total[name] += int(value.split()[0]) * 1024
    return total


def circumstances(packages: list[str]) -> dict:
    """When, on what machine and with which versions something is measured."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ":/collab_jax")
    machine = [platform.system(), platform.machine(), f"{os.cpu_count()} cores"]
    machine += _line("/proc/cpuinfo", "model name") + _line("/proc/meminfo", "MemTotal")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": [round(load, 2) for load in os.getloadavg()],
        "machine": ", ".join(machine),
        "versions": versions,
        "commit": commit + (" and changes" if changed else ""),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _line(path: str, name: str) -> list[str]:
    """The first value of a name in a table of the system, if there is one."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    return [x.split(":", 1)[1].strip() for x in lines if x.startswith(name)][:1]
