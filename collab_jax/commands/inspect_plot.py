"""The picture of `collab-jax inspect`: how far and how much at odds, by layer."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from collab_jax.merge.inspect import tally

if TYPE_CHECKING:
    from collab_jax.commands.inspect_report import Report

FORMATS = (".png", ".pdf", ".svg")
_PAIRS = 6  # lines at most; of more, their range is drawn


def check(path: str) -> None:
    """Refuses what could not be drawn, before the long work.

    Args:
      path: of the picture.

    Raises:
      FileNotFoundError: where its folder is missing.
      ValueError: for an unknown format, or without matplotlib.

    >>> check("layers.bmp")
    Traceback (most recent call last):
    ValueError: --plot layers.bmp: .png, .pdf or .svg is expected
    """
    file = Path(path)
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {path}: .png, .pdf or .svg is expected")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--plot {path}: there is no folder {file.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: "
            "pip install 'collab-jax[plot]'"
        )


def draw(report: "Report", path: str) -> None:
    """Draws the report; nothing is drawn where no tensor could be compared.

    Args:
      report: with layers.
      path: of a .png, .pdf or .svg.

    >>> from collab_jax.commands.inspect_report import Report
    >>> draw(Report(["a", "b"], ["a", "b"], True, [], [], {}, [], 0, 1.0), "a.png")
    """
    rows = tally.by_part(report.compared, report.where)
    if not rows:
        return
    from matplotlib.figure import Figure

    ranked = any(row.ranks is not None for row in rows)
    several = len(report.experts) > 1
    panels = 1 + several + ranked
    figure = Figure(figsize=(9, 1.2 + 2.4 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    places = np.arange(len(rows))
    _distances(axes[0], places, rows, report)
    if several:
        _directions(axes[1], places, rows, report)
    if ranked:
        _ranks(axes[-1], places, rows, report)
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(
            frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )
    _names(axes[-1], places, [row.name for row in rows])
    base = report.names[0]
    figure.suptitle(f"{', '.join(report.experts)} against {base}", fontsize=11)
    figure.savefig(path, dpi=150)


def _distances(axis: Any, places: np.ndarray, rows: Sequence[Any], report: Any) -> None:
    for n, name in enumerate(report.experts):
        moved = [100 * row.statistics.relative[n] for row in rows]
        _line(axis, places, moved, rows, _style(n), label=name)
    axis.set_ylabel("moved\n|delta| / |base|, %")
    values = np.array([row.statistics.relative for row in rows])
    inside = values[np.isfinite(values) & (values > 0)]
    if len(inside) and inside.max() > 100 * inside.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)


def _directions(
    axis: Any, places: np.ndarray, rows: Sequence[Any], report: Any
) -> None:
    names = report.experts
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    cosine = np.array([[row.statistics.cosine[p] for p in pairs] for row in rows])
    if len(pairs) <= _PAIRS:
        for k, (i, j) in enumerate(pairs):
            label = f"cosine {names[j]}, {names[i]}" if len(pairs) > 1 else "cosine"
            _line(axis, places, cosine[:, k], rows, _style(k), label=label)
    else:
        ends = cosine.min(1), cosine.max(1)
        axis.fill_between(places, *ends, alpha=0.3, lw=0, label="cosines, range")
        mean = cosine.mean(1)
        _line(axis, places, mean, rows, _style(0), label="cosine, mean")
    for field, label, style in (
        ("pair_conflict", "signs against", "s--"),
        ("pair_weighted", "signs against, by size", "^:"),
    ):
        matrices = [tally.between(getattr(row.statistics, field)) for row in rows]
        shares = [values.mean() if len(values) else np.nan for values in matrices]
        color = "0.25" if field == "pair_conflict" else "0.55"
        _line(axis, places, shares, rows, style, label=label, color=color)
    axis.axhline(0.5, color="0.85", lw=4, zorder=0, label="signs if independent")
    axis.axhline(0, color="0.6", lw=0.8, zorder=0)
    axis.set_ylabel("cosine of deltas,\nshare of entries")
    lowest = np.nan_to_num(cosine, nan=0).min()
    axis.set_ylim(min(-0.1, lowest - 0.05), 1.02)


def _ranks(axis: Any, places: np.ndarray, rows: Sequence[Any], report: Any) -> None:
    known = [k for k, row in enumerate(rows) if row.ranks is not None]
    for n, name in enumerate(report.experts):
        shares = [100 * rows[k].ranks[0][n] for k in known]
        own = [rows[k] for k in known]
        _line(axis, places[known], shares, own, _style(n), label=name)
    axis.set_ylabel("effective rank\nof smaller side, %")
    axis.set_ylim(0, 102)


def _style(n: int) -> str:
    """A mark and a line; the later of two that coincide leaves the first in sight."""
    return ("o-", "x--", "+:", "d-.")[n % 4]


def _line(
    axis: Any,
    places: np.ndarray,
    values: Any,
    rows: Sequence[Any],
    style: str,
    **looks: Any,
) -> None:
    """A line through the layers; what is no layer stands apart."""
    stacks = [row.name.rstrip("0123456789") for row in rows]
    xs: list[float] = []
    ys: list[float] = []
    for k, (place, value) in enumerate(zip(places, values, strict=True)):
        if k and stacks[k] != stacks[k - 1]:
            xs.append(float(place))
            ys.append(float("nan"))
        xs.append(float(place))
        ys.append(float(value))
    axis.plot(xs, ys, style, ms=4.5, lw=1.3, **looks)


def _names(axis: Any, places: np.ndarray, names: Sequence[str]) -> None:
    """A mark for every row; numbers for layers, as many as have room."""
    step = max(1, round(len(names) / 16))
    marks, labels = [], []
    for place, name in zip(places, names, strict=True):
        layer = name.removeprefix("layer ")
        if not layer.isdecimal():
            marks.append(place)
            labels.append(name)
        elif int(layer) % step == 0:
            marks.append(place)
            labels.append(layer)
    words = [label for label in labels if not label.isdecimal()]
    axis.set_xticks(marks, labels, fontsize=8)
    for text, label in zip(axis.get_xticklabels(), labels, strict=True):
        if label in words:
            text.set_rotation(45)
            text.set_ha("right")
    axis.set_xlabel("layer")
