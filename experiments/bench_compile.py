"""Start-up: imports, the first token, and how many programs mixed prompts need.

Claim: `import collab_jax` takes at most 0.5 s beyond `import jax`, `collab-jax --help`
at most 1 s; a command that ran before finds its programs again; prompts of any lengths
share a handful of programs.
Command: python experiments/bench_compile.py [--smoke] [--model NAME] [--repeats R]
[--output FILE]; torch transformers takes part where it is installed.
Hardware: two CPU cores, 4 GiB, five minutes (`--smoke`: seconds, a random toy model).
Expected: (November 2026) import collab_jax nothing beyond jax that can be told, help
0.15 s; first tokens of SmolLM2-135M 14 s with all to compile and 6.6 s after, where
transformers takes 9.1 s; 19 mixed prompts need 3 large programs, and none anew.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring.atomic import write_json
from measuring.picture import picture
from measuring.process import circumstances, measure

RESULTS = Path(__file__).parent / "results" / "bench_compile.json"
NAME = "smollm2-135m-instruct"
NEW = 8
IMPORTS = {
    "import jax": "import jax",
    "import jax, collab_jax": "import jax, collab_jax",
}
BEYOND, HELP, HANDFUL = 0.5, 1.0, 8
LENGTHS = 1, 2, 3, 5, 8, 11, 17, 23, 31, 40, 47, 63, 70, 90, 127, 150, 200, 255, 300
# The peer, as its documentation has it: greedy, the same prompt and as many tokens.
PEER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = tokenizer(sys.argv[2], return_tensors="pt")
model.generate(**found, max_new_tokens=int(sys.argv[3]), do_sample=False)
"""
# A command in a process that counts what it compiled and what it found again.
COUNTED = """
import json, sys
import jax
events = {"compiled": 0, "found": 0, "large": 0}
def noted(name, seconds, **_):
    here = name == "/jax/core/compile/backend_compile_duration"
    events["compiled"] += here
    events["large"] += here and seconds >= 0.3
jax.monitoring.register_event_duration_secs_listener(noted)
def told(name, **_):
    events["found"] += name == "/jax/compilation_cache/cache_hits"
jax.monitoring.register_event_listener(told)
from collab_jax.cli import cli
cli(sys.argv[2:], standalone_mode=False)
events["compiled"] -= events["found"]
open(sys.argv[1], "w").write(json.dumps(events))
"""


class Bench:
    """What is run, where, and what was seen."""

    def __init__(self, folder: Path, model: str, smoke: bool):
        """Begins with an empty cache of programs."""
        self.folder, self.model, self.smoke = folder, model, smoke
        self.runs: list[dict] = []

    def run(self, what: str, command: list[str], programs: str | None = None) -> dict:
        """One process, with a cache of programs of that name."""
        environment = dict(os.environ)
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if programs is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / programs)
        log = self.folder / "log.txt"
        found = measure(command, environment, log, 600)
        if "failed" in found:
            raise SystemExit(f"{what}: {found['failed']}")
        kept = ("seconds", "user", "system", "peak")
        self.runs.append({"what": what} | {key: found[key] for key in kept})
        print(f"{what:34}{found['seconds']:8.2f} s", flush=True)
        return found

    def generate(self, *options: str) -> list[str]:
        """A command of ours."""
        own = ["generate", self.model, "--max-new-tokens", f"{NEW}", *options]
        return [sys.executable, "-m", "collab_jax", *own]

    def median(self, what: str) -> float:
        """Seconds."""
        return statistics.median(r["seconds"] for r in self.runs if r["what"] == what)


def starts(bench: Bench, repeats: int) -> None:
    """Imports, help, and first tokens with and without programs of an earlier run."""
    peer = importlib.util.find_spec("torch") is not None and not bench.smoke
    for turn in range(repeats):
        for name, code in IMPORTS.items():
            bench.run(name, [sys.executable, "-c", code])
        bench.run("collab-jax --help", [sys.executable, "-m", "collab_jax", "--help"])
        command = bench.generate("--prompt", "One, two, three,")
        bench.run("first tokens, nothing compiled", command, f"programs-{turn}")
        bench.run("first tokens, as before", command, f"programs-{turn}")
        if peer:
            from collab_jax.io.hub import fetch

            own = [str(torch_folder(bench, Path(fetch(bench.model))))]
            own += ["One, two, three,", f"{NEW}"]
            bench.run("first tokens, transformers", [sys.executable, "-c", PEER, *own])


def torch_folder(bench: Bench, source: Path) -> Path:
    """The model as safetensors, which torch reads: short names may be GGUF."""
    if any(source.glob("*.safetensors")):
        return source
    folder = bench.folder / "model"
    if not folder.exists():
        from collab_jax import load, save

        save(load(source, dtype="float32"), folder)
    return folder


def mixed(bench: Bench) -> dict[str, Any]:
    """Programs for prompts of many lengths, in the first run and in a second."""
    texts = bench.folder / "prompts.jsonl"
    lengths = LENGTHS[:5] if bench.smoke else LENGTHS
    lines = [json.dumps({"prompt": "a " * n}) for n in lengths]
    texts.write_text("\n".join(lines) + "\n", "utf-8")
    found = {}
    for turn in ("first", "second"):
        report = bench.folder / f"{turn}.json"
        out = bench.folder / f"{turn}.jsonl"
        own = bench.generate("--input", str(texts), "--output", str(out))[3:]
        command = [sys.executable, "-c", COUNTED, str(report), *own]
        bench.run(
            f"{len(lengths)} mixed prompts, {turn} run", command, "programs-mixed"
        )
        found[turn] = json.loads(report.read_text("utf-8"))
    found["prompts"] = len(lengths)
    return found


def draw(pyplot: Any, bench: Bench) -> Any:
    """Draws the medians."""
    names = list(dict.fromkeys(run["what"] for run in bench.runs))[::-1]
    figure, axis = pyplot.subplots(figsize=(7, 0.5 * len(names) + 1))
    axis.barh(names, [bench.median(name) for name in names])
    axis.set_xlabel("seconds of a whole process, median")
    return figure


def toy(folder: Path) -> str:
    """A folder with a random model and a tokenizer of bytes."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from command_line import write_model

    write_model(folder / "toy")
    return str(folder / "toy")


def main(arguments: list[str] | None = None) -> int:
    """Runs it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = toy(folder) if options.smoke else options.model
        bench = Bench(folder, model, options.smoke)
        starts(bench, 1 if options.smoke else options.repeats)
        programs = mixed(bench)
        picture(options.output, draw, bench)
    beyond = bench.median("import jax, collab_jax") - bench.median("import jax")
    bars = [
        ("import collab_jax, beyond jax, s", beyond, BEYOND),
        ("collab-jax --help, s", bench.median("collab-jax --help"), HELP),
        (
            f"programs of {programs['prompts']} mixed prompts, over 0.3 s to compile",
            programs["first"]["large"],
            HANDFUL,
        ),
        ("programs compiled in the second run", programs["second"]["compiled"], 0),
    ]
    for what, value, bar in bars:
        held = "held" if value <= bar else "NOT HELD"
        print(f"{what:56}{value:8.2f}  (bar {bar:g}: {held})")
    write_json(
        options.output,
        {
            "model": "toy" if options.smoke else options.model,
            "runs": bench.runs,
            "programs": programs,
            "bars": [
                {"what": what, "value": value, "bar": bar, "held": value <= bar}
                for what, value, bar in bars
            ],
            "on": circumstances(["jax", "jaxlib", "transformers", "torch"]),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
