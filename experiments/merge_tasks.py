"""Merges of real fine-tunes, every method in one table, with the loss of each task.

Claim: three experts of SmolLM2-135M, fine-tuned here on different tasks, are merged by
every weights-only method of the library; the table says what each keeps of the experts'
gain on held-out rows, and whether it beats plain averaging. The joint model, trained on
all tasks, sees the same rows as the experts together. DiWA, Disperse-then-Merge and
Prometheus 2 are the uniform soup here; averages of one run's checkpoints (EMA, LAWA,
WSM, adjacent) have no place in it.
Command: python experiments/merge_tasks.py [--data DIR] [--smoke] [--output FILE]
Data: DIR or $COLLAB_JAX_DATA holds gsm8k/{train,test}.jsonl of
https://github.com/openai/grade-school-math (grade_school_math/data) and
true_false/*_true_false.csv of https://github.com/balevinstein/Probes (the statements of
SAPLMA, arXiv 2304.13734). Without them, sums and reversed words are made here.
Hardware: two CPU cores, 8 GiB; beside other work an expert took 2 to 7 minutes, a joint
model 5 to 14, a merge about one and a spectral one three: about two hours for two seeds
(`--smoke`: seconds, a random toy model, no files). Experts and measured losses are kept
in the folder experiments/merge_tasks of the cache: a run that was stopped goes on, and
`--kept` reports what is there.
Expected: (November 2026; 2 seeds of experts, 24 steps of 2 x 112 tokens, 8 test rows a
task with 467, 92 and 388 answer tokens; share of the experts' gain, mean and spread
over the seeds) joint 1.00; WUDI 0.99, TSV-M 0.98, LiNeS, DARE-TIES, task arithmetic,
Consensus, Breadcrumbs, PCB and TIES 0.96, DELLA and MagMax 0.95, ExPO and DARE 0.93,
MetaGPT 0.87, VaRM 0.86, the soups and the Karcher mean 0.85, Iso-C 0.81, Iso-CTS 0.78
(both still rising at the largest scale tried, 2), SCE 0.76, Model Stock 0.04; with one
model per task EMR 0.99 and TALL masks 0.99. Spreads are 0.004 to 0.027: above task
arithmetic with both seeds are the joint model, WUDI, EMR, TALL masks and TSV-M alone.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean as average
from typing import Any, NamedTuple

import jax
from measuring.atomic import write_json
from measuring.picture import picture
from merging.data import Task, folder_of, tasks, union
from merging.experts import Expert, Tensors, digest, train
from merging.methods import methods
from merging.report import draw, shares, show, summary
from merging.setup import Setup, real, toy

from collab_jax import finetune
from collab_jax.commands.progress import progress
from collab_jax.io import canonical
from collab_jax.packing import Batch

SMOKE = ["uniform soup", "task arithmetic", "LiNeS", "DARE", "TSV-M"]  # one of a kind
SMOKE += ["greedy soup", "EMR (a model per task)"]


class Meter(NamedTuple):
    """Losses on rows of each task; what was measured is kept in a file."""

    loss: Callable[[Any, Batch], jax.Array]  # one compiled program
    config: Any
    known: dict[str, list[float]]
    path: Path
    frozen: bool  # nothing new is trained or measured


class Unknown(Exception):
    """Something is not kept, and nothing new shall be trained or measured."""


def losses_of(meter: Meter, split: Sequence[Batch], made: Any) -> list[float]:
    """The loss on each task.

    Args:
      meter: how.
      split: rows of each task.
      made: the tensors of a model, or for each task a function that makes a model.
    """
    if not isinstance(made, dict):
        pairs = zip(made, split, strict=True)
        return [losses_of(meter, [batch], one())[0] for one, batch in pairs]
    params = canonical.from_checkpoint(meter.config, made)
    return [float(meter.loss(params, batch)) for batch in split]


def measure(
    meter: Meter, split: Sequence[Batch], label: Sequence[Any], make: Callable[[], Any]
) -> list[float]:
    """The losses of what is made, or those that are known under its label.

    Args:
      meter: how, and what is known.
      split: rows of each task.
      label: what the losses depend on beside the rows, a name first.
      make: see `losses_of`.

    Raises:
      Unknown: where they are not known, and nothing new is measured.
      FloatingPointError: for a loss that is not a number.
    """
    said = json.dumps([*label, *map(digest, split)])
    key = f"{label[0]} {hashlib.sha256(said.encode()).hexdigest()[:16]}"
    if key not in meter.known:
        if meter.frozen:
            raise Unknown
        found = losses_of(meter, split, make())
        if not all(map(math.isfinite, found)):
            raise FloatingPointError(
                f"{label[0]}: losses {found}, finite numbers are expected; the merge "
                "made NaN or infinity of finite models, which is a fault of its method"
            )
        meter.known[key] = found
        write_json(meter.path, meter.known)
    return meter.known[key]


def trained(
    setup: Setup, data: Sequence[Task], seed: int, chosen: argparse.Namespace
) -> tuple[list[Expert], Expert | None]:
    """The experts of the tasks and the joint model, trained or found.

    Args:
      setup: the base, and how.
      data: the tasks.
      seed: of the order of the rows.
      chosen: the arguments.

    Returns:
      The experts, and the joint model unless it is left out or not there.

    Raises:
      Unknown: where an expert is not there, and nothing is trained.
    """

    def one(name: str, rows: Batch, times: int) -> Expert | None:
        recipe = setup.recipe._replace(steps=times * setup.recipe.steps)
        print(f"{name}, seed {seed}", file=sys.stderr)
        return train(
            setup.folder,
            name,
            setup.backbone,
            setup.config,
            setup.base,
            rows,
            recipe,
            seed,
            chosen.kept,
        )

    own = [one(task.name, task.train, 1) for task in data]
    found = [expert for expert in own if expert is not None]
    if len(found) < len(own):
        raise Unknown
    if chosen.no_joint:
        return found, None
    size = setup.recipe.steps * setup.recipe.batch
    both = union([task.train for task in data], size, seed)
    return found, one("joint", both, len(data))


def study(
    setup: Setup,
    data: Sequence[Task],
    meter: Meter,
    seed: int,
    own: Sequence[Expert],
    joint: Expert | None,
    chosen: argparse.Namespace,
    choices: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """Tests every model that is made of the experts of one seed.

    Args:
      setup: the base.
      data: the tasks.
      meter: measures.
      seed: of the order of the rows.
      own: each task's expert.
      joint: the model of all tasks, or None.
      chosen: the arguments.
      choices: index of the setting of each method; those that lack are chosen here.

    Returns:
      A row for each model; models that are not known are left out.
    """
    names = [task.name for task in data]
    validation = [task.validation for task in data]
    test = [task.test for task in data]
    marks = [expert.path.stem for expert in own]
    loaded: list[Tensors] = []

    def models() -> list[Tensors]:
        """The experts' tensors, read when they are needed."""
        if not loaded:
            loaded.extend(expert.read() for expert in own)
        return loaded

    def kept(split: Sequence[Batch], losses: Sequence[float]) -> list[float]:
        """The share of each expert's gain that is left."""
        base = measure(meter, split, ("base", setup.name), lambda: setup.base)
        best = [
            measure(meter, split, ("expert", mark), lambda n=n: models()[n])[n]
            for n, mark in enumerate(marks)
        ]
        return shares(losses, base, best)

    def rated(tensors: Tensors) -> float:
        return average(kept(validation, losses_of(meter, validation, tensors)))

    def row(method: str, make: Callable[[], Any], *label, setting="", draw=0):
        losses = measure(meter, test, (method.split(":")[0], *label), make)
        found = kept(test, losses)
        return {
            "method": method,
            "setting": setting,
            "seed": seed,
            "draw": draw,
            "losses": dict(zip(names, losses, strict=True)),
            "shares": dict(zip(names, found, strict=True)),
            "share": average(found),
        }

    with contextlib.suppress(Unknown):
        yield row("base", lambda: setup.base, setup.name)
    for n, (name, mark) in enumerate(zip(names, marks, strict=True)):
        with contextlib.suppress(Unknown):
            yield row(f"expert: {name}", lambda n=n: models()[n], mark)
    if joint is not None:
        with contextlib.suppress(Unknown):
            yield row("joint", joint.read, joint.path.stem)
    for method in methods(list(setup.base), rated):
        if chosen.methods and method.name not in chosen.methods:
            continue

        def make(place: int, draw: int, method=method):
            _, merged = method.settings[place]
            return lambda: merged(setup.base, models(), jax.random.key(draw))

        def choose(method=method, make=make) -> int:
            """The setting that is best on the validation rows."""
            if len(method.settings) == 1 or chosen.smoke:
                return 0
            values = []
            for place, (said, _) in enumerate(method.settings):
                label = (method.name, said, 0, *marks)
                losses = measure(meter, validation, label, make(place, 0))
                values.append(average(kept(validation, losses)))
            return values.index(max(values))

        with contextlib.suppress(Unknown):
            if method.name not in choices:
                choices[method.name] = choose()
            place = choices[method.name]
            said = method.settings[place][0]
            for draw in range(chosen.draws if method.random else 1):
                label = (said, draw, *marks)
                merged = make(place, draw)
                yield row(method.name, merged, *label, setting=said, draw=draw)


def run(setup: Setup, chosen: argparse.Namespace, output: Path) -> dict[str, Any]:
    """All seeds; the report is written again after each row.

    Args:
      setup: the base.
      chosen: the arguments.
      output: where the report goes.
    """
    folder = None if chosen.smoke else folder_of(chosen.data)
    data = tasks(folder, setup.encode, setup.length, setup.sizes)
    setup.folder.mkdir(parents=True, exist_ok=True)
    path = setup.folder / "losses.json"
    fresh = chosen.fresh or not path.exists()
    meter = Meter(
        jax.jit(functools.partial(finetune.loss, setup.backbone)),
        setup.config,
        {} if fresh else json.loads(path.read_text("utf-8")),
        path,
        chosen.kept,
    )
    report: dict[str, Any] = {
        "model": setup.name,
        "tasks": [task.name for task in data],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "recipe": setup.recipe._asdict() | {"tokens": setup.length},
        "rows": {"validation": setup.sizes[1], "test": setup.sizes[2]},
        "experts": [],
        "answer_tokens": {t.name: int(t.test.weights.sum()) for t in data},
    }
    every = [method.name for method in methods(list(setup.base), lambda _: 0.0)]
    if wrong := set(chosen.methods or ()) - set(every):
        raise ValueError(f"no method is called {sorted(wrong)}; there are {every}")
    rows: list[dict[str, Any]] = []
    choices: dict[str, int] = {}
    for seed in range(chosen.seeds):
        with contextlib.suppress(Unknown):
            own, joint = trained(setup, data, seed, chosen)
            names = [*report["tasks"], "joint"]
            for name, expert in zip(names, [*own, joint], strict=True):
                if expert is not None:
                    said = {"task": name, "seed": seed, "seconds": expert.seconds}
                    said |= {"first": expert.history[0], "last": expert.history[-1]}
                    report["experts"].append(said)
            with progress("models", len(chosen.methods or every) + 5) as advance:
                for row in study(setup, data, meter, seed, own, joint, chosen, choices):
                    rows.append(row)
                    found = summary(rows, report["tasks"])
                    there = {row["method"] for row in rows}
                    missing = [name for name in [*every, "joint"] if name not in there]
                    report |= {"missing": missing, "methods": found, "models": rows}
                    write_json(output, report)
                    advance()
    if not rows:
        raise FileNotFoundError(f"{setup.folder} holds no experts: run without --kept")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, and shows what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "merge_tasks.json"
    add = parser.add_argument
    add("--smoke", action="store_true", help="a random toy model, seconds")
    add("--data", metavar="DIR", help="the folder of data; or $COLLAB_JAX_DATA")
    add("--output", type=Path, metavar="FILE", help="the report; beside it a picture")
    add("--methods", nargs="+", metavar="NAME", help="some of them, such as TIES")
    add("--seeds", type=int, default=2, help="of the experts")
    add("--draws", type=int, default=2, help="of each random method")
    add("--steps", type=int, default=24, help="of an expert")
    add("--validation", type=int, default=4, metavar="ROWS")
    add("--test", type=int, default=8, metavar="ROWS")
    add("--no-joint", action="store_true", help="leave the joint model out")
    add("--kept", action="store_true", help="report what is kept, measure nothing")
    add("--fresh", action="store_true", help="measure again what is kept")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        chosen.seeds = chosen.draws = 1
        chosen.methods = chosen.methods or SMOKE
    output = chosen.output or (Path("merge_smoke.json") if chosen.smoke else default)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if chosen.smoke:
                setup = toy(Path(temporary))
            else:
                setup = real(chosen.steps, chosen.validation, chosen.test)
            report = run(setup, chosen, output)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    show(report)
    if not picture(output, draw, report):
        print("no picture: matplotlib is not installed (the extra `plot`)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
