"""`collab-jax merge CONFIG OUT` against `mergekit-yaml CONFIG OUT`, whole processes.

Claim: the whole command is at least 2x faster than mergekit 0.1.5's for linear and
slerp, and 5x for TIES, DARE-TIES, DELLA, SCE and breadcrumbs; on 1.1B parameters linear
is within 1.5x of a plain read and write of the same bytes, both flushed to the disk;
the process takes at most the largest tensor x (experts + 3) in float32 and 1 GiB;
20,000 small tensors take under 10 s. These are bars for runs that find their compiled
programs; the first run, which compiles them, is told beside. (Spectral methods, with
2 x experts + 6, are none of mergekit's, so no configuration runs them.)
Command: python experiments/bench_merge.py [--smoke] [--sets S ...] [--methods M ...]
[--repeats R] [--work FOLDER] [--output FILE] [--fresh]; a run that was stopped is taken
up again. Needs the extra `parity`; without mergekit ours is measured alone.
Hardware: Linux, two idle CPU cores, 6 GiB, 12 GB of disk; about three hours, nearly all
of it mergekit's (`--smoke`: seconds, ours alone, a random toy model).
Expected: every bar holds. Programs alternate within each repeat, with the inputs in the
page cache and nothing left to flush; a ratio is the median over the repeats. Seen in
November 2026, SmolLM2, three repeats: linear 4.7x, slerp 4.5x, TIES 6.1x, DARE-TIES
5.6x, DELLA 5.9x, SCE 8.4x, breadcrumbs 5.2x, in 0.5 to 0.7 GiB; single runs of one
command differ by up to a third on that machine. 1.1B parameters, one repeat: linear
7.2x and 1.04 times a flushed copy, slerp 2.8x, TIES 19x, DARE-TIES 7.6x, DELLA 7.4x,
SCE 15x, breadcrumbs 15x; in 0.9 to 2.1 GiB.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from measuring import atomic, models, process, report
from measuring.picture import picture

RESULTS = Path(__file__).parent / "results" / "bench_merge.json"
PACKAGES = "collab-jax", "jax", "jaxlib", "numpy", "mergekit", "torch", "transformers"
PIECE = 1 << 24  # bytes
# What runs, in this order within a repeat: a plain read and write, and one that is
# flushed, as ours is; ours without and with its programs; the peer.
COPY, FLUSHED, FIRST, OURS, PEER = "copy", "copy+fsync", "first", "ours", "mergekit"


UNSET = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"


class Method(NamedTuple):
    """How a method is configured, and how much faster than the peer it should be."""

    experts: tuple[int, ...]  # of `models.NAMES`
    base: bool = True
    own: dict[str, float] = {}  # parameters of every model
    shared: dict[str, float] = {}
    faster: float | None = None
    random: bool = False


_THIN = {"weight": 0.5, "density": 0.3}
METHODS = {
    "linear": Method((0, 1, 2), False, {"weight": 0.3}, faster=2),
    "slerp": Method((0, 1), shared={"t": 0.3}, faster=2),
    "task_arithmetic": Method((1, 2), own={"weight": 0.5}),
    "ties": Method((1, 2), own=_THIN, faster=5),
    "dare_ties": Method((1, 2), own=_THIN, faster=5, random=True),
    "della": Method((1, 2), own=_THIN, faster=5, random=True),
    "sce": Method((1, 2), shared={"select_topk": 0.3}, faster=5),
    "breadcrumbs": Method((1, 2), own=_THIN | {"gamma": 0.01}, faster=5),
    "model_stock": Method((1, 2)),
    "karcher": Method((0, 1, 2), False),
    "arcee_fusion": Method((1,)),
}


class Set(NamedTuple):
    """Three models of one shape, and what is measured on them."""

    make: Callable[[Path], None]
    methods: tuple[str, ...] = tuple(METHODS)
    peer: bool = True
    floor: float | None = None  # linear takes so many times a copy; 0: no bar
    seconds: float | None = None  # and every method at most so many seconds
    bars: bool = True


SETS = {
    "smollm2": Set(models.smollm2),
    "1b": Set(models.random_set(models.llama, 32000, 2048, 22, 5632, 32, 4), floor=1.5),
    # the peer's bookkeeping is quadratic: it would take half an hour
    "small": Set(
        models.random_set(models.mixtral, 64, 32, 26, 32, 2, 2, 256),
        ("linear", "ties"),
        peer=False,
        seconds=10,
    ),
    "smoke": Set(
        models.random_set(models.llama, 256, 64, 2, 128, 4, 2, shard=10**5),
        ("linear",),
        peer=False,
        floor=1.5,
        bars=False,
    ),
}


def recipe(name: str, folder: Path) -> str:
    """The configuration of a method for the models of a folder."""
    import yaml

    method, places = METHODS[name], [str(folder / model) for model in models.NAMES]
    text: dict[str, Any] = {"merge_method": name, "dtype": "bfloat16"}
    text["models"] = [{"model": places[i]} for i in method.experts]
    for model in text["models"] if method.own else []:
        model["parameters"] = dict(method.own)
    text |= {"base_model": places[0]} if method.base else {}
    text |= {"parameters": method.shared} if method.shared else {}
    return yaml.safe_dump(text)


def copy(inputs: list[str], out: str, flushed: bool) -> None:
    """Reads the weights of all models and writes as many bytes as the first has."""
    piece = bytearray(PIECE)
    with open(out, "wb", buffering=0) as target:
        for number, model in enumerate(inputs):
            for path in sorted(Path(model).glob("*.safetensors")):
                with open(path, "rb", buffering=0) as file:
                    while count := file.readinto(piece):
                        if not number:
                            target.write(memoryview(piece)[:count])
        if flushed:
            os.fsync(target.fileno())


def difference(ours: Path, theirs: Path) -> dict:
    """How far results are apart: in the largest number of a tensor, and how often."""
    import numpy as np

    from collab_jax.io.safetensors import open_folder

    a, b = open_folder(ours), open_folder(theirs)
    furthest, equal, count = 0.0, 0, 0
    for name in a.layouts.keys() & b.layouts.keys():
        x, y = (np.asarray(each.read(name), np.float32) for each in (a, b))
        equal, count = equal + int((x == y).sum()), count + x.size
        scale = max(float(np.abs(y).max()), 1e-30)
        furthest = max(furthest, float(np.abs(x - y).max()) / scale)
    unlike = sorted(a.layouts.keys() ^ b.layouts.keys())
    return {"furthest": furthest, "equal": equal / max(count, 1), "unlike": unlike}


class Bench(NamedTuple):
    """Where a benchmark works, and what it found so far."""

    work: Path
    output: Path
    peer: str | None  # the command
    limit: float  # seconds of one run
    found: dict[str, Any]

    def save(self) -> None:
        """Writes what was found."""
        atomic.write_json(self.output, self.found)


def cells(name: str, method: str, peer: bool) -> list[str]:
    """What runs in one repeat."""
    floor = SETS[name].floor is not None and method == "linear"
    return [
        *[COPY, FLUSHED][: 2 * floor],
        FIRST,
        OURS,
        *[PEER][: SETS[name].peer * peer],
    ]


def repeat(bench: Bench, name: str, method: str, number: int) -> None:
    """One run of each program that was not measured yet."""
    here = {"set": name, "method": method, "repeat": number}
    runs = bench.found["runs"]
    done = [run["program"] for run in runs if here.items() <= run.items()]
    missing = [p for p in cells(name, method, bool(bench.peer)) if p not in done]
    if not missing:
        return
    folder = bench.work / name
    config = bench.work / f"{name}-{method}.yml"
    config.write_text(recipe(method, folder), "utf-8")
    programs = bench.work / "programs" / f"{name}-{method}"
    if OURS in missing and FIRST not in missing and not (programs / "kept").exists():
        missing.insert(0, FIRST)  # once more, for its programs; not counted
    outs = {p: bench.work / f"out-{p}" for p in (*missing, OURS, PEER)}
    inputs = [str(folder / models.NAMES[i]) for i in METHODS[method].experts]
    ours = [sys.executable, "-m", "collab_jax", "merge", str(config)]
    again = [sys.executable, __file__, "--copy", *inputs, "--flush"]
    commands = {
        COPY: again[:-1], FLUSHED: again, FIRST: ours, OURS: ours,
        PEER: [str(bench.peer), str(config)],
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in UNSET}
    environment |= {"COLLAB_JAX_CACHE": str(programs), "HF_HUB_OFFLINE": "1"}
    for program in missing:
        if program == OURS and not (programs / "kept").exists():
            continue
        if program == FIRST:
            shutil.rmtree(programs, ignore_errors=True)
        programs.mkdir(parents=True, exist_ok=True)
        _remove(outs[program])
        os.sync()
        for path in folder.glob("*/*"):  # into the page cache
            with path.open("rb", buffering=0) as file:
                while file.read(PIECE):
                    pass
        out = str(outs[program])
        extra = {
            COPY: ["--output", out],
            FLUSHED: ["--output", out],
            PEER: [out, "--quiet"],
        }
        load = round(os.getloadavg()[0], 2)
        log = bench.work / f"{name}-{method}-{program}.log"
        command = [*commands[program], *extra.get(program, [out])]
        cell = process.measure(command, environment, log, bench.limit)
        cell = here | {"program": program} | cell | {"load": load}
        if program == FIRST and "failed" not in cell:
            (programs / "kept").touch()
        told = f"{cell['seconds']:8.1f} s {cell['peak'] / 2**20:8.0f} MiB"
        label = f"{name} {method} {number + 1}: {program}"
        print(f"{label:42}{cell.get('failed', told)}", flush=True)
        if "failed" in cell:
            bench.found["failed"].append(cell)
        elif program not in done:
            cell["session"] = len(bench.found["sessions"]) - 1
            runs.append(cell)
        bench.save()
        if program not in (OURS, PEER):
            _remove(outs[program])
    if not METHODS[method].random and all(outs[p].is_dir() for p in (OURS, PEER)):
        where = f"{name} {method}"
        bench.found["differences"][where] = difference(outs[OURS], outs[PEER])
        bench.save()
    for out in (OURS, PEER):
        _remove(outs[out])


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def bars(found: dict, largest: dict[str, int]) -> list[dict]:
    """What was measured beside what it should be; `held` is None without a bar."""
    rows: list[dict] = []
    by: dict[tuple[str, str], dict[str, dict[int, dict]]] = {}
    for run in found["runs"]:
        kinds = by.setdefault((run["set"], run["method"]), {})
        kinds.setdefault(run["program"], {})[run["repeat"]] = run

    def row(what, values, limit, least=False, unit=""):
        value = statistics.median(values)
        held = None if limit is None else value >= limit if least else value <= limit
        rows.append(
            {"set": name, "method": method, "what": what, "value": round(value, 3),
             "low": round(min(values), 3), "high": round(max(values), 3),
             "repeats": len(values), "unit": unit, "bar": limit, "held": held}
        )  # fmt: skip

    for (name, method), kinds in by.items():
        known, way = SETS[name], METHODS[method]
        judged = known.bars

        def ratios(over, under, kinds=kinds):
            a, b = kinds.get(over, {}), kinds.get(under, {})
            return [a[i]["seconds"] / b[i]["seconds"] for i in a.keys() & b.keys()]

        if values := ratios(PEER, OURS):
            row("times faster", values, way.faster if judged else None, True, "x")
        if values := ratios(PEER, FIRST):
            row("times faster, first run", values, None, True, "x")
        if values := ratios(OURS, FLUSHED):
            row("of a flushed copy", values, known.floor if judged else None, unit="x")
        if values := ratios(OURS, COPY):
            row("of a copy", values, None, unit="x")
        for program, label in (OURS, ""), (FIRST, ", first run"):
            mine = list(kinds.get(program, {}).values())
            if not mine:
                continue
            if known.seconds:
                limit = None if label else known.seconds
                row(
                    f"whole command{label}",
                    [r["seconds"] for r in mine],
                    limit,
                    unit="s",
                )
            need = largest[name] * (len(way.experts) + 3) * 4 / 2**30 + 1
            peaks = [run["peak"] / 2**30 for run in mine]
            row(f"memory{label}", peaks, round(need, 2) if judged else None, unit="GiB")
    return rows


def largest(folder: Path) -> int:
    """Numbers of the largest tensor."""
    from collab_jax.io.safetensors import open_folder

    layouts = open_folder(folder / models.NAMES[0]).layouts
    return max(math.prod(layout.shape) for layout in layouts.values())


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing; 0 where nothing failed and every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a toy model, ours alone")
    real = [name for name in SETS if name != "smoke"]
    parser.add_argument("--sets", nargs="+", choices=real, default=real)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keeps the models")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--fresh", action="store_true", help="forget what FILE holds")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--copy", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--flush", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.copy:
        copy(chosen.copy, str(chosen.output), chosen.flush)
        return 0
    names, repeats = chosen.sets, chosen.repeats
    if chosen.smoke:
        names, repeats = ["smoke"], 1
    output = chosen.output or (Path("bench_smoke.json") if chosen.smoke else RESULTS)
    found: dict[str, Any] = {"sessions": [], "runs": [], "differences": {}}
    if output.exists() and not chosen.fresh:
        found |= json.loads(output.read_text("utf-8"))
    found["failed"] = []  # what failed is tried again
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    peer = shutil.which("mergekit-yaml", path=os.pathsep.join(places))
    if not peer and any(SETS[name].peer for name in names):
        print("mergekit-yaml is not installed (the extra `parity`): ours alone")
    now = process.circumstances(list(PACKAGES))
    print(now["machine"], "load", *now["load"], "commit", now["commit"], flush=True)
    if found["sessions"] and found["sessions"][-1]["commit"] != now["commit"]:
        print(f"{output} holds runs of another commit; --fresh forgets them")
    found["sessions"].append(now)
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as temporary:
        work = (chosen.work or Path(temporary)).resolve()
        bench = Bench(work, output, peer, chosen.timeout, found)
        for name in names:
            (work / name).mkdir(parents=True, exist_ok=True)
            SETS[name].make(work / name)
            found.setdefault("largest", {})[name] = largest(work / name)
            for method in SETS[name].methods:
                if method in (chosen.methods or METHODS):
                    for number in range(repeats):
                        repeat(bench, name, method, number)
    if not any(run["session"] == len(found["sessions"]) - 1 for run in found["runs"]):
        found["sessions"].pop()
    found["bars"] = bars(found, found["largest"])
    bench.save()
    report.show(found)
    if any(x["what"].startswith("times faster") for x in found["bars"]):
        picture(output, report.draw, found)
    return int(bool(found["failed"]) or any(x["held"] is False for x in found["bars"]))


if __name__ == "__main__":
    sys.exit(main())
