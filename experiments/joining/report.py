"""Results that are taken up again, tables, verdicts and pictures."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from measuring.atomic import write_json
from measuring.options import options
from measuring.process import circumstances
from numpy.typing import ArrayLike

from collab_jax.uncertainty import Interval, paired_bootstrap

FEW = 5
PACKAGES = ["collab-jax", "jax", "jaxlib", "numpy", "torch", "transformers"]


class Verdict(NamedTuple):
    """What was expected, and what was seen."""

    expected: str
    seen: str
    held: bool


class Report(NamedTuple):
    """What was found so far, in a file."""

    found: dict[str, Any]
    path: Path

    def save(self) -> None:
        """Writes the file."""
        write_json(self.path, self.found)


def parser(doc: str) -> argparse.ArgumentParser:
    """What all these scripts can be told."""
    made = options(doc)
    made.add_argument("--fresh", action="store_true", help="forget what FILE holds")
    return made


def folder_of(chosen: argparse.Namespace) -> Path | None:
    """The folder of data, or None for the texts of the scripts."""
    return None if chosen.smoke or chosen.data is None else Path(chosen.data)


def opened(
    name: str, chosen: argparse.Namespace, setting: dict[str, Any], *parts: str
) -> Report:
    """The report of this setting: the one in the file, or a new one.

    Args:
      name: of the script.
      chosen: what it was told.
      setting: all that the results depend on; JSON values.
      *parts: names of what is found.
    """
    results = Path(__file__).parents[1] / "results" / f"{name}.json"
    path = chosen.output or (Path(f"{name}_smoke.json") if chosen.smoke else results)
    setting = setting | {"smoke": chosen.smoke, "data": folder_of(chosen) is not None}
    if path.exists() and not chosen.fresh:
        before = json.loads(path.read_text("utf-8"))
        if before.get("setting") == setting:
            return Report(before, path)
    found: dict[str, Any] = {"setting": setting, "run": circumstances(PACKAGES)}
    found["run"]["device"] = str(jax.devices()[0].device_kind)
    found["run"].pop("load")
    return Report(found | {part: {} for part in parts}, path)


def show(head: Sequence[str], lines: Sequence[Sequence[Any]], first: int = 34) -> None:
    """A table: names on the left, numbers on the right."""

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    widths = [max(10, len(name) + 2) for name in head[1:]]
    for line in [head, *lines]:
        cells = map(cell, line[1:])
        print(
            f"{line[0]!s:{first}}"
            + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        )
    print()


def between(first: ArrayLike, second: ArrayLike) -> Interval:
    """The mean of the first less the second over the same records, with 95 percent.

    Fewer than `FEW` records tell nothing: the interval is then infinite.
    """
    found = paired_bootstrap(first, second).difference
    if np.size(first) < FEW:
        return found._replace(low=-math.inf, high=math.inf)
    return found


def decided(expected: str, gap: Interval, more: str = "") -> Verdict:
    """A verdict on a difference: it held where the whole interval lies above 0.

    Args:
      expected: that the difference is positive, in words.
      gap: the difference.
      more: is said behind it.
    """
    found = "" if gap.low > 0 else "the opposite" if gap.high < 0 else "not told apart"
    seen = f"{gap.estimate:.3f} ({gap.low:.3f} to {gap.high:.3f}){more}"
    return Verdict(expected, f"{found}: {seen}" if found else seen, gap.low > 0)


def conclude(report: Report, verdicts: Sequence[Verdict]) -> None:
    """Prints and keeps what was expected and what was seen."""
    said = [verdict._replace(held=bool(verdict.held)) for verdict in verdicts]
    report.found["verdicts"] = [verdict._asdict() for verdict in said]
    report.save()
    for verdict in verdicts:
        print(f"{'held' if verdict.held else 'NOT HELD'}: {verdict.expected}")
        print(f"    seen: {verdict.seen}")
