"""Decoding on a CPU with plain and packed weights, beside transformers and llama.cpp.

Claim: with packed float32 weights a text of batch 1 is written at least 2x as fast as
by the faster of transformers eager and compiled, and as fast as by llama.cpp; bfloat16
weights are at least 2x our own plain float32 and 0.9x llama.cpp's bf16, int8 at least
0.9x its q8_0; a batch of 8 is at least 2x transformers; a prompt is read at least as
fast as by the best peer; a call of 8 tokens costs at most 1.5x one of 1.
Command: python experiments/bench_decode.py [--smoke] [--model NAME] [--data DIR]
[--repeats R] [--batches B ...] [--engines NAME ...] [--alone ENGINE] [--threads N]
[--output FILE] [--fresh]; a run that was stopped is taken up again. Peers are measured
where `torch` (the extra `parity`) and `llama-cpp-python` are installed.
Data: DIR or $COLLAB_JAX_DATA with gsm8k/test.jsonl (openai/grade-school-math) and
spec_bench/question.jsonl (hemingkx/Spec-Bench), for the loss by rounding alone; without
it a paragraph of this project.
Hardware: two idle CPU cores, 8 GiB, 13 for `8b`; about 40 minutes, much of it compiling
(`--smoke`: seconds, ours alone, a random toy model).
Expected: (November 2026, three repeats, five of calls of a few tokens) new tokens a
second, batch 1: packed float32 55 (transformers 20, llama.cpp 54), bfloat16 101 and
throughout 105 (28 and 101), int8 145 and in bfloat16 151 (llama.cpp 118); that is 99,
91, 95, 66 and 69 percent of what the memory gave that day. Batch 8: 314, 392, 495, 486
and 509 (transformers 92 and 151), batch 32: 500, 502, 728, 602 and 701 (176 and 319).
A prompt is read in float32 1.2 times as fast as by the best peer, in bfloat16
throughout 1.3 times, 1.1 in a batch of 8, by int8 2.2 and in bfloat16 2.8 times as
fast as by q8_0; bfloat16 weights alone, whose activations stay float32, read it at
0.82 and 0.62 times. Eight tokens cost 1.24 times one in packed float32, 1.30 in
bfloat16 throughout. Not held: with bfloat16 weights alone 1.53 (1.49 in a run before),
int8 1.67, in bfloat16 1.60; their products alone are 10.8, 7.2 and 5.1 ms of 17.0, 11.9
and 10.6 at the peak of both cores. Rounding to int8 loses 0.006 nats a
token, to bfloat16 0.0006 or less. Memory and delay of all but the last two kinds are of
an earlier day. A Llama of 1.1B (`--model 1b --batches 1 8`) writes 8.3, 16 and 29
tokens a second, 99 to 84 percent of what the memory gives; eight tokens cost 1.36 times
one, 1.18 in bfloat16 throughout and 1.31 with int8 in it. One of 8B in int8 (`--model
8b --batches 1`) writes 4.4, which is all that the memory gives. Gemma-3-270M (`--model
gemma-3-270m --batches 1 8`; no llama.cpp): float32 2.9 and 3.9 times transformers,
prompts 1.6 and 1.3 times, bfloat16 throughout 2.4 and 2.8 times, prompts 1.3 and 1.2.

`bfloat16 throughout` and `int8 in bfloat16` are models in bfloat16, as the peers' are;
the other kinds round matrices alone. SmolLM2-135M, or NAME: another model, or `1b` or
`8b`, a Llama of that size with random weights, ours alone; int8 alone of 8b. A prompt
of 129 tokens and 64 new ones, greedy. Calls of a few tokens have five repeats.
Engines take turns, who comes first rotates from repeat to repeat, and each runs once
untimed before. Ratios are those of medians. The limit of a token is the bytes of all
weights that it reads over the bandwidth that all threads measured together. Memory and
the delay of the first text are those of processes that hold one engine each, compiling
included.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from decoding import alone, limits, ours, peers, report
from measuring.atomic import write_json
from measuring.options import options
from measuring.picture import picture
from measuring.process import circumstances

from collab_jax import native
from collab_jax.commands.progress import progress

RESULTS = Path(__file__).parent / "results"
PACKAGES = ["collab-jax", "jax", "jaxlib", "numpy", "torch", "transformers"]
PACKAGES += ["llama-cpp-python"]
BATCHES = 1, 4, 8, 32
WIDTHS = 1, 2, 4, 8, 16
LENGTH, NEW = 129, 64
CALLS = 5  # repeats of calls of a few tokens


def engines(subject: ours.Subject, threads: int) -> dict[str, tuple[Callable, int]]:
    """How to make everything that is compared, and the widest batch it takes."""
    own = {
        f"ours {kind}": (lambda kind=kind: ours.Ours(subject, kind), 64)
        for kind in subject.params
    }
    return own | peers.all_of(subject, threads)


def compare(
    subject: ours.Subject,
    every: dict[str, tuple[Callable, int]],
    batches: list[int],
    repeats: int,
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Times what is missing; an engine that fails is left out, with its reason."""
    made: dict[str, Any] = {}
    known = {(x["engine"], x["batch"], x["repeat"]) for x in found["runs"]}
    with progress("runs", len(batches) * repeats * len(every)) as advance:
        for batch in batches:
            prompts, warm = subject.prompts(batch), set()
            for repeat in range(repeats):
                names = [name for name, (_, most) in every.items() if batch <= most]
                turn = repeat % len(names)
                for name in names[turn:] + names[:turn]:
                    advance()
                    if (name, batch, repeat) in known or name in found["failed"]:
                        continue
                    try:
                        if name not in made:
                            made[name] = every[name][0]()
                        if name not in warm:
                            made[name](prompts)
                            warm.add(name)
                        timing = made[name](prompts)
                    except Exception as error:
                        if name.startswith("ours"):
                            raise
                        said = str(error).strip().splitlines() or [repr(error)]
                        found["failed"][name] = said[0][:200]
                        continue
                    line = {"engine": name, "batch": batch, "repeat": repeat}
                    line |= {"prefill": timing.prefill, "decode": timing.decode}
                    line["text"] = timing.tokens[0][: subject.new]
                    found["runs"].append(line)
                    save()


def widths(subject: ours.Subject, repeats: int, found: dict, save: Callable) -> None:
    """Seconds of a call of T tokens, kinds and T taking turns."""
    known = {(x["kind"], x["tokens"], x["repeat"]) for x in found["widths"]}
    runs = {kind: ours.Wide(subject, kind) for kind in subject.params}
    warm = set()
    for repeat in range(repeats):
        for kind, run in runs.items():
            for count in WIDTHS:
                if (kind, count, repeat) in known:
                    continue
                if (kind, count) not in warm:
                    run(count)
                    warm.add((kind, count))
                line = {"kind": kind, "tokens": count, "repeat": repeat}
                found["widths"].append(line | {"seconds": run(count)})
        save()


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the claim says, and what was measured."""
    rates = {(line["engine"], line["batch"]): line for line in found["table"]}
    wide = {(line["kind"], line["tokens"]): line["seconds"] for line in found["costs"]}
    torch = "transformers float32 eager", "transformers float32 compiled"
    half = [name.replace("float32", "bfloat16") for name in torch]
    whole, short = f"ours {ours.WHOLE}", f"ours {ours.SHORT}"
    lines = []

    def bar(what, own, peers, least, batch=1, rate="decode") -> None:
        known = [rates[x, batch][rate] for x in peers if (x, batch) in rates]
        if (own, batch) in rates and known:
            value = rates[own, batch][rate] / max(known)
            lines.append(
                {"what": what, "value": value, "bar": least, "held": value >= least}
            )

    for batch in (1, 8):
        what = f"float32, batch {batch}, over transformers"
        bar(what, "ours packed", torch, 2.0, batch=batch)
    bar("float32 over llama.cpp f32", "ours packed", ("llama.cpp f32",), 1.0)
    bar("bfloat16 over plain float32", "ours bfloat16", ("ours plain",), 2.0)
    bar("bfloat16 over llama.cpp bf16", "ours bfloat16", ("llama.cpp bf16",), 0.9)
    bar(f"{ours.WHOLE} over plain float32", whole, ("ours plain",), 2.0)
    bar(f"{ours.WHOLE} over llama.cpp bf16", whole, ("llama.cpp bf16",), 0.9)
    bar("int8 over llama.cpp q8_0", "ours int8", ("llama.cpp q8_0",), 0.9)
    bar(f"{ours.SHORT} over llama.cpp q8_0", short, ("llama.cpp q8_0",), 0.9)
    for batch in (1, 8):
        what = f"prompt, float32, batch {batch}, over the best peer"
        all_of = (*torch, "llama.cpp f32")
        bar(what, "ours packed", all_of, 1.0, batch=batch, rate="prefill")
        what = f"prompt, {ours.WHOLE}, batch {batch}, over the best peer"
        bar(what, whole, (*half, "llama.cpp bf16"), 1.0, batch=batch, rate="prefill")
        for name in ("ours int8", short):
            what = f"prompt, {name[5:]}, batch {batch}, over llama.cpp q8_0"
            bar(what, name, ("llama.cpp q8_0",), 1.0, batch=batch, rate="prefill")
    for kind in ours.KINDS[1:]:
        if (kind, 8) in wide:
            value = wide[kind, 8] / wide[kind, 1]
            what = f"8 tokens over one, {kind}, at most"
            line = {"what": what, "value": value, "bar": 1.5, "held": value <= 1.5}
            lines.append(line)
    return lines


def table(found: dict[str, Any], sizes: dict[str, int], length: int, new: int) -> None:
    """Medians and spread of every engine and batch; the cost of wide calls."""
    groups: dict[tuple, list[dict]] = {}
    for run in found["runs"]:
        groups.setdefault((run["engine"], run["batch"]), []).append(run)
    plain = next(
        (r["text"] for r in found["runs"] if r["engine"] == "ours plain"), None
    )
    found["table"] = []
    for (name, batch), runs in groups.items():
        times = sorted(run["decode"] for run in runs)
        middle = statistics.median(times)
        line = {
            "engine": name,
            "batch": batch,
            "runs": len(runs),
            "prefill": batch * length / statistics.median(r["prefill"] for r in runs),
            "decode": batch * new / middle,
            "slowest": batch * new / times[-1],
            "fastest": batch * new / times[0],
            "same text": None if plain is None else runs[0]["text"] == plain,
        }
        if (kind := name.removeprefix("ours ")) in sizes:
            seconds = sizes[kind] / found["limits"]["bandwidth"]
            line["of the limit"] = seconds * new / middle
        found["table"].append(line)
    found["costs"] = []
    for kind in sizes:
        for count in WIDTHS:
            times = [
                x["seconds"]
                for x in found["widths"]
                if (x["kind"], x["tokens"]) == (kind, count)
            ]
            seconds = statistics.median(times)
            first = found["costs"][-(WIDTHS.index(count))] if count > 1 else None
            over = seconds / first["seconds"] if first else 1.0
            found["costs"].append(
                {"kind": kind, "tokens": count, "seconds": seconds, "over one": over}
            )


def main(arguments: list[str] | None = None) -> int:
    """Measures; 0 where it ran, whatever the bars say."""
    parser = options(__doc__)
    parser.add_argument(
        "--model", default=ours.NAME, help="1b or 8b for a Llama with random weights"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="by first letters")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--alone", metavar="ENGINE", help="its first texts, as JSON")
    parser.add_argument("--fresh", action="store_true", help="forget what FILE holds")
    chosen = parser.parse_args(arguments)
    own = "" if chosen.model == ours.NAME else f"_{chosen.model.rpartition('/')[2]}"
    output = chosen.output or RESULTS / f"bench_decode{own}.json"
    if chosen.smoke and not chosen.output:
        output = Path("smoke.json")
    if chosen.smoke:
        chosen.repeats, chosen.batches = 1, [1, 2]
    began = time.perf_counter()
    if chosen.smoke:
        subject = ours.toy()
    else:
        kinds = ours.KINDS
        if chosen.alone:
            kinds = (chosen.alone.removeprefix("ours "),)
        if chosen.model in ours.SHAPES:
            subject = ours.shape(chosen.model, LENGTH, NEW, kinds)
        else:
            subject = ours.real(chosen.model, chosen.data, LENGTH, NEW, kinds)
    every = engines(subject, chosen.threads)
    if chosen.alone:
        if chosen.alone not in every:
            parser.error(f"no engine {chosen.alone!r}; there are {', '.join(every)}")
        alone.here(every[chosen.alone][0], subject, began)
        return 0
    if chosen.engines:
        wanted = tuple(chosen.engines)
        every = {name: x for name, x in every.items() if name.startswith(wanted)}
    if not every:
        parser.error("no engine begins so")
    setting = {"length": subject.length, "new": subject.new, "smoke": chosen.smoke}
    setting["threads"] = chosen.threads
    if chosen.model != ours.NAME:
        setting["model"] = chosen.model
    found: dict[str, Any] = {"setting": setting, "runs": [], "widths": []}
    found |= {"failed": {}, "native": native.status()}
    if output.exists() and not chosen.fresh:
        before = report.read(output)
        found = before if before.get("setting") == setting else found
    found["circumstances"] = circumstances(PACKAGES)

    def save() -> None:
        write_json(output, found)

    small = 1 << 24 if chosen.smoke else 1 << 29
    if "limits" not in found:  # those of the time when runs began
        found["limits"] = {
            "bandwidth of one thread": limits.bandwidth(1, small),
            "bandwidth": limits.bandwidth(chosen.threads, small),
            "products": limits.products(256 if chosen.smoke else 2048),
        }
    save()
    compare(subject, every, chosen.batches, chosen.repeats, found, save)
    widths(subject, 1 if chosen.smoke else max(chosen.repeats, CALLS), found, save)
    if "losses" not in found:
        found["losses"] = ours.losses(subject)
    sizes = {kind: ours.read(params) for kind, params in subject.params.items()}
    found["bytes"] = sizes
    names = list(every)[:1] if chosen.smoke else list(every)
    del every, subject  # each process needs the room for a model of its own
    gc.collect()
    told = [*["--smoke"] * chosen.smoke, "--threads", str(chosen.threads)]
    told += ["--model", chosen.model]
    alone.memories(names, told, found.setdefault("alone", {}), save)
    table(found, sizes, setting["length"], setting["new"])
    found["bars"] = bars(found)
    save()
    report.show(found)
    alone.show(found["alone"])
    if not chosen.smoke:
        picture(output, report.draw, found)
    jax.clear_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
