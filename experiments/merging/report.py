"""What was measured, as a summary, a table and a plot."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

PLAIN, SCALED = "uniform soup", "task arithmetic"
MARGIN = 0.001  # of the share; what is nearer is no difference
REFERENCES = ("base", "joint")


def shares(losses: Sequence[float], base: Sequence[float], own: Sequence[float]):
    """Share of each expert's gain that is kept: 0 is the base, 1 the experts.

    Args:
      losses: of a model on each task.
      base: of the base.
      own: of each task's own expert.

    Raises:
      ValueError: for an expert without a gain.
    """
    if any(o >= b for b, o in zip(base, own, strict=True)):
        raise ValueError(
            f"the losses of the experts are {own}, those of the base {base}: a gain on "
            "every task is expected; train longer, or test with more rows"
        )
    rows = zip(losses, base, own, strict=True)
    return [(b - loss) / (b - o) for loss, b, o in rows]


def summary(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[dict]:
    """Mean and spread of each method, the best first.

    Args:
      rows: one for each model that was tested: method, setting, seed, draw, losses and
        shares of the tasks, and the mean of the shares.
      tasks: their names.
    """
    plain = {
        each: {row["seed"]: row["share"] for row in rows if row["method"] == each}
        for each in (PLAIN, SCALED)
    }
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        values = [row["share"] for row in own]
        seeds = list(dict.fromkeys(row["seed"] for row in own))
        gaps = {
            each: [
                mean(row["share"] for row in own if row["seed"] == seed) - known[seed]
                for seed in seeds
                if seed in known
            ]
            for each, known in plain.items()
        }
        found.append(
            {
                "method": name,
                "setting": own[0]["setting"],
                "share": mean(values),
                "spread": stdev(values) if len(values) > 1 else None,
                "models": len(values),
                "seeds": len(seeds),
                "losses": {
                    task: mean(row["losses"][task] for row in own) for task in tasks
                },
                "shares": {
                    task: mean(row["shares"][task] for row in own) for task in tasks
                },
                # mean difference of the share, and with how many seeds it is above
                "against": {
                    each: {"mean": mean(gap), "above": sum(g > MARGIN for g in gap)}
                    for each, gap in gaps.items()
                    if gap
                },
            }
        )
    return sorted(found, key=lambda each: -each["share"])


def show(report: dict[str, Any]) -> None:
    """Prints the table."""
    tasks = report["tasks"]
    table = Table(title=f"{report['model']}: loss in nats a token, held-out rows")
    table.add_column("method")
    table.add_column("setting")
    for task in tasks:
        table.add_column(task, justify="right")
    for column in ("share of gain", "spread", "models", "> soup", "> arithmetic"):
        table.add_column(column, justify="right")
    for each in report["methods"]:
        spread = each["spread"]
        table.add_row(
            each["method"],
            each["setting"],
            *(f"{each['losses'][task]:.3f}" for task in tasks),
            f"{each['share']:.3f}",
            "" if spread is None else f"{spread:.3f}",
            str(each["models"]),
            *(
                f"{each['against'][known]['above']}/{each['seeds']}"
                if known in each["against"]
                else ""
                for known in (PLAIN, SCALED)
            ),
        )
    # a table that is read in a file is as wide as it has to be
    Console(width=None if Console().is_terminal else 150).print(table)
    for known in (PLAIN, SCALED):
        better = [
            each["method"]
            for each in report["methods"]
            if each["against"].get(known, {"above": 0})["above"] == each["seeds"]
        ]
        print(f"above the {known} with every seed: {', '.join(better) or 'none'}")
    if report["missing"]:
        print(f"not measured: {', '.join(report['missing'])}")


def draw(pyplot: Any, report: dict[str, Any]) -> Any:
    """Draws the methods by their share of the gain."""
    found = report["methods"][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(found) + 1.2))
    reference = {*REFERENCES, PLAIN}
    for place, each in enumerate(found):
        name = each["method"]
        known = name in reference or name.startswith("expert")
        colour = "tab:grey" if known else "tab:blue"
        points = [row["share"] for row in report["models"] if row["method"] == name]
        axes.plot(points, [place] * len(points), ".", color=colour, alpha=0.5)
        axes.errorbar(
            each["share"], place, xerr=each["spread"] or 0, fmt="o", color=colour
        )
    for each in found:
        if each["method"] in reference:
            axes.axvline(each["share"], color="tab:grey", lw=0.8, ls=":")
    axes.set_yticks(range(len(found)), [each["method"] for each in found], fontsize=8)
    axes.set_xlabel("share of the experts' gain that is kept, mean of the tasks")
    axes.set_title(f"{report['model']}: {', '.join(report['tasks'])}", fontsize=10)
    return figure
