"""Programs of the library, compiled for TPUs and GPUs that need not be here.

Claim: the compilers of TPUs and GPUs take every kind of program whole: decoding,
sampling, int8, drafts, joined models and beams of an 8B model, trees, merges and
training of four of its layers, and decoding of a 70B one. A chip needs its part of
weights and cache and little besides; no turn of a decoding loop copies a cache, except
to move beams and, on a GPU, four of the drafter's of a tree; and none has loops but to
draft, to cut a law, and to move beams. This says what is run there, and not how fast.
Command: python experiments/accelerators.py [--smoke] [--on TARGET ...]
[--programs NAME ...] [--model NAME] [--again] [--output FILE]
Hardware: any; two CPU cores, 16 GiB and 20 minutes, with the extras `tpu` and `cuda`:
targets whose compiler is not installed are left out (`--smoke`: a toy model on eight
forced CPU devices, seconds).
Expected: (November 2026, jax 0.10.2) the table of experiments/README.md.

Columns: seconds to compile; GB of a chip for what the program is given and for what it
needs besides; in a turn of its last loop the operations that are started (on a GPU:
kernels), loops inside, MB of large arrays copied in the main memory, and KB that a chip
has of exchanges with others.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from measuring.atomic import write_json

RESULTS = Path(__file__).parent / "results" / "accelerators.json"
SPARE = 0.95  # share of a chip's memory that a program may take
SMOKE = "greedy", "int8", "ensemble of 4", "merge, TIES of 2"
LARGE = {"4 x TPU v5p": ("greedy",), "8 x H200": ("greedy", "drafted")}  # for 70B alone


def compiled(target: Any, name: str, work: Any) -> dict:
    """One program for one target."""
    import jax
    from compiling import programs, targets, text

    members = programs.MEMBERS.get(name, 1) if target.count > 1 else 1
    bench = programs.Bench(targets.devices(target), work, members)
    program = programs.PROGRAMS[name](bench)
    run = jax.jit(program.run, donate_argnums=program.donated)
    with targets.as_if_on(target):
        traced = run.trace(*program.arguments)
        lowered = traced.lower(lowering_platforms=(target.platform,))
    began = time.perf_counter()
    done = lowered.compile()
    seconds = time.perf_counter() - began
    memory = done.memory_analysis()
    given, besides = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    besides += memory.output_size_in_bytes - memory.alias_size_in_bytes
    turn = text.last_loop(done.as_text())
    room = SPARE * target.memory * 1e9
    return {
        "seconds": seconds,
        "given": given / 1e9,
        "besides": besides / 1e9,
        "fits": not room or given + besides <= room,
        "turn": None if turn is None else turn._asdict(),
    }


def shown(row: dict) -> str:
    """A line of the table."""
    turn = row["turn"]
    cells = [row["program"], row["model"], row["on"], f"{row['seconds']:.0f}"]
    cells += [f"{row['given']:.2f}", f"{row['besides']:.2f}"]
    cells[-1] += "" if row["fits"] else ", too much"
    if turn is None:
        cells += ["-"] * 4
    else:
        cells += [str(turn["started"]), str(turn["loops"])]
        cells += [f"{turn['copied'] / 1e6:.0f}", f"{turn['sent'] / 1e3:.0f}"]
    return f"| {' | '.join(cells)} |"


def wanted(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(target, model, program), in the order of the table."""
    from compiling.programs import LAYERED, PROGRAMS, SHORT

    names = options.programs or (SMOKE if options.smoke else [*PROGRAMS])

    def model(name: str) -> str:
        whole = options.model != "8B" or name not in LAYERED
        return options.model if whole else SHORT

    found = []
    for on in options.on:
        if options.model == "8B" and on in LARGE and not options.programs:
            found += [(on, "70B", name) for name in LARGE[on]]
        else:
            found += [(on, model(name), name) for name in names]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compiles, prints the table and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--on", nargs="+", metavar="TARGET")
    parser.add_argument("--programs", nargs="+", metavar="NAME")
    parser.add_argument("--model", default="8B")
    parser.add_argument(
        "--again", action="store_true", help="what is known already too"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    report_file = Path("smoke.json") if options.smoke else RESULTS
    options.output = options.output or report_file
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.smoke:
        forced = "--xla_force_host_platform_device_count=8"
        os.environ.setdefault("XLA_FLAGS", forced)
    import jax
    from compiling.programs import MODELS, PROGRAMS, Work
    from compiling.targets import TARGETS, missing

    if options.smoke:
        options.model, options.on = "toy", options.on or ["8 x CPU"]
    options.on = options.on or [on for on in TARGETS if TARGETS[on].memory]
    for name, known in (("on", TARGETS), ("programs", PROGRAMS)):
        for value in getattr(options, name) or ():
            if value not in known:
                parser.error(f"--{name} {value!r}: one of {', '.join(known)} expected")
    if options.model not in MODELS:
        parser.error(f"--model {options.model!r}: one of {', '.join(MODELS)} expected")
    for on in [*options.on]:
        if (why := missing(TARGETS[on])) is not None:
            print(f"{on} is left out: {why}")
            options.on.remove(on)
    report: dict[str, Any] = {"rows": []}
    if options.output.exists():
        report = json.loads(options.output.read_text("utf-8"))
    head = "program", "model", "on", "s", "GB given", "besides", "started", "loops"
    print(f"| {' | '.join((*head, 'MB', 'KB'))} |\n|{'---|' * 10}")
    good = True
    for on, model, name in wanted(options):
        rows, prompt, new = (8, 24, 8) if options.smoke else (8, 2048, 256)
        work = Work(model, rows, prompt, new)
        key = {"program": name, "on": on, **work._asdict(), "jax": jax.__version__}
        same = [row for row in report["rows"] if key.items() <= row.items()]
        if same and not options.again:
            row = same[0]
        else:
            row = key | compiled(TARGETS[on], name, work)
            report["rows"] = [each for each in report["rows"] if each not in same]
            report["rows"].append(row)
        good &= row["fits"]
        print(shown(row), flush=True)
        write_json(options.output, report)
    print(f"report: {options.output}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
