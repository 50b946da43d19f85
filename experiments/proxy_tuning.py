"""Proxy tuning: what tuning does to a smaller model, added to the whole one.

Claim: on held-out answers of a task, SmolLM2-135M-Instruct with the offset of a small
tuned model (tuned less untuned) predicts better than alone, better than the small tuned
model, and keeps more than half of what tuning the whole model gains; the offset of
another task does not, and the other way round it does harm; greedy text of the
composite is the same with drafts, also those of the small tuned model.
Command: python experiments/proxy_tuning.py [--smoke] [--data DIR] [--tasks NAME ...]
[--first A] [--last B] [--heal STEPS] [--steps STEPS] [--test ROWS] [--seeds N]
[--output FILE] [--fresh]; what was trained is kept in the cache, and a run that was
stopped is taken up again.
Data: DIR or $COLLAB_JAX_DATA holds gsm8k/ and true_false/ as for merge_tasks.py, and
spec_bench/question.jsonl as for speculative_speed.py. Without it, the tasks that are
made here, and few texts to heal with.
Hardware: two CPU cores, 8 GiB; 8 minutes of training for one seed, five more to measure
(`--smoke`: seconds, a random toy model, which has little to learn).
Expected: (November 2026; one seed, 11 rows of `math` and 12 of
`format`; nats an answer token, mean and 95 percent over rows) math: base 1.736, proxy
1.345, small tuned 1.657, whole tuned 0.809: it gains 0.39 (0.25 to 0.52) over the base
and 0.31 (0.06 to 0.55) over the small tuned model, a share of 0.42, not told apart from
half. format: base 2.228, proxy 0.309, small tuned 0.230, whole tuned 0.048: a share of
0.88, but the small tuned model alone is better by 0.08 (0.06 to 0.10). The offset of
the other task loses 0.39 and 0.22, the one the other way round 2.7 and 13. Greedy texts
are the same with drafts: 1.6 tokens a call of n-grams, 2.1 of the small tuned model.

No smaller model of this vocabulary is at hand, so one is made: the first A and last B
layers of SmolLM2, healed by training on general text (`--heal` steps on the prompts of
Spec-Bench). That is the small untuned model, the anti-expert; tuned on the answers of a
task it is the expert. The whole model, tuned on the same rows, is what proxy tuning
imitates. Test rows that hold a prompt of Spec-Bench are left out: its mathematical ones
are test questions of GSM8K. Intervals are over rows, and not corrected for their
number; a seed is an order of the rows to tune on.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from joining.data import problems
from joining.laws import as_target, equal_rows, same_with_drafts, swept
from joining.member import SMOLLM2, Member, real, toy
from joining.offsets import ALPHAS, OTHER, ROWS, SMALL, WHOLE, Meter, measure, proxy
from joining.report import (
    Verdict,
    between,
    conclude,
    decided,
    folder_of,
    opened,
    parser,
    show,
)
from joining.small import LENGTH, Healing, Small, healed, notes, tuned, unseen
from measuring.picture import picture
from merging.data import tasks
from merging.experts import Recipe

from collab_jax import combine, score
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.transfer.offset import proxy_tuning
from collab_jax.io.hub import cache


def composite(member: Member, small: Small) -> Any:
    """From alpha to the proxy-tuned model."""
    members = [member.lm, small.lm, small.lm]
    return lambda alpha, _=(): combine.product(members, proxy_tuning(alpha))


Losses = dict[str, dict[str, list[float]]]  # of each seed, of each model, row by row


def means(runs: Losses, counts: Sequence[float]) -> dict[str, np.ndarray]:
    """Rows of every model over the seeds, such that their mean is that of tokens."""
    scale = np.array(counts) / np.mean(counts)
    names = next(iter(runs.values()))
    return {
        name: scale * np.mean([run[name] for run in runs.values()], 0) for name in names
    }


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each task and model: loss, gain over the base, share of the gain."""
    lines = []
    for task, runs in found["losses"].items():
        counts = found["tokens"][task]
        rows = means(runs, counts)
        alone = [means({seed: run}, counts) for seed, run in runs.items()]
        whole = float((rows["base"] - rows[WHOLE]).mean())
        for name, values in rows.items():
            gain = between(rows["base"], values)
            each = [float(run[name].mean()) for run in alone]
            lines.append(
                {
                    "task": task,
                    "model": name,
                    "loss": float(values.mean()),
                    "seeds": [round(x, 4) for x in each],
                    "gain": gain.estimate,
                    "interval": [round(gain.low, 4), round(gain.high, 4)],
                    "share": gain.estimate / whole,
                }
            )
    return lines


def verdicts(lines: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[Verdict]:
    """What was expected, and what was seen, for each task and the drafts."""
    said = []
    for task, runs in found["losses"].items():
        own = {x["model"]: x for x in lines if x["task"] == task}
        loss = {name: line["loss"] for name, line in own.items()}
        rows = means(runs, found["tokens"][task])
        at, base = rows[proxy(1)], rows["base"]
        best = min(ALPHAS, key=lambda alpha: loss[proxy(alpha)])
        numbers = f" nats; base {loss['base']:.3f}, proxy {loss[proxy(1)]:.3f}, "
        numbers += f"small tuned {loss[SMALL]:.3f}, whole tuned {loss[WHOLE]:.3f}"
        half = (base + rows[WHOLE]) / 2
        said += [
            decided(
                f"{task}: proxy tuning (alpha 1) predicts better than the base",
                between(base, at),
                numbers,
            ),
            decided(
                f"{task}: and better than the small tuned model",
                between(rows[SMALL], at),
                " nats",
            ),
            decided(
                f"{task}: it keeps more than half of what tuning the whole model gains",
                between(half, at),
                f" nats above half; the share is {own[proxy(1)]['share']:.2f}",
            ),
            Verdict(
                f"{task}: alpha 1 is within 0.02 nats of the best alpha",
                f"best {best:g}: {loss[proxy(best)]:.3f}, at 1 {loss[proxy(1)]:.3f}",
                loss[proxy(1)] - loss[proxy(best)] <= 0.02,
            ),
            decided(
                f"{task}: control, the offset the other way round does harm",
                between(rows[proxy(-1)], base),
                " nats",
            ),
        ]
        if OTHER in rows:
            said.append(
                decided(
                    f"{task}: control, another task's offset gains less than its own",
                    between(rows[OTHER], at),
                    f" nats; it gains {own[OTHER]['gain']:.3f} over the base",
                )
            )
    for name, target in found["target"].items():
        rate = target["tokens"] / max(target["calls"], 1)
        said.append(
            same_with_drafts(
                f"greedy text is the same with drafts of {name}",
                target,
                f", {rate:.2f} tokens a call",
            )
        )
    return said


def draw(lines: Sequence[dict[str, Any]]) -> Any:
    """The loss over alpha, with the other models as lines."""

    def made(pyplot):
        names = list(dict.fromkeys(x["task"] for x in lines))
        figure, axes = pyplot.subplots(
            1, len(names), figsize=(5 * len(names), 4), squeeze=False
        )
        for axis, task in zip(axes[0], names, strict=True):
            loss = {x["model"]: x["loss"] for x in lines if x["task"] == task}
            own = [
                x
                for a in ALPHAS
                for x in lines
                if (x["task"], x["model"]) == (task, proxy(a))
            ]
            for n in range(len(own[0]["seeds"])):
                axis.plot(
                    ALPHAS,
                    [x["seeds"][n] for x in own],
                    "o",
                    markersize=3,
                    color="tab:blue",
                )
            axis.plot(
                ALPHAS, [x["loss"] for x in own], label="proxy-tuned; points: seeds"
            )
            if OTHER in loss:
                axis.plot([1], [loss[OTHER]], "x", color="tab:red", label=OTHER)
            styles = {"base": ":", SMALL: "-.", WHOLE: "--"}
            for name, style in styles.items():
                axis.axhline(loss[name], color="grey", linestyle=style, label=name)
            axis.set_title(task)
            axis.set_xlabel("alpha")
            axis.set_ylabel("nats an answer token")
            axis.legend(fontsize=7)
        return figure

    return made


def main(arguments: list[str] | None = None) -> int:
    """Trains and measures; 0 where the texts with drafts are the plain ones."""
    parse = parser(__doc__)
    add = parse.add_argument
    add("--tasks", nargs="+", metavar="NAME", help="of merge_tasks.py")
    add("--first", type=int, default=10, help="layers of the small model")
    add("--last", type=int, default=10, help="and its last ones")
    add("--heal", type=int, default=40, help="steps on general text")
    add("--heal-rate", type=float, default=5e-4)
    add("--steps", type=int, default=24, help="of tuning")
    add("--rate", type=float, default=1e-4, help="of tuning, at its peak")
    add("--batch", type=int, default=4, help="rows of a step of healing")
    add("--test", type=int, default=12, help="rows of each task")
    add("--seeds", type=int, default=1, help="of tuning: orders of the rows")
    chosen = parse.parse_args(arguments)
    member = toy(layers=2) if chosen.smoke else real(SMOLLM2)
    if chosen.smoke:
        chosen.first, chosen.last = 1, 0
        chosen.heal, chosen.steps, chosen.batch, chosen.test = 2, 2, 1, 2
        chosen.rate, chosen.seeds = 1e-2, 1
    wanted = chosen.tasks or (
        ["sums", "reverse"] if chosen.smoke else ["math", "format"]
    )
    count = member.config.layers
    if not 0 < chosen.first + chosen.last < count:
        parse.error(f"{chosen.first} + {chosen.last} layers: 1 to {count - 1} expected")
    keys = "first", "last", "heal", "batch", "heal_rate"
    setting = {"model": member.name, "alphas": [*ALPHAS], "length": LENGTH}
    setting |= {
        key: getattr(chosen, key) for key in (*keys, "steps", "rate", "test", "seeds")
    }
    parts = "trained", "losses", "tokens", "target"
    report = opened("proxy_tuning", chosen, setting, *parts)
    found, data = report.found, folder_of(chosen)
    folder = cache() / "experiments"
    if chosen.smoke:
        folder = report.path.parent / "proxy_tuning_models"
    how = Healing(*(getattr(chosen, key) for key in keys))
    small = healed(member, how, folder / "small_models", data)
    found["trained"][small.name] = small.notes
    sizes = (8, 2, 2) if chosen.smoke else (400, 4, chosen.test)
    length = 128 if chosen.smoke else LENGTH
    every = [
        task._replace(test=unseen(member, task.test, data))
        for task in tasks(data, member.encode, length, sizes)
    ]
    if missing := set(wanted) - {task.name for task in every}:
        parse.error(f"no task is called {sorted(missing)}")
    make = composite(member, small)
    read = jax.jit(score.score, static_argnums=(0, 4))
    both = member.params, small.params
    size = min(ROWS, chosen.test)
    meter = Meter((member.lm, small.lm), both, read, swept(make), size)
    recipe = Recipe(chosen.steps, 2, chosen.rate, member.name)
    some = [task for task in every if task.name in wanted]
    for seed in range(chosen.seeds):
        experts = {}
        for task in some:
            own = recipe._replace(model=small.name)
            experts[task.name], one = tuned(
                folder / "small_models", task.name, small, task.train, own, seed
            )
            found["trained"][f"{task.name}, small, seed {seed}"] = notes(one)
        for n, task in enumerate(some):
            runs = found["losses"].setdefault(task.name, {})
            rows = runs.setdefault(str(seed), {})
            found["tokens"][task.name] = task.test.weights.sum(-1).tolist()
            expert, other = experts[task.name], experts[some[n - 1].name]
            # where the experts of merge_tasks.py are kept, which may be there
            whole, notes_ = tuned(
                folder / "merge_tasks", task.name, member, task.train, recipe, seed
            )
            found["trained"][f"{task.name}, whole, seed {seed}"] = notes(notes_)
            measure(meter, task.test, expert, whole, other, rows, report.save)
            if len(some) == 1:
                rows.pop(OTHER, None)  # it is its own
    asked = [f"Question: {q}\nAnswer:" for q, _ in problems(data, "test")[:4]]
    expert = experts[some[0].name]  # of the last seed
    drafts = draft_lm(small.lm, 3, greedy=True)
    for name, *drafter in (
        ("n-grams", None, ()),
        ("the small tuned model", drafts, expert),
    ):
        if name not in found["target"]:
            found["target"][name] = as_target(
                make(1.0),
                (member.params, expert, small.params),
                [*map(member.encode, asked)],
                8 if chosen.smoke else 24,
                proposer=drafter[0],
                own=drafter[1],
            )
            report.save()
    found["table"] = table(found)
    show(
        ["held-out answers", "nats", "gain", "from", "to", "share"],
        [
            (
                f"{x['task']}: {x['model']}",
                *(x["loss"], x["gain"], *x["interval"], x["share"]),
            )
            for x in found["table"]
        ],
        46,
    )
    conclude(report, verdicts(found["table"], found))
    picture(report.path, draw(found["table"]))
    return int(any(equal_rows(x) < x["rows"] for x in found["target"].values()))


if __name__ == "__main__":
    sys.exit(main())
