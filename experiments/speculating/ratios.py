"""Tokens a second of ways to decode, beside plain decoding and beside a peer."""

from typing import Any

import numpy as np

PLAIN, FIRST = "greedy", "first token"


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each way: tokens a second, and ratios of the sums."""
    return [line for line in _lines(found["runs"]) if line["way"] != FIRST]


def by_group(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The same for the prompts of each group."""
    groups = dict.fromkeys(run["group"] for run in found["runs"])
    return {
        group: table({"runs": [run for run in found["runs"] if run["group"] == group]})
        for group in groups
    }


def _lines(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    plain: dict[str, float] = {}
    first = [run for run in every if run["way"] == FIRST]
    for name in dict.fromkeys(run["way"] for run in every):
        runs = [run for run in every if run["way"] == name]
        seconds, tokens = _sum(runs, "ours")
        # seconds a token, of whole calls and behind the first token
        cost = {"over plain": seconds / tokens}
        if name != FIRST and len(first) == len(runs) and tokens > len(first):
            left = seconds - _sum(first, "ours")[0]
            cost["over plain, decoding"] = left / (tokens - len(first))
        if name == PLAIN or not (plain or name == FIRST):
            plain = cost
        line: dict[str, Any] = {"way": name, "ours": tokens / seconds}
        line |= {kind: plain[kind] / cost[kind] for kind in cost if kind in plain}
        if any("peer" in run for run in runs):
            theirs, count = _sum(runs, "peer")
            line["peer"] = count / theirs
            line["over peer"] = line["ours"] / line["peer"]
        calls = [run["ours"].get("calls") for run in runs]
        if all(calls):
            line["tokens a call"] = tokens / sum(calls)
        apart = [gap for run in runs for gap in run.get("apart", [])]
        line |= {"apart": len(apart), "ties": sum(gap["tie"] for gap in apart)}
        lines.append(line)
    return lines


def _sum(runs: list[dict[str, Any]], kind: str) -> tuple[float, int]:
    """Seconds and new tokens of one side."""
    some = [run[kind] for run in runs if kind in run]
    return sum(x["seconds"] for x in some), sum(x["tokens"] for x in some)


def show(found: dict[str, Any]) -> None:
    """The tables."""
    shown = {
        "ours": "ours",
        "over plain": "x plain",
        "over plain, decoding": "decoding",
        "peer": "peer",
        "over peer": "x peer",
        "tokens a call": "a call",
    }
    print(f"\n{'tokens a second':20}" + "".join(f"{x:>10}" for x in shown.values()))

    def row(line):
        numbers = [line.get(k) for k in shown]
        cells = "".join(f"{'-' if n is None else f'{n:.2f}':>10}" for n in numbers)
        return f"{line['way']:20}{cells}"

    for line in found["table"]:
        print(f"{row(line)}   {line['apart']} texts apart, {line['ties']} by a tie")
    for group, lines in found["groups"].items():
        print(f"\n{group}", *map(row, lines), sep="\n")

    print("\na batch of 8")
    for name, line in found["batch"].items():
        ratio = line["one by one"] / line["seconds"]
        print(
            f"{name:20}{line['tokens'] / line['seconds']:9.2f} tokens a second, "
            f"{ratio:.2f}x of one by one, {line['equal rows']} of 8 rows equal; "
            f"peer: {line.get('peer', '-')[:60]}"
        )
    for capacity in dict.fromkeys(x["capacity"] for x in found["rounds"]):
        own = [x["seconds"] for x in found["rounds"] if x["capacity"] == capacity]
        print(f"a round at {capacity:5} slots: {1e3 * np.median(own):.2f} ms")
    print(f"programs for each width: {found['programs']}")
