"""The tables and the plot of a benchmark of merges."""

import statistics
from typing import Any


def show(found: dict) -> None:
    """Prints what ran and how it stands to the bars."""
    head = "set", "method", "program", "n", "wall", "CPU", "peak", "anonymous", "mapped"
    print(f"\n{head[0]:8}{head[1]:16}{head[2]:12}{head[3]:>2}", end="")
    print("".join(f"{x:>10}" for x in head[4:]), "  (medians; s, GiB)")
    groups: dict[tuple, list[dict]] = {}
    for run in found["runs"]:
        groups.setdefault((run["set"], run["method"], run["program"]), []).append(run)
    for (name, method, program), runs in groups.items():
        values = [[r["seconds"], r["user"] + r["system"]] for r in runs]
        sizes = [[r[x] / 2**30 for x in ("peak", "anonymous", "mapped")] for r in runs]
        both = zip(*(a + b for a, b in zip(values, sizes, strict=True)), strict=True)
        numbers = "".join(f"{statistics.median(column):10.2f}" for column in both)
        print(f"{name:8}{method:16}{program:12}{len(runs):2}{numbers}")
    print(f"\n{'set':8}{'method':16}{'what':26}{'value':>9}   {'from - to':>16}  bar")
    for x in found["bars"]:
        spread = f"{x['low']:.2f} - {x['high']:.2f}"
        bar = "" if x["bar"] is None else f"{x['bar']:g}: " + ("no", "held")[x["held"]]
        value = f"{x['value']:9.2f} {x['unit']:3}"
        print(f"{x['set']:8}{x['method']:16}{x['what']:26}{value}{spread:>15}  {bar}")
    for where, x in found["differences"].items():
        unlike = f", names that only one has: {x['unlike']}" if x["unlike"] else ""
        far = f"the furthest by {x['furthest']:.1e} of its tensor's largest"
        print(f"{where}: {x['equal']:.2%} equal to the peer's numbers, {far}{unlike}")


def draw(pyplot: Any, found: dict) -> Any:
    """Draws how many times faster than the peer ours is."""
    rows = [x for x in found["bars"] if x["what"].startswith("times faster")]
    names = list(dict.fromkeys(x["set"] for x in rows))
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(5.5 * len(names), 4.5), sharex=True, squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        methods = list(dict.fromkeys(x["method"] for x in rows if x["set"] == name))
        for x in (x for x in rows if x["set"] == name):
            at, warm = methods.index(x["method"]), x["what"] == "times faster"
            spread = [[x["value"] - x["low"]], [x["high"] - x["value"]]]
            axis.barh(at + (0.2, -0.2)[warm], x["value"], 0.4, xerr=spread,
                      color=("#a6bddb", "#2b8cbe")[warm])  # fmt: skip
            if x["bar"]:
                axis.plot([x["bar"]] * 2, [at - 0.45, at + 0.45], color="#d7301f")
        axis.set_yticks(range(len(methods)), methods)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{name}: times faster than mergekit")
        axis.set_xlabel("dark: programs kept, light: first run, red: the bar")
    return figure
