"""The performance table of README.md, made from the results of the benchmarks.

Claim: every number of the table is a median, or a ratio of medians, of a run whose
JSON lies in experiments/results.
Command: python experiments/performance.py [--smoke] [--check] [--output FILE]; it
writes the part of README.md between its two marks anew. With `--check` it only says
whether that is what the results say (status 1 if not), with `--smoke` it changes
nothing.
Hardware: none in particular; a second.
Expected: one line for each comparison of bench_decode.py, bench_speculative.py,
bench_distributions.py, bench_merge.py and bench_compile.py that was measured.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from measuring.atomic import write_json

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
HEAD = "what", "ours", "the peer", "ratio", "runs"
MODELS = {"smollm2-135m-instruct": "SmolLM2-135M", "gemma-3-270m": "Gemma-3-270M"}
Found = dict[str, Any]


class Line(NamedTuple):
    """A comparison."""

    what: str
    ours: str
    peer: str
    ratio: str
    runs: str


def decoding(found: Found) -> Iterator[Line]:
    """Tokens a second, ours against the best of each peer, by weights and batch."""
    lines = {(x["engine"], x["batch"]): x for x in found["table"]}
    batches = sorted({x["batch"] for x in found["table"]})
    eager = [f"transformers float32 {how}" for how in ("eager", "compiled")]
    bfloat16 = [name.replace("float32", "bfloat16") for name in eager]
    pairs = [
        ("float32", "ours packed", eager),
        ("float32", "ours packed", ["llama.cpp f32"]),
        ("bfloat16", "ours bfloat16", bfloat16),
        ("bfloat16", "ours bfloat16", ["llama.cpp bf16"]),
        ("bfloat16 throughout", "ours bfloat16 throughout", bfloat16),
        ("bfloat16 throughout", "ours bfloat16 throughout", ["llama.cpp bf16"]),
        ("int8", "ours int8", ["llama.cpp q8_0"]),
        ("int8 in bfloat16", "ours int8 in bfloat16", ["llama.cpp q8_0"]),
    ]
    for key, what in (("decode", "new tokens"), ("prefill", "tokens of the prompt")):
        for batch in batches:
            for weights, own, peers in pairs:
                there = [name for name in peers if (name, batch) in lines]
                if (own, batch) not in lines or not there:
                    continue
                best = max(there, key=lambda name: lines[name, batch][key])
                mine, other = lines[own, batch], lines[best, batch]
                yield Line(
                    f"{name_of(found)}, {weights}, batch {batch}, {what} a second",
                    f"{mine[key]:.1f}",
                    f"{best}: {other[key]:.1f}",
                    f"{mine[key] / other[key]:.2f}",
                    str(mine["runs"]),
                )
    for x in (x for x in found["table"] if x["batch"] == 1 and "of the limit" in x):
        kind, share = x["engine"].removeprefix("ours "), x["of the limit"]
        yield Line(
            f"{name_of(found)}, {_said(kind)}, batch 1, over the limit of the memory",
            f"{x['decode']:.1f}",
            f"limit: {x['decode'] / share:.1f}",
            f"{share:.2f}",
            str(x["runs"]),
        )
    costs = {(x["kind"], x["tokens"]): x["seconds"] for x in found["costs"]}
    for kind in dict.fromkeys(x["kind"] for x in found["costs"]):
        eight, one = 1e3 * costs[kind, 8], 1e3 * costs[kind, 1]
        yield Line(
            f"{name_of(found)}, {_said(kind)}, a call of 8 tokens over one of 1, ms",
            f"{eight:.1f} over {one:.1f}",
            "",
            f"{eight / one:.2f}",
            str(sum(x["kind"] == kind and x["tokens"] == 1 for x in found["widths"])),
        )


def _said(kind: str) -> str:
    return kind if " " in kind else f"{kind} weights"


def name_of(found: Found) -> str:
    """The model of a file."""
    name = found["setting"].get("model", "SmolLM2-135M")
    random = name in ("1b", "8b")
    return f"a random Llama of {name.upper()}" if random else MODELS.get(name, name)


def speculation(found: Found) -> Iterator[Line]:
    """Tokens a second with drafts, ours against assisted generation."""
    name = name_of(found)
    yield from _against(found, f"{name} with drafts")
    for line in found.get("table", []):
        if "over plain, decoding" in line and line["way"] != "greedy":
            yield Line(
                f"{name} with drafts: {line['way']}, over our own plain decoding, "
                "prompts not counted",
                f"{line['tokens a call']:.2f} tokens a call",
                "",
                f"{line['over plain, decoding']:.2f}",
                _repeats(found, line),
            )


def distributions(found: Found) -> Iterator[Line]:
    """Joined models against a processor of logits; stacked ones against one."""
    yield from _against(found, "SmolLM2-135M joined")
    for count, x in found.get("stacked", {}).items():
        one, stacked = (statistics.median(x["seconds"][k]) for k in ("one", "stacked"))
        yield Line(
            f"{count} stacked SmolLM2-135M over {count} times one, seconds",
            f"{stacked:.2f}",
            f"one: {one:.2f}",
            f"{stacked / one / int(count):.2f}",
            str(len(x["seconds"]["one"])),
        )


def _against(found: Found, subject: str) -> Iterator[Line]:
    for x in found.get("table", []):
        if x.get("peer"):
            yield Line(
                f"{subject}: {x['way']}, new tokens a second",
                f"{x['ours']:.1f}",
                f"transformers: {x['peer']:.1f}",
                f"{x['over peer']:.2f}",
                _repeats(found, x),
            )


def _repeats(found: Found, line: dict[str, Any]) -> str:
    """How often a way ran."""
    runs = (run for run in found["runs"] if run["way"] == line["way"])
    return str(len({run["repeat"] for run in runs}))


def merging(found: Found) -> Iterator[Line]:
    """Whole commands, ours against mergekit's."""
    runs: dict[tuple, list[float]] = {}
    for run in found["runs"]:
        key = run["set"], run["method"], run["program"]
        runs.setdefault(key, []).append(run["seconds"])
    for bar in (x for x in found["bars"] if x["what"] == "times faster"):
        key = bar["set"], bar["method"]
        ours, peer = (_seconds(runs.get((*key, name))) for name in PROGRAMS)
        yield Line(
            f"merge {bar['method']}, {SETS.get(bar['set'], bar['set'])}, seconds",
            ours,
            f"mergekit: {peer}",
            f"{bar['value']:.1f} times faster",
            str(bar["repeats"]),
        )


PROGRAMS = "ours", "mergekit"
SETS = {"smollm2": "three SmolLM2-135M", "1b": "three of 1.1B parameters"}


def _seconds(times: list[float] | None) -> str:
    return f"{statistics.median(times):.1f}" if times else "?"


def starting(found: Found) -> Iterator[Line]:
    """Start-up of whole processes."""
    times: dict[str, list[float]] = {}
    for run in found["runs"]:
        times.setdefault(run["what"], []).append(run["seconds"])
    middle = {what: statistics.median(seconds) for what, seconds in times.items()}
    plain, ours = "import jax", "import jax, collab_jax"
    yield Line(
        "import collab_jax beyond import jax, seconds",
        f"{middle[ours] - middle[plain]:.2f}",
        "",
        "",
        str(len(times[ours])),
    )
    peer = middle.get("first tokens, transformers")
    for what in ("first tokens, nothing compiled", "first tokens, as before"):
        against = f"transformers: {peer:.1f}" if peer else ""
        ratio = f"{middle[what] / peer:.2f}" if peer else ""
        yield Line(
            f"a process that writes its {what}, seconds",
            f"{middle[what]:.1f}",
            against,
            ratio,
            str(len(times[what])),
        )


PARTS = {  # by script; a result is named after it, and after the model that it is of
    "bench_decode": decoding,
    "bench_speculative": speculation,
    "bench_distributions": distributions,
    "bench_merge": merging,
    "bench_compile": starting,
}


def machine(found: Found) -> str:
    """Where and with what a file was measured."""
    on = found.get("circumstances") or found.get("run") or found.get("on")
    if on is None and "sessions" in found:
        on = found["sessions"][-1]
    versions = (on or {}).get("versions") or found.get("packages", {})
    names = "jax", "torch", "transformers", "mergekit", "llama-cpp-python"
    known = [f"{name} {versions[name]}" for name in names if name in versions]
    device = (on or {}).get("machine") or f"{found.get('cores')} cores"
    device = re.sub(r"(\d+) kB", lambda x: f"{int(x[1]) / 2**20:.0f} GiB", device)
    return f"{device}; {', '.join(known)}"


def made(folder: Path) -> tuple[str, list[dict[str, str]]]:
    """The part of the README, and its lines.

    Args:
      folder: with the results of the benchmarks; what is not there is left out.
    """
    text, every = [], []
    paths = [(name, x) for name in PARTS for x in sorted(folder.glob(f"{name}*.json"))]
    for script, path in paths:
        found = json.loads(path.read_text("utf-8"))
        lines = list(PARTS[script](found))
        every += [{"file": path.stem} | line._asdict() for line in lines]
        text.append(f"`{script}.py` ({machine(found)}):\n")
        text.append(_row(HEAD) + "\n" + _row(["---"] * len(HEAD)))
        text += [_row(line) for line in lines]
        text[-1] += "\n"
    return "\n".join(text), every


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Writes, or checks; 1 where the README says something else."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="change nothing")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--output", type=Path, help="for the lines as JSON")
    chosen = parser.parse_args(arguments)
    text, lines = made(RESULTS)
    print(text)
    if chosen.output:
        write_json(chosen.output, {"lines": lines})
    whole = README.read_text("utf-8")
    before, _, rest = whole.partition(BEGIN)
    old, mark, after = rest.partition(END)
    if not mark:
        print(f"{README} has no part between {BEGIN} and {END}", file=sys.stderr)
        return 1
    new = f"\n\n{text}\n"
    if chosen.check:
        if old != new:
            print(f"{README} says something else; run this without --check")
        return int(old != new)
    if not chosen.smoke:
        README.write_text(before + BEGIN + new + END + after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
