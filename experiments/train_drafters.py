"""Heads and a feature layer, trained on what the model writes: acceptance rises.

Claim: parallel heads (a chain, and a tree grown from their measured accuracies) and a
feature drafter (a chain, and an expanded tree) over SmolLM2-135M-Instruct, with a draft
vocabulary, trained for minutes on the model's own greedy text, take more tokens a call
than before training, on other prompts than those they were trained on; the greedy text
stays that of plain decoding.
Command: python experiments/train_drafters.py [--smoke] [--data DIR] [--texts N]
[--epochs E] [--vocabulary R] [--kinds K ...] [--rows N] [--output FILE]; what was
written or trained is kept, and so are the results of another kind.
Data: as for speculative_speed.py; the prompts that are not measured are trained on.
Hardware: two CPU cores, 8 GiB; about an hour for both with 96 texts (`--smoke`:
seconds, a random toy model, which has little to learn).
Expected: seen in November 2026 with `--texts 96 --epochs 6 --rows 1` (six prompts, 144
steps of 4 rows, 10 and 14 minutes beside other work): tokens a call from 1.03 to 1.25
with a chain of heads, 1.25 to 1.49 with a tree, 1.00 to 1.18 with a chain of features;
all texts equal. The expanded tree of features was not measured yet. 96 texts are few:
the heads' loss falls from 28 to 5 on them.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from measuring.atomic import write_json
from speculating import same
from speculating.subject import Subject, real, texts, toy

from collab_jax import decode, finetune
from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import exact, topology
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.feature_drafter import feature_drafter
from collab_jax.cooperate.efficient.feature_training import extrapolation_tuner
from collab_jax.cooperate.efficient.growth import chain, expanded
from collab_jax.cooperate.efficient.parallel import parallel, parallel_tree
from collab_jax.cooperate.efficient.parallel_training import accuracies, heads_tuner
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.io import hub
from collab_jax.io.checkpoint import load_checkpoint, save_checkpoint
from collab_jax.models.draft_vocabulary import frequent
from collab_jax.models.extrapolator import extrapolator
from collab_jax.models.parallel_heads import medusa, narrowed
from collab_jax.packing import Batch, rows

RESULTS = Path(__file__).parent / "results" / "train_drafters.json"
KINDS = "heads", "features"
ROWS = 8  # of a batch while text is written
HEADS, NODES = 4, 16  # heads, and nodes of a tree
STEPS = 3  # how deep the feature layer reads its own guesses in training
PROMPT = 96  # tokens of a prompt that are trained with, its last ones


class Trained(NamedTuple):
    """Parameters before and after, and what training saw."""

    before: Any
    after: Any
    notes: dict[str, Any]


def written(
    subject: Subject, count: int, cache: Path
) -> list[tuple[list[int], list[int]]]:
    """Prompts that are not measured, with the greedy text of the model behind them."""
    prompts = [
        prompt
        for group in zip(*subject.more.values(), strict=False)  # all groups alike
        for prompt in group
    ][:count]
    path = cache / f"written-{_digest([prompts, subject.new])}.json"
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    plain = decode.compile(
        lambda _: decode.greedy(subject.lm, subject.new, eos=subject.eos)
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with progress("texts", -(-len(order) // ROWS)) as advance:
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            if not all(str(i) in found for i in chosen):
                some = [prompts[i] for i in chosen]
                some += some[:1] * (ROWS - len(some))
                longest = max(map(len, some))
                width = min(w for w in subject.widths if w >= longest)
                result = plain(
                    None, subject.params, *decode.pad(some, width), jax.random.key(0)
                )
                lines = same.packed(texts(result, len(chosen)))
                found |= dict(zip(map(str, chosen), lines, strict=True))
                write_json(path, found)
            advance()
    texts_ = same.unpacked([found[str(i)] for i in range(len(prompts))])
    return list(zip(prompts, texts_, strict=True))


def data_of(subject: Subject, pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Rows of a prompt's end and its continuation; only that counts."""
    both = [(prompt[-PROMPT:], new) for prompt, new in pairs]
    both = [(prompt, new) for prompt, new in both if len(new) > HEADS + 2]
    return rows(
        [[*prompt, *new] for prompt, new in both],
        PROMPT + subject.new,
        [[0.0] * len(prompt) + [1.0] * len(new) for prompt, new in both],
    )


def train(
    name: str,
    tuner: finetune.Finetuner,
    start: Any,
    subject: Subject,
    data: Batch,
    chosen: argparse.Namespace,
    cache: Path,
) -> Trained:
    """Trains, or finds what was trained on the same data."""
    said = [name, chosen.epochs, chosen.rate, chosen.vocabulary]
    said.append([leaf.tolist() for leaf in data])
    path = cache / f"{name}-{_digest(said)}"
    notes = path.with_suffix(".json")
    if not notes.exists():
        print(name, flush=True)
        began = time.perf_counter()
        after, history = finetune.fit(
            tuner,
            start,
            data,
            base=subject.params,
            batch_size=4,
            epochs=chosen.epochs,
        )
        seconds = round(time.perf_counter() - began, 1)
        save_checkpoint(path, after)
        few = max(1, len(history) // 10)
        loss = [float(np.mean(part)) for part in (history[:few], history[-few:])]
        write_json(
            notes, {"seconds": seconds, "steps": len(history), "first and last": loss}
        )
    return Trained(start, load_checkpoint(path, start), json.loads(notes.read_text()))


def measured(
    subject: Subject, proposer: Proposer, params: Any, plain: dict[str, list[str]]
) -> dict[str, Any]:
    """Tokens a call on the prompts that are measured, and whether the text is plain."""
    ends = {"eos": subject.eos}
    decoder = speculate(
        on_lm(subject.lm), proposer, subject.new, verifier=exact.greedy(), **ends
    )
    program = decode.compile(lambda _: decoder)
    greedy = decode.compile(lambda _: decode.greedy(subject.lm, subject.new, **ends))
    margin = same.margins(subject.lm, subject.params)
    report: dict[str, Any] = {"tokens": 0, "calls": 0, "apart": [], "groups": {}}
    tried, taken = 0, 0
    for some in subject.batches(ROWS):
        prompt, length = subject.padded(subject.of(some), ROWS)
        key, place = jax.random.key(0), same.name_of(some)
        if place not in plain:
            result = greedy(None, subject.params, prompt, length, key)
            plain[place] = same.packed(texts(result, len(some)))
        result = program(None, (subject.params, params), prompt, length, key)
        got = texts(result, len(some))
        for (group, _), text, calls in zip(some, got, result.info.calls, strict=False):
            own = report["groups"].setdefault(group, [0, 0])
            own[0] += len(text)
            own[1] += int(calls)
        expected = same.unpacked(plain[place])
        report["apart"] += same.differences(
            some, subject.of(some), got, expected, margin
        )
        tried = tried + np.asarray(result.info.tried)[: len(some)].sum(0)
        taken = taken + np.asarray(result.info.taken)[: len(some)].sum(0)
    report["tokens"] = sum(tokens for tokens, _ in report["groups"].values())
    report["calls"] = sum(calls for _, calls in report["groups"].values())
    report["acceptance"] = (taken / np.maximum(tried, 1)).round(3).tolist()
    return report


def drafters(
    subject: Subject,
    pairs: Sequence[tuple[list[int], list[int]]],
    chosen: argparse.Namespace,
    cache: Path,
) -> dict[str, tuple[Callable[[Any], Proposer], Trained]]:
    """What is trained, and the proposers made of it."""
    base, backbone, data = subject.params, subject.backbone(), data_of(subject, pairs)
    said = [part for pair in pairs for part in pair]
    few = frequent(said, chosen.vocabulary, subject.vocab, subject.eos)
    made: dict[str, tuple[Callable[[Any], Proposer], Trained]] = {}
    steps = chosen.epochs * -(-len(data.tokens) // 4)
    rate = optax.warmup_cosine_decay_schedule(
        0, chosen.rate, max(1, steps // 10), max(2, steps)
    )

    def optimizer():
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))

    if "heads" in chosen.kinds:
        heads = medusa(backbone, HEADS, output=narrowed(few))
        start = heads.init(jax.random.key(0), base)
        tuner = heads_tuner(backbone, heads, optimizer())
        trained = train("heads", tuner, start, subject, data, chosen, cache)
        sample = Batch(*(leaf[:16] for leaf in data))

        def tree(params):
            found = accuracies(backbone, heads, params, base, sample)
            return parallel_tree(heads, topology.grow(NODES, np.asarray(found)))

        made["heads, chain"] = (lambda _: parallel(heads), trained)
        made["heads, tree"] = (tree, trained)
    if "features" in chosen.kinds:
        layer = extrapolator(subject.config, vocabulary=few)
        start = layer.init(jax.random.key(0), base)
        tuner = extrapolation_tuner(
            backbone, layer, optimizer(), steps=STEPS, law_weight=1, feature_weight=0.1
        )
        trained = train("features", tuner, start, subject, data, chosen, cache)
        for name, growth in (
            ("features, chain", chain(HEADS)),
            ("features, expanded tree", expanded(HEADS, 4, NODES)),
        ):
            proposer = feature_drafter(backbone, layer, growth)
            made[name] = (lambda _, proposer=proposer: proposer, trained)
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


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens a call before and after, not without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Trains and measures; 0 where every text is the plain one, up to ties."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a random toy model")
    parser.add_argument("--data", default=os.environ.get("COLLAB_JAX_DATA"))
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--texts", type=int, default=192, help="to train on")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--vocabulary", type=int, default=8192, help="drafted tokens")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--rows", type=int, default=2, help="measured, of a group")
    chosen = parser.parse_args(arguments)
    output = chosen.output or (Path("smoke.json") if chosen.smoke else RESULTS)
    if chosen.smoke:
        subject, chosen.texts, chosen.epochs, chosen.vocabulary = toy(), 5, 1, 64
        cache = output.parent / "train_drafters"
    else:
        subject = real(chosen.data, chosen.rows)
        cache = hub.cache() / "experiments" / "train_drafters"
    if not any(subject.more.values()):
        parser.error(
            f"--rows {chosen.rows} leaves no prompt to train on; fewer rows, or --data "
            "with Spec-Bench are expected"
        )
    cache.mkdir(parents=True, exist_ok=True)
    pairs = written(subject, chosen.texts, cache)
    made = drafters(subject, pairs, chosen, cache)
    if chosen.smoke:  # one of each kind
        made = {name: made[name] for name in ("heads, tree", "features, chain")}
    found: dict[str, Any] = {
        "device": str(jax.devices()[0].device_kind),
        "setting": {"texts": len(pairs), "epochs": chosen.epochs}
        | {"rows": chosen.rows, "new": subject.new, "smoke": chosen.smoke}
        | {"vocabulary": chosen.vocabulary}
        | {"data": bool(chosen.data), "rate": chosen.rate},
        "training": {
            name.split(",")[0]: trained.notes for name, (_, trained) in made.items()
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
        for name, (make, trained) in made.items():
            both = {}
            for kind, own in ("untrained", trained.before), ("trained", trained.after):
                params = own, subject.params
                both[kind] = measured(subject, make(own), params, plain)
                advance()
            found["drafters"][name] = both
            write_json(output, found)
    show(found)
    plot(found, output.with_suffix(".png"))
    reports = [x for both in found["drafters"].values() for x in both.values()]
    return int(any(not gap["tie"] for x in reports for gap in x["apart"]))


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
