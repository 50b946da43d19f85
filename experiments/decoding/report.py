"""The tables and the plot of the decoding benchmark."""

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """An earlier result."""
    return json.loads(path.read_text("utf-8"))


def show(found: dict[str, Any]) -> None:
    """Prints what was measured and how it stands to the bars."""
    limits = found["limits"]
    one, all_ = limits["bandwidth of one thread"], limits["bandwidth"]
    print(
        f"\nreads {one / 1e9:.1f} GB/s with one thread, {all_ / 1e9:.1f} with all; "
        f"float32 products {limits['products'] / 1e9:.0f} GFLOP/s; native library "
        f"{found['native']}"
    )
    head = "prefill", "decode", "slowest", "fastest"
    print(f"\n{'tokens a second':32}{'B':>3}{'n':>3}", end="")
    print("".join(f"{x:>9}" for x in head), "  of the limit")
    for x in sorted(found["table"], key=lambda x: x["batch"]):
        cells = "".join(f"{x[name]:9.1f}" for name in head)
        limit = f"{x['of the limit']:12.0%}" if "of the limit" in x else " " * 12
        text = "  another text" if x["same text"] is False else ""
        print(f"{x['engine']:32}{x['batch']:3}{x['runs']:3}{cells}{limit}{text}")
    print("\nmilliseconds of a call of T tokens, and over one")
    for x in found["costs"]:
        if x["tokens"] == 1:
            print(f"\n{x['kind']:20}", end="")
        print(
            f"  {x['tokens']:2}: {1e3 * x['seconds']:7.2f} ({x['over one']:.2f})",
            end="",
        )
    print("\n\nnats a token of real text" if found["losses"] else "\n")
    for kind, loss in found["losses"].items():
        more = loss - found["losses"]["plain"]
        print(
            f"{kind:20}{loss:9.4f} ({more:+.5f}), {found['bytes'][kind] / 1e6:.0f} MB"
        )
    for name, reason in found["failed"].items():
        print(f"{name} failed: {reason}")
    print()
    for x in found["bars"]:
        held = "held" if x["held"] else "NOT HELD"
        print(f"{x['what']:56}{x['value']:6.2f}  bar {x['bar']}: {held}")


def draw(pyplot: Any, found: dict[str, Any]) -> Any:
    """Draws tokens a second by batch, and the cost of wide calls."""
    batches = sorted({x["batch"] for x in found["table"]})
    count = len(batches) + 1
    figure, axes = pyplot.subplots(1, count, figsize=(4.5 * count, 4))
    for axis, batch in zip(axes, batches, strict=False):
        rows = [x for x in found["table"] if x["batch"] == batch]
        colors = ["#2b8cbe" if x["engine"][:4] == "ours" else "#bdbdbd" for x in rows]
        spread = [
            [x["decode"] - x["slowest"] for x in rows],
            [x["fastest"] - x["decode"] for x in rows],
        ]
        names = [x["engine"] for x in rows]
        axis.barh(names, [x["decode"] for x in rows], xerr=spread, color=colors)
        axis.invert_yaxis()
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("new tokens a second")
    last = axes[-1]
    for kind in dict.fromkeys(x["kind"] for x in found["costs"]):
        rows = [x for x in found["costs"] if x["kind"] == kind]
        seconds = [1e3 * x["seconds"] for x in rows]
        last.plot([x["tokens"] for x in rows], seconds, "o-", label=kind)
    last.set_title("a call of T tokens")
    last.set_ylabel("ms")
    last.set_xscale("log", base=2)
    last.set_yscale("log", base=2)
    last.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
