"""What `collab-jax inspect` found: as a table and sentences, or for machines."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from collab_jax.merge.inspect import tally
from collab_jax.merge.inspect.compare import Bad, Compared
from collab_jax.merge.inspect.diagnose import LARGE, TOP
from collab_jax.merge.inspect.tally import Row, Site
from collab_jax.merge.inspect.verdict import verdict

_APART = 4  # experts with a column each


class Report(NamedTuple):
    """All that was found."""

    names: list[str]  # short; the base first
    sources: list[str]  # as they were given
    given: bool  # whether a base was named
    findings: list[str]
    compared: list[Compared]
    where: dict[str, Site]
    apart: list[str]  # tensors that could not be compared
    matrices: int  # whose rank could have been computed
    seconds: float

    @property
    def experts(self) -> list[str]:
        """All but the base."""
        return self.names[1:]

    @property
    def bad(self) -> list[Bad]:
        """What is not finite."""
        return [bad for each in self.compared for bad in each.bad]

    @property
    def total(self) -> Row | None:
        """The whole model; None where nothing could be compared."""
        made = tally.rows(self.compared, lambda each: "all")
        return made[0] if made else None

    @property
    def verdict(self) -> list[str]:
        """What follows."""
        total = self.total
        if total is None:
            return ["No tensor could be compared: these models cannot be merged."]
        base = self.names[0]
        return verdict(total, self.experts, base, self.bad, self.findings)


def labels(names: Sequence[str]) -> list[str]:
    """Short names: the last part of a path, or all of it where that is not unique.

    >>> labels(["x/a", "y/b"]), labels(["x/a", "y/a"])
    (['a', 'b'], ['x/a', 'y/a'])
    """
    short = ["+".join(Path(p).name or p for p in name.split("+")) for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _rows(report: Report, by: str, limit: int | None = None) -> tuple[Row, ...]:
    if by == "layer":
        return tally.by_part(report.compared, report.where, limit)
    if by == "module":
        return tally.rows(report.compared, lambda c: report.where[c.name].module)
    return tally.rows(report.compared, lambda c: c.name)


def as_dict(report: Report, by: str) -> dict[str, Any]:
    """The report for JSON.

    Args:
      report: the report.
      by: layer, module or tensor.

    >>> empty = Report(["a", "b"], ["a", "b"], False, [], [], {}, [], 0, 1.0)
    >>> as_dict(empty, "layer")["verdict"]
    ['No tensor could be compared: these models cannot be merged.']
    """
    total = report.total
    ranks = [
        {
            "tensor": each.name,
            "effective": [rank.effective for rank in each.ranks],
            "stable": [rank.stable for rank in each.ranks],
            "most": min(each.shape),
        }
        for each in report.compared
        if each.ranks is not None
    ]
    equal = {
        name: [each.name for each in report.compared if each.equal[n]]
        for n, name in enumerate(report.experts)
    }
    return {
        "models": report.experts,
        "base": report.names[0],
        "sources": dict(zip(report.names, report.sources, strict=True)),
        "base_given": report.given,
        "findings": report.findings,
        "not_finite": [
            {
                "model": report.names[bad.model],
                "tensor": bad.name,
                "entries": bad.entries,
                "first": list(bad.at),
                "value": str(bad.value),
            }
            for bad in report.bad
        ],
        "equal": equal,
        "not_compared": report.apart,
        "total": None if total is None else _numbers(total),
        "rows": [_numbers(row) for row in _rows(report, by)],
        "ranks": ranks,
        "verdict": report.verdict,
        "seconds": round(report.seconds, 3),
    }


def _numbers(row: Row) -> dict[str, Any]:
    made = {field: _plain(value) for field, value in row.statistics._asdict().items()}
    shares = None if row.ranks is None else [_plain(x) for x in row.ranks]
    keys = "effective_rank_share", "effective_rank", "stable_rank"
    made |= dict(zip(keys, shares or [None] * 3, strict=True))
    return {"name": row.name, "tensors": row.tensors, "entries": row.entries} | made


def _plain(value: Any) -> Any:
    """Lists and numbers; None for what is not finite."""
    if isinstance(value, np.ndarray):
        return [_plain(x) for x in value]
    return float(value) if math.isfinite(value) else None


def show(report: Report, by: str, limit: int) -> None:
    """Prints the report for people.

    Args:
      report: the report.
      by: layer, module or tensor.
      limit: rows of the table at most.

    >>> show(Report(["a", "b"], ["a", "b"], False, [], [], {}, [], 0, 1.0), "layer", 9)
    base a (the first model, as none was named); experts b
    <BLANKLINE>
    verdict
      No tensor could be compared: these models cannot be merged.
    """
    first = "" if report.given else " (the first model, as none was named)"
    click.echo(f"base {report.names[0]}{first}; experts {', '.join(report.experts)}")
    total = report.total
    if total is not None:
        click.echo(
            f"{total.tensors} tensors of {total.entries:,} parameters compared in "
            f"{report.seconds:.1f} s"
        )
        _table(report, by, limit, total)
        _notes(report)
    if report.findings:
        click.echo("\nfindings")
        for line in report.findings:
            click.echo(f"  {line}")
    click.echo("\nverdict")
    for line in report.verdict:
        click.echo(f"  {line}")


def _table(report: Report, by: str, limit: int, total: Row) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = list(_rows(report, by, limit))
    left = 0
    if len(made) > limit:
        kept = sorted(made, key=lambda r: -_most(r.statistics.relative))[:limit]
        left, made = len(made) - limit, kept
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(by, no_wrap=True)
    count, ranked = len(report.experts), total.ranks is not None
    for title in _titles(report, ranked):
        table.add_column(title, justify="right", no_wrap=True)
    for row in [*made, total]:
        if row is total:
            table.add_section()
        table.add_row(row.name, *_cells(row, count, ranked))
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    if left:
        click.echo(f"{left} rows that moved less are left out (--limit)")


def _most(values: np.ndarray) -> float:
    return float(np.nan_to_num(values, nan=0).max(initial=0))


def _titles(report: Report, ranked: bool) -> list[str]:
    experts = report.experts
    many = len(experts) > _APART
    titles = [f"moved %\n{name}" for name in (["all"] if many else experts)]
    titles.append("changed\n%")
    if len(experts) > 1:
        titles += ["cosine", "signs\nagainst %", "by size\n%", "cancels\n%"]
        titles.append(f"top {TOP:.0%}\nshared %")
    return [*titles, "rank\n%"] if ranked else titles


def _cells(row: Row, count: int, ranked: bool) -> list[str]:
    found = row.statistics
    apart = count <= _APART
    cells = [_percent(x) for x in found.relative] if apart else [_range(found.relative)]
    cells.append(_range(found.changed))
    if count > 1:
        cells.append(_range(tally.between(found.cosine), "{:.2f}", 1))
        cells.append(_percent(_mean(found.pair_conflict)))
        cells.append(_percent(_mean(found.pair_weighted)))
        cells.append(_percent(found.cancelled))
        cells.append(_range(tally.between(found.overlap)))
    if ranked:
        cells.append("" if row.ranks is None else _range(row.ranks[0]))
    return cells


def _mean(matrix: np.ndarray) -> float:
    values = tally.between(matrix)
    return float(values.mean()) if len(values) else math.nan


def _range(values: np.ndarray, form: str = "", scale: float = 100) -> str:
    """The least and the greatest, or one where they look the same."""
    if not len(values) or np.isnan(values).all():
        return "-"
    ends = [
        form.format(scale * x + 0.0).replace("-0.00", "0.00") if form else _percent(x)
        for x in (np.nanmin(values), np.nanmax(values))
    ]
    return ends[0] if ends[0] == ends[1] else "..".join(ends)


def _percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    value = 100 * float(share)
    return f"{value:.1f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _notes(report: Report) -> None:
    click.echo(
        "moved: |delta| / |base|; changed: entries that differ; "
        "a..b: least and most of the models or pairs"
    )
    if len(report.experts) > 1:
        click.echo(
            "signs against: of the entries that two changed; by size: weighted with "
            f"|delta|; cancels: lost in a sum;\ntop {TOP:.0%}: of the largest |delta|, "
            "how many are also the other's"
        )
    _ranks(report)
    total = report.total
    assert total is not None
    names, cosine = report.names, total.statistics.weight_cosine
    said = ", ".join(
        f"{names[i]} and {names[j]} {cosine[i, j]:.4f}"
        for i in range(len(names))
        for j in range(i)
    )
    click.echo(f"cosines of the weights themselves: {said}")
    large = total.statistics.large
    click.echo(
        f"changes beyond {LARGE:g}: "
        + ", ".join(
            f"{n} {_percent(x)}%" for n, x in zip(report.experts, large, strict=True)
        )
    )
    for n, name in enumerate(report.experts):
        equal = [each.name for each in report.compared if each.equal[n]]
        if equal and len(equal) < len(report.compared):
            more = f" and {len(equal) - 1} more" if len(equal) > 1 else ""
            click.echo(f"equal to {names[0]} in {name}: {equal[0]}{more}")
    for each in report.compared:
        if each.sums is None and not all(each.equal):
            click.echo(f"buffer {each.name} differs: a merge refuses it")
    if report.apart:
        more = f" and {len(report.apart) - 1} more" if len(report.apart) > 1 else ""
        click.echo(f"not compared: {report.apart[0]}{more}, see the findings")


def _ranks(report: Report) -> None:
    known = sum(each.ranks is not None for each in report.compared)
    if known:
        click.echo(
            "rank: effective rank of a delta, of its smaller side; of "
            f"{known} of {report.matrices} matrices"
        )
    elif report.matrices:
        click.echo("rank: not computed; --ranks all computes it for every matrix")
