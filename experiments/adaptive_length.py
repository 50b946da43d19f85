"""How long a draft should be: fixed, by schedule, confidence, head or budget.

Claim: with a draft model over SmolLM2-135M-Instruct every rule leaves the greedy text
as it is; rules that stop where the draft is likely to be lost waste fewer drafted
tokens than fixed lengths, and an acceptance head (SpecDec++) that was trained for
minutes on the model's own text wastes fewer for its calls than before training.
Command: python experiments/adaptive_length.py [--smoke] [--data DIR] [--texts N]
[--epochs E] [--layers L] [--rows N] [--output FILE]; what was written or trained is
kept.
Data: as for speculative_speed.py; the prompts that are not measured are trained on.
Hardware: two CPU cores, 8 GiB; 40 minutes (`--smoke`: seconds, a random toy model).
Expected: seen in November 2026 with `--epochs 2` (96 texts, 48 steps, 13 minutes
beside other work; six prompts): all texts equal. Tokens a call and drafted tokens a
call: fixed length 8, 1.70 and 8.0; 4, 1.67 and 4.0; confidence 1.68 and 3.9; schedule
1.54 and 2.0; the head at 0.7, 1.56 and 1.3, before training at 0.3, 1.54 and 1.8. Such
a large draft model is worth its cost with no rule: the least `work` is 1.3, the head's.

The draft model is the first layers of the model, with its head. `work` is what a token
costs in calls of the target: (calls + drafted * c) / tokens, with c the share of the
layers that the draft has; plain decoding is 1. Rows of a batch wait for the longest
draft of a round, which `work` leaves out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
from measuring.atomic import write_json
from measuring.options import options
from measuring.picture import picture
from speculating.strategies import cut
from speculating.subject import Subject
from speculating.training import (
    ROWS,
    data_of,
    measured,
    opened,
    optimizer,
    train,
    written,
)

from collab_jax import warp
from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import stopping
from collab_jax.cooperate.efficient.acceptance import acceptance_head, foretold, head
from collab_jax.cooperate.efficient.acceptance_training import acceptance_tuner
from collab_jax.cooperate.efficient.budget import budget
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.stopping import Stopping
from collab_jax.lm import language_model
from collab_jax.models.transformer import transformer

RESULTS = Path(__file__).parent / "results" / "adaptive_length.json"
LONGEST = 8  # tokens of a draft
BLOCKS = 3  # of the acceptance head


def rules(made: Any, before: Any, after: Any) -> dict[str, tuple[Stopping | None, Any]]:
    """Stopping rules with their parameters, by name.

    Args:
      made: the acceptance head.
      before: its parameters before training.
      after: and after it.
    """
    found: dict[str, tuple[Stopping | None, Any]] = {
        f"fixed, {LONGEST}": (None, None),
        "fixed, 4": (stopping.schedule(4, 4, 0, 0), ()),
        "schedule": (stopping.schedule(5, LONGEST), ()),
        "confidence, 0.4": (stopping.confidence(0.4), ()),
        "budget, 4 a row": (budget(4 * ROWS, LONGEST), ()),
    }
    for risk in 0.3, 0.5, 0.7:
        rule = acceptance_head(made, risk)
        found[f"head before, {risk}"] = rule, before
        found[f"head, {risk}"] = rule, after
    spent = budget(4 * ROWS, LONGEST, foretold(made))
    found["budget by head, 4 a row"] = spent, after
    return found


def trained(subject: Subject, chosen: argparse.Namespace, cache: Path, draft: Any):
    """The acceptance head, and its parameters before and after."""
    config, own = draft
    small, made = transformer(config), head(config.width, BLOCKS)
    data = data_of(subject, written(subject, chosen.texts, cache))
    tuner = acceptance_tuner(
        small,
        subject.backbone(),
        made,
        optimizer(chosen.rate, data, chosen.epochs),
        warps=(warp.greedy(),),
        greedy=True,
    )
    base = own, subject.params, jax.random.key(1)
    start = made.init(jax.random.key(0))
    setting = chosen.rate, chosen.layers
    found = train("acceptance", tuner, start, base, data, setting, chosen.epochs, cache)
    return made, found


def show(found: dict[str, Any]) -> None:
    """The table."""
    print(
        f"\n{'rule':26}{'tok/call':>9}{'drafted':>9}{'accepted':>10}{'work':>7}  apart"
    )
    for name, x in found["rules"].items():
        calls, tokens = max(x["calls"], 1), max(x["tokens"], 1)
        accepted = (tokens - x["calls"]) / max(x["drafted"], 1)
        print(
            f"{name:26}{tokens / calls:9.2f}{x['drafted'] / calls:9.2f}{accepted:10.2f}"
            f"{x['work']:7.2f}  {len(x['apart'])}"
        )
    notes = found["training"]
    first, last = notes["first and last"]
    print(
        f"acceptance head: loss {first:.3f} -> {last:.3f} in {notes['steps']} steps, "
        f"{notes['seconds']:.0f} s"
    )


def draw(pyplot: Any, found: dict[str, Any]) -> Any:
    """Drafted tokens against tokens a call."""
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for name, x in found["rules"].items():
        calls = max(x["calls"], 1)
        place = x["drafted"] / calls, x["tokens"] / calls
        axis.plot(*place, "o")
        axis.annotate(
            name, place, fontsize=8, xytext=(4, 2), textcoords="offset points"
        )
    axis.set_xlabel("drafted tokens per call of the model")
    axis.set_ylabel("tokens per call of the model")
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Trains and measures; 0 where every text is the plain one, up to ties."""
    parser = options(__doc__)
    parser.add_argument("--texts", type=int, default=96, help="to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--layers", type=int, help="of the draft model")
    parser.add_argument("--rows", type=int, default=1, help="measured, of a group")
    chosen = parser.parse_args(arguments)
    output = chosen.output or (Path("smoke.json") if chosen.smoke else RESULTS)
    chosen.layers = chosen.layers or (1 if chosen.smoke else 25)
    subject, cache = opened(parser, chosen, output)
    if chosen.smoke:
        chosen.texts, chosen.epochs = 5, 1
    draft = cut(subject, chosen.layers)
    made, own = trained(subject, chosen, cache, draft)
    every = rules(made, own.before, own.after)
    if chosen.smoke:
        every = {name: every[name] for name in ("schedule", "head, 0.5")}
    found: dict[str, Any] = {
        "device": str(jax.devices()[0].device_kind),
        "setting": {"texts": chosen.texts, "epochs": chosen.epochs, "rate": chosen.rate}
        | {"rows": chosen.rows, "new": subject.new, "layers": chosen.layers}
        | {"smoke": chosen.smoke, "data": bool(chosen.data)},
        "training": own.notes,
        "rules": {},
    }
    if output.exists():
        before = json.loads(output.read_text("utf-8"))
        found = before if before["setting"] == found["setting"] else found
    lm = language_model(transformer(draft[0]))
    share = chosen.layers / subject.config.layers
    plain: dict[str, list[str]] = {}
    missing = {name: every[name] for name in every if name not in found["rules"]}
    with progress("rules", len(missing)) as advance:
        for name, (rule, params) in missing.items():
            proposer = draft_lm(lm, LONGEST, greedy=True, stopping=rule)
            params = draft[1] if rule is None else (draft[1], params)
            report = measured(subject, proposer, params, plain)
            work = report["calls"] + share * report["drafted"]
            report["work"] = round(work / max(report["tokens"], 1), 3)
            found["rules"][name] = report
            write_json(output, found)
            advance()
    show(found)
    picture(output, draw, found)
    return int(
        any(not gap["tie"] for x in found["rules"].values() for gap in x["apart"])
    )


if __name__ == "__main__":
    sys.exit(main())
