"""Merges of real fine-tunes, every method in one table, with the loss of each task.

Claim: three experts of SmolLM2-135M, fine-tuned here on different tasks, are merged by
every weights-only method of the library; the table says what each keeps of the experts'
gain on held-out rows, and whether it beats plain averaging. The joint model, trained on
all tasks, sees the same rows as the experts together.
Command: python experiments/merge_tasks.py [--data DIR] [--smoke] [--output FILE]
Data: DIR or $COLLAB_JAX_DATA holds gsm8k/{train,test}.jsonl of
https://github.com/openai/grade-school-math (grade_school_math/data) and
true_false/*_true_false.csv of https://github.com/balevinstein/Probes (the statements of
SAPLMA, arXiv 2304.13734). Without them, sums and reversed words are made here.
Hardware: two CPU cores, 8 GiB. (`--smoke`: seconds, a random toy model, no files.)
Experts and measured losses are kept in the folder experiments/merge_tasks of the cache:
a run that was stopped goes on, and `--kept` reports what is there.
Expected: to be measured.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean as average
from typing import Any, NamedTuple

import jax
from merging.data import Encode, Task, folder_of, tasks, union
from merging.experts import Expert, Recipe, Tensors, digest, train, write_json
from merging.methods import methods
from merging.report import plot, shares, show, summary

from collab_jax import finetune
from collab_jax.commands.progress import progress
from collab_jax.io import canonical
from collab_jax.io.hub import cache
from collab_jax.packing import Batch

NAME = "smollm2-135m-instruct"


class Setup(NamedTuple):
    """A base, and how it is trained and tested."""

    name: str
    config: Any
    backbone: Any
    base: Tensors
    encode: Encode
    length: int  # tokens of a row
    sizes: tuple[int, int, int]  # rows: to train on at most, to choose with, to test
    recipe: Recipe
    folder: Path  # experts and losses are kept here


class Meter(NamedTuple):
    """Losses on rows of each task; what was measured is kept in a file."""

    loss: Callable[[Any, Batch], jax.Array]  # one compiled program
    config: Any
    known: dict[str, list[float]]
    path: Path
    frozen: bool  # nothing new is trained or measured


class Unknown(Exception):
    """Something is not kept, and nothing new shall be trained or measured."""


def real(chosen: argparse.Namespace) -> Setup:
    """SmolLM2-135M."""
    from collab_jax.io.load import load

    model = load(NAME, dtype="float32")
    return Setup(
        NAME,
        model.config,
        model.backbone,
        canonical.to_checkpoint(model.config, model.params),
        lambda text: model.tokenizer(text, add_special_tokens=False).input_ids,
        112,
        (400, chosen.validation, chosen.test),
        Recipe(chosen.steps, 2, 1e-4, NAME),
        cache() / "experiments" / "merge_tasks",
    )


def toy(folder: Path) -> Setup:
    """A random model over bytes."""
    from collab_jax.models.config import from_hf
    from collab_jax.models.transformer import init, transformer

    config = from_hf(
        {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    )
    params = init(jax.random.key(0), config)
    return Setup(
        "toy",
        config,
        transformer(config),
        canonical.to_checkpoint(config, params),
        lambda text: list(text.encode()),
        128,
        (8, 2, 2),
        Recipe(2, 2, 1e-2, "toy"),
        folder,
    )


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
    """
    said = json.dumps([*label, *map(digest, split)])
    key = f"{label[0]} {hashlib.sha256(said.encode()).hexdigest()[:16]}"
    if key not in meter.known:
        if meter.frozen:
            raise Unknown
        meter.known[key] = losses_of(meter, split, make())
        write_json(meter.path, meter.known)
    return meter.known[key]


def experts_of(
    setup: Setup, data: Sequence[Task], seed: int, frozen: bool
) -> Iterator[Expert]:
    """The experts of the tasks, and at last the joint model; trained when asked for.

    Args:
      setup: the base, and how.
      data: the tasks.
      seed: of the order of the rows.
      frozen: nothing is trained.

    Raises:
      Unknown: where one is not there, and nothing is trained.
    """
    size = setup.recipe.steps * setup.recipe.batch
    jobs = [(task.name, task.train, setup.recipe) for task in data]
    both = union([task.train for task in data], size, seed)
    longer = setup.recipe._replace(steps=setup.recipe.steps * len(data))
    for name, rows, recipe in [*jobs, ("joint", both, longer)]:
        found = train(
            setup.folder, name, setup.backbone, setup.config, setup.base, rows,
            recipe, seed, frozen,
        )  # fmt: skip
        if found is None:
            raise Unknown
        yield found


def study(
    setup: Setup,
    data: Sequence[Task],
    meter: Meter,
    seed: int,
    chosen: argparse.Namespace,
    choices: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """Trains the experts of one seed and tests every model that is made of them.

    Args:
      setup: the base.
      data: the tasks.
      meter: measures.
      seed: of the order of the rows.
      chosen: the arguments.
      choices: index of the setting of each method; those that lack are chosen here.

    Returns:
      A row for each model; models that are not known are left out.
    """
    names = [task.name for task in data]
    validation = [task.validation for task in data]
    test = [task.test for task in data]
    training = experts_of(setup, data, seed, meter.frozen)
    own = [next(training) for _ in data]
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

    yield row("base", lambda: setup.base, setup.name)
    for n, (name, mark) in enumerate(zip(names, marks, strict=True)):
        yield row(f"expert: {name}", lambda n=n: models()[n], mark)
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
            values = [
                average(
                    kept(
                        validation,
                        measure(
                            meter,
                            validation,
                            (method.name, said, 0, *marks),
                            make(i, 0),
                        ),
                    )
                )
                for i, (said, _) in enumerate(method.settings)
            ]
            return max(range(len(values)), key=values.__getitem__)

        with contextlib.suppress(Unknown):
            if method.name not in choices:
                choices[method.name] = choose()
            place = choices[method.name]
            said = method.settings[place][0]
            for draw in range(chosen.draws if method.random else 1):
                label = (said, draw, *marks)
                merged = make(place, draw)
                yield row(method.name, merged, *label, setting=said, draw=draw)
    loaded.clear()
    if not chosen.no_joint:
        with contextlib.suppress(Unknown):
            joint = next(training)
            yield row("joint", joint.read, joint.path.stem)


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
        "answer_tokens": {t.name: int(t.test.weights.sum()) for t in data},
    }
    count = len(methods(list(setup.base), lambda _: 0.0))
    rows: list[dict[str, Any]] = []
    choices: dict[str, int] = {}
    with progress("models", chosen.seeds * (count + 5)) as advance:
        for seed in range(chosen.seeds):
            with contextlib.suppress(Unknown):
                for row in study(setup, data, meter, seed, chosen, choices):
                    rows.append(row)
                    advance()
                    report |= {
                        "methods": summary(rows, report["tasks"]),
                        "models": rows,
                    }
                    write_json(output, report)
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
    output = chosen.output or (Path("merge_smoke.json") if chosen.smoke else default)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        setup = toy(Path(temporary)) if chosen.smoke else real(chosen)
        report = run(setup, chosen, output)
    show(report)
    if not plot(report, output.with_suffix(".png")):
        print("no picture: matplotlib is not installed (the extra `plot`)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
