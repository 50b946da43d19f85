"""Drafters trained on what the model writes, of three kinds: acceptance rises.

Claim: parallel heads (a chain, and a tree grown from their measured accuracies) and a
feature drafter (a chain, and an expanded tree) over SmolLM2-135M-Instruct, with a draft
vocabulary, and a draft model of its first layers that learns its laws (DistillSpec),
trained for minutes on the model's own greedy text, take more tokens a call than before
training, on other prompts than those they were trained on; the greedy text stays that
of plain decoding.
Command: python experiments/train_drafters.py [--smoke] [--data DIR] [--texts N]
[--epochs E] [--vocabulary R] [--kinds K ...] [--layers L] [--rows N] [--output FILE];
what was written or trained is kept, and so are the results of another kind.
Data: as for speculative_speed.py; the prompts that are not measured are trained on.
Hardware: two CPU cores, 8 GiB; about an hour and a half with 96 texts (`--smoke`:
seconds, a random toy model, which has little to learn).
Expected: seen in November 2026 with `--texts 96 --epochs 6 --rows 1` (six prompts, 144
steps of 4 rows; 10, 22 and 49 minutes for heads, features and the draft model, beside
other work): tokens a call from 1.03 to 1.25 with a chain of heads, 1.25 to 1.49 with a
tree; 1.00 to 1.18 with a chain of features, 1.00 to 1.62 with an expanded tree; 1.10 to
1.44 with a draft model of the first 12 of 30 layers; all texts equal. Most is gained on
mathematics (2.98 with the expanded tree), least on mt-bench. 96 texts are few.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from measuring.atomic import write_json
from measuring.options import options
from measuring.picture import picture
from speculating.strategies import cut
from speculating.subject import Subject
from speculating.training import (
    Trained,
    data_of,
    measured,
    opened,
    optimizer,
    train,
    written,
)

from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import topology
from collab_jax.cooperate.efficient.distill import distiller
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.feature_drafter import feature_drafter
from collab_jax.cooperate.efficient.feature_training import extrapolation_tuner
from collab_jax.cooperate.efficient.growth import chain, expanded
from collab_jax.cooperate.efficient.parallel import parallel, parallel_tree
from collab_jax.cooperate.efficient.parallel_training import accuracies, heads_tuner
from collab_jax.lm import language_model
from collab_jax.models.draft_vocabulary import frequent
from collab_jax.models.extrapolator import extrapolator
from collab_jax.models.parallel_heads import medusa, narrowed
from collab_jax.models.transformer import transformer
from collab_jax.packing import Batch

RESULTS = Path(__file__).parent / "results" / "train_drafters.json"
KINDS = "heads", "features", "model"
HEADS, NODES = 4, 16  # heads, and nodes of a tree
STEPS = 3  # how deep the feature layer reads its own guesses in training


class Drafter(NamedTuple):
    """A proposer made of what was trained, and how it holds that."""

    make: Callable[[Any], Proposer]
    trained: Trained
    hold: Callable[[Any], Any]


def drafters(
    subject: Subject,
    pairs: Sequence[tuple[list[int], list[int]]],
    chosen: argparse.Namespace,
    cache: Path,
) -> dict[str, Drafter]:
    """What is trained, and the proposers made of it."""
    base, backbone = subject.params, subject.backbone()
    data = data_of(subject, pairs, HEADS + 2)
    said = [part for pair in pairs for part in pair]
    few = frequent(said, chosen.vocabulary, subject.vocab, subject.eos)
    made: dict[str, Drafter] = {}

    def trains(name, tuner, start, *setting):
        return train(name, tuner, start, base, data, setting, chosen.epochs, cache)

    def pair(own):
        return own, base

    setting = chosen.rate, chosen.vocabulary
    usual = optimizer(chosen.rate, data, chosen.epochs)
    if "heads" in chosen.kinds:
        heads = medusa(backbone, HEADS, output=narrowed(few))
        start = heads.init(jax.random.key(0), base)
        tuner = heads_tuner(backbone, heads, usual)
        trained = trains("heads", tuner, start, *setting)
        sample = Batch(*(leaf[:16] for leaf in data))

        def tree(params):
            found = accuracies(backbone, heads, params, base, sample)
            return parallel_tree(heads, topology.grow(NODES, np.asarray(found)))

        made["heads, chain"] = Drafter(lambda _: parallel(heads), trained, pair)
        made["heads, tree"] = Drafter(tree, trained, pair)
    if "features" in chosen.kinds:
        layer = extrapolator(subject.config, vocabulary=few)
        start = layer.init(jax.random.key(0), base)
        tuner = extrapolation_tuner(
            backbone, layer, usual, steps=STEPS, law_weight=1, feature_weight=0.1
        )
        trained = trains("features", tuner, start, *setting)
        for name, growth in (
            ("features, chain", chain(HEADS)),
            ("features, expanded tree", expanded(HEADS, 4, NODES)),
        ):
            proposer = feature_drafter(backbone, layer, growth)
            made[name] = Drafter(lambda _, own=proposer: own, trained, pair)
    if "model" in chosen.kinds:
        config, start = cut(subject, chosen.layers)
        student, rate = transformer(config), chosen.rate / 3  # all weights are trained
        tuner = distiller(student, backbone, optimizer(rate, data, chosen.epochs))
        trained = trains("model", tuner, start, rate, chosen.layers)
        draft = draft_lm(language_model(student), HEADS, greedy=True)
        name = f"model of {chosen.layers} layers, chain"
        made[name] = Drafter(lambda _: draft, trained, lambda own: own)
    return made


def show(found: dict[str, Any]) -> None:
    """The table."""
    print(
        f"\n{'tokens a call':26}{'untrained':>10}{'trained':>10}  acceptance, trained"
    )
    for name, both in found["drafters"].items():
        rates = [x["tokens"] / max(x["calls"], 1) for x in both.values()]
        cells = "".join(f"{rate:10.3f}" for rate in rates)
        print(f"{name:26}{cells}  {both['trained']['acceptance']}")
    for name, notes in found["training"].items():
        first, last = notes["first and last"]
        print(
            f"{name}: loss {first:.3f} -> {last:.3f} in {notes['steps']} steps, "
            f"{notes['seconds']:.0f} s"
        )


def draw(pyplot: Any, found: dict[str, Any]) -> Any:
    """Tokens a call before and after."""
    names = list(found["drafters"])
    figure, axis = pyplot.subplots(figsize=(7, 3.5))
    for n, kind in enumerate(("untrained", "trained")):
        reports = [found["drafters"][name][kind] for name in names]
        values = [x["tokens"] / max(x["calls"], 1) for x in reports]
        axis.barh(np.arange(len(names)) + 0.4 * n - 0.2, values, 0.4, label=kind)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("tokens per call of the model")
    axis.legend()
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Trains and measures; 0 where every text is the plain one, up to ties."""
    parser = options(__doc__)
    parser.add_argument("--texts", type=int, default=192, help="to train on")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--vocabulary", type=int, default=8192, help="drafted tokens")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--layers", type=int, help="of the draft model")
    parser.add_argument("--rows", type=int, default=2, help="measured, of a group")
    chosen = parser.parse_args(arguments)
    output = chosen.output or (Path("smoke.json") if chosen.smoke else RESULTS)
    chosen.layers = chosen.layers or (1 if chosen.smoke else 12)
    subject, cache = opened(parser, chosen, output)
    if chosen.smoke:
        chosen.texts, chosen.epochs, chosen.vocabulary = 5, 1, 64
    pairs = written(subject, chosen.texts, cache)
    made = drafters(subject, pairs, chosen, cache)
    if chosen.smoke:  # one of each kind
        made = {name: made[name] for name in made if "expanded" not in name}
    found: dict[str, Any] = {
        "device": str(jax.devices()[0].device_kind),
        "setting": {"texts": len(pairs), "epochs": chosen.epochs}
        | {"rows": chosen.rows, "new": subject.new, "smoke": chosen.smoke}
        | {"vocabulary": chosen.vocabulary}
        | {"data": bool(chosen.data), "rate": chosen.rate},
        "training": {
            name.split(",")[0]: drafter.trained.notes for name, drafter in made.items()
        },
        "drafters": {},
    }
    if output.exists():
        before = json.loads(output.read_text("utf-8"))
        if before["setting"] == found["setting"]:
            found["training"] = before["training"] | found["training"]
            found["drafters"] = before["drafters"]
    plain: dict[str, list[str]] = {}
    with progress("drafters", 2 * len(made)) as advance:
        for name, (make, trained, hold) in made.items():
            both = {}
            for kind, own in ("untrained", trained.before), ("trained", trained.after):
                both[kind] = measured(subject, make(own), hold(own), plain)
                advance()
            found["drafters"][name] = both
            write_json(output, found)
    show(found)
    picture(output, draw, found)
    reports = [x for both in found["drafters"].values() for x in both.values()]
    return int(any(not gap["tie"] for x in reports for gap in x["apart"]))


if __name__ == "__main__":
    sys.exit(main())
