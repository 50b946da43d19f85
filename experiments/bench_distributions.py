"""Composites of models beside the same arithmetic on logits in transformers.

Claim: on the same models and prompts, in float32, greedy decoding of an ensemble of
two, of a proxy-tuned model of three and by a contrast of two is at least 1.5x faster
than transformers with a LogitsProcessor that runs the other members on their own
caches, and gives the same tokens, up to ties that are shown. N = 2 and 4 stacked models
of one shape take at most 1.05 N times as long as one, say what a loop over members
says, and have the while loops of one, without a transfer to the host. Bridges between
SmolLM2's 49k and Gemma's 262k tokens take under 60 s and 2 GiB of a process (exact,
union, MinED) and under ten minutes (EVA); MinED and EVA come from the cache then. The
composites have the same greedy text with drafts.
Command: python experiments/bench_distributions.py [--smoke] [--data DIR] [--rows N]
[--repeats R] [--layers E] [--new N] [--alternations A] [--plain]
[--parts peer target stacked bridges eva] [--output FILE] [--fresh]; a run that was
stopped is taken up again, and parts can be measured one by one. The part `peer` needs
the extra `parity`; without torch ours is measured alone. Matrices are packed
(`collab_jax.models.packed`), with `--plain` they are not.
Data: as for speculative_speed.py.
Hardware: two idle CPU cores, 10 GiB; estimated at nine minutes for `peer`, five for
`stacked`, `target` and `bridges` together, six for `eva` (`--smoke`: seconds, ours
alone, toys).
Expected: (November 2026) faster than transformers 2.7 times (ensemble), 2.9 (proxy),
2.8 (contrast), all tokens equal; two and four stacked models take 0.98 times 2 and 4
single ones (with plain matrices 0.85 and 0.79); exact 5 s, union 12 s, MinED 26 s, up
to 1.2 GiB; EVA 300 s and 4.2 GiB; from the cache ten seconds each.

The second member of the ensemble is the model with noise, the small pair are its first
E layers, with noise and without. Who comes first alternates from prompt to prompt.
Seconds are those of the whole call, with the prompt read; programs are compiled before,
and a ratio is that of the sums. `x plain` is over our plain greedy decoding of the
first member alone. Stacked models and one alone alternate too; their ratio is that of
medians. Loops and transfers are counted in the lowered program. A bridge is built in a
process of its own, tokenizers and embeddings read before the clock starts; bytes are
those of the whole process.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from bench_speculative import Run, Way, compare, timed
from joining import bridging, stacking
from joining.laws import as_target, equal_rows, same_with_drafts
from joining.report import Report, Verdict, conclude, folder_of, opened, parser
from measuring.picture import picture
from speculating.peer import torch_greedy, torched
from speculating.ratios import table
from speculating.strategies import cut, noisy, packed_each
from speculating.subject import NAME, Subject, real, toy

from collab_jax import combine, decode
from collab_jax.cooperate.transfer.offset import proxy_tuning
from collab_jax.io import load
from collab_jax.lm import LM, language_model
from collab_jax.models import transformer
from collab_jax.pool import contrast, mixture

FASTER = 1.5  # the bar
SIZES = (2, 4)  # models that are stacked
PARTS = "peer", "target", "stacked", "bridges", "eva"
PLAIN = "greedy, one model"


class Composite(NamedTuple):
    """What is decoded, here and by the peer."""

    lm: LM
    params: Any  # a tuple of the members' where there are several
    configs: tuple[Any, ...]  # of the members
    pool: str  # name of the peer's arithmetic


def composites(subject: Subject, layers: int) -> dict[str, Composite]:
    """Everything that is compared, by name."""
    lm, params, config = subject.lm, subject.params, subject.config
    own, small = cut(subject, layers)
    few = language_model(transformer.transformer(own))
    tuned, other = noisy(small, 3, stacking.NOISE), noisy(params, 1, stacking.NOISE)
    product = combine.product
    return {
        PLAIN: Composite(lm, params, (config,), "plain"),
        "ensemble of two": Composite(
            product([lm, lm], mixture(0.5, 0.5)),
            (params, other),
            (config, config),
            "mixture",
        ),
        "proxy tuning, three": Composite(
            product([lm, few, few], proxy_tuning(1.0)),
            (params, tuned, small),
            (config, own, own),
            "proxy",
        ),
        "contrast of two": Composite(
            product([lm, few], contrast(0.1, 0.5)),
            (params, small),
            (config, own),
            "contrast",
        ),
    }


def arithmetic() -> dict[str, Callable]:
    """The pools as torch has them, from a list of log-probs `[B, V]`."""
    import torch

    def contrasted(laws):
        expert, amateur = laws
        least = expert.max(-1, keepdim=True).values + np.log(0.1)
        return (1.5 * expert - 0.5 * amateur).masked_fill(expert < least, -torch.inf)

    return {
        "mixture": lambda laws: torch.logsumexp(torch.stack(laws) + np.log(0.5), 0),
        "proxy": lambda laws: laws[0] + laws[1] - laws[2],
        "contrast": contrasted,
    }


def peers(subject: Subject, every: dict[str, Composite]) -> dict[str, Run]:
    """transformers on the same parameters."""
    import torch
    import transformers

    whole, pools = load.load(NAME), arithmetic()
    known: dict[int, Any] = {}  # a model is there once, whatever it takes part in

    def once(params, config):
        if id(params) not in known:
            known[id(params)] = torched(whole._replace(params=params, config=config))
        return known[id(params)]

    class Others(transformers.LogitsProcessor):
        """Runs the other members, each on its own cache, and joins the laws."""

        def __init__(self, models, pool):
            self.models, self.pool = models, pool
            self.caches: list[Any] = [None] * len(models)
            self.seen = 0

        def __call__(self, tokens, scores):
            laws = [torch.log_softmax(scores, -1)]
            for n, model in enumerate(self.models):
                out = model(
                    tokens[:, self.seen :],
                    past_key_values=self.caches[n],
                    use_cache=True,
                    logits_to_keep=1,
                )
                self.caches[n] = out.past_key_values
                laws.append(torch.log_softmax(out.logits[:, -1].float(), -1))
            self.seen = tokens.shape[1]
            return self.pool(laws)

    def run(composite: Composite) -> Run:
        several = len(composite.configs) > 1
        params = composite.params if several else (composite.params,)
        parts = zip(params, composite.configs, strict=True)
        first, *others = [once(*part) for part in parts]

        def options():
            if not others:
                return {}
            joined = Others(others, pools[composite.pool])
            return {"logits_processor": transformers.LogitsProcessorList([joined])}

        return torch_greedy(first, subject, options)

    return {name: run(composite) for name, composite in every.items()}


def beside(
    subject: Subject,
    every: dict[str, Composite],
    theirs: dict[str, Run],
    repeats: int,
    report: Report,
) -> None:
    """Times what is missing of every composite on every prompt, both in turn."""
    for name, composite in every.items():
        decoder = decode.greedy(composite.lm, subject.new, eos=subject.eos)
        program = decode.compile(lambda _, decoder=decoder: decoder)
        own = subject._replace(lm=composite.lm, params=composite.params)
        way = Way(timed(program, composite.params, own), theirs.get(name))
        compare(own, {name: way}, repeats, report.found["runs"], report.save)


def drafted(
    subject: Subject, every: dict[str, Composite], new: int, report: Report
) -> None:
    """Every composite as the target of speculative decoding."""
    some = [group[0] for group in subject.prompts.values()][:4]
    for name, composite in every.items():
        if name != PLAIN and name not in report.found["target"]:
            report.found["target"][name] = as_target(
                composite.lm, composite.params, some, new, eos=subject.eos
            )
            report.save()


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """What was expected, and what was seen."""
    said = []
    for line in found["table"]:
        if "over peer" not in line:
            continue
        wrong = line["apart"] - line["ties"]
        if line["way"] != PLAIN:
            each = [
                (run["peer"]["seconds"] / run["peer"]["tokens"])
                / (run["ours"]["seconds"] / run["ours"]["tokens"])
                for run in found["runs"]
                if run["way"] == line["way"] and "peer" in run
            ]
            said.append(
                Verdict(
                    f"{line['way']}: {FASTER} times faster than the peer",
                    f"{line['over peer']:.2f} times; the prompts "
                    f"{min(each):.2f} to {max(each):.2f}",
                    line["over peer"] >= FASTER,
                )
            )
        said.append(
            Verdict(
                f"{line['way']}: the peer's tokens, up to ties",
                f"{wrong} texts apart, and {line['ties']} by a tie",
                not wrong,
            )
        )
    said += stacking.verdicts(found["stacked"])
    said += bridging.verdicts(found["bridges"])
    for name, target in found["target"].items():
        said.append(
            same_with_drafts(f"{name}: greedy text is the same with drafts", target)
        )
    return said


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'tokens a second':24}{'ours':>9}{'x plain':>9}{'peer':>9}{'x peer':>9}")
    for line in lines:
        numbers = [line.get(k) for k in ("ours", "over plain", "peer", "over peer")]
        cells = "".join(f"{'-' if n is None else f'{n:.2f}':>9}" for n in numbers)
        print(f"{line['way']:24}{cells}   {line['apart']} apart, {line['ties']} ties")
    print()


def draw(found: dict[str, Any]) -> Any:
    """How many times faster than the peer, and the ratio of stacked models."""

    def made(pyplot):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2))
        lines = [line for line in found["table"] if "over peer" in line]
        left.barh([x["way"] for x in lines], [x["over peer"] for x in lines])
        left.axvline(FASTER, color="tab:red")
        left.invert_yaxis()
        left.set_xlabel("times faster than transformers")
        values = stacking.ratios(found["stacked"])
        right.bar([*values], [*values.values()], width=0.5)
        right.axhline(stacking.BAR, color="tab:red")
        right.set_xlabel("stacked models, N")
        right.set_ylabel("seconds over N times one")
        return figure

    return made


def measure(part: str, subject: Subject, chosen: Any, report: Report) -> None:
    """What is missing of one part."""
    found, smoke = report.found, chosen.smoke
    held = (lambda params: params) if chosen.plain else packed_each
    if part in ("peer", "target"):
        every = composites(subject, chosen.layers)
        if smoke:  # one for all
            every = {name: every[name] for name in (PLAIN, "contrast of two")}
        there = not smoke and importlib.util.find_spec("torch") is not None
        theirs = peers(subject, every) if there and part == "peer" else {}
        every = {
            name: composite._replace(params=held(composite.params))
            for name, composite in every.items()
        }
        if part == "target":
            drafted(subject, every, min(chosen.new, 32), report)
        else:
            beside(subject, every, theirs, chosen.repeats, report)
    elif part == "stacked":
        sizes, new = SIZES[:1] if smoke else SIZES, min(chosen.new, 32)
        times, known = chosen.alternations, found["stacked"]
        stacking.stacks(subject, held, sizes, new, times, known, report.save)
    else:
        kinds = bridging.QUICK if part == "bridges" else (bridging.SLOW,)
        bridging.bridges(kinds, smoke, found["bridges"], report.save)


def main(arguments: list[str] | None = None) -> int:
    """Measures; 0 where the texts are the peer's and the plain ones, up to ties."""
    parse = parser(__doc__)
    add = parse.add_argument
    add("--rows", type=int, default=1, help="prompts of a group")
    add("--repeats", type=int, default=1, help="of every prompt")
    add("--layers", type=int, default=15, help="of the small models")
    add("--new", type=int, default=48, help="new tokens")
    add("--alternations", type=int, default=9, help="of stacked models and one")
    add("--parts", nargs="+", metavar="NAME", choices=PARTS, default=PARTS)
    add("--plain", action="store_true", help="no packed matrices")
    chosen = parse.parse_args(arguments)
    smoke, parts = chosen.smoke, set(chosen.parts)
    if smoke:
        subject, chosen.layers, chosen.new, chosen.alternations = toy(), 1, 8, 1
        first = next(iter(subject.prompts))
        subject = subject._replace(prompts={first: subject.prompts[first][:1]})
    else:
        data = folder_of(chosen)
        subject = real(None if data is None else str(data), chosen.rows)
    subject = subject._replace(new=chosen.new)
    keys = "rows", "repeats", "layers", "new", "alternations", "plain"
    setting = {key: getattr(chosen, key) for key in keys}
    names = "stacked", "target", "bridges", "load"
    report = opened("bench_distributions", chosen, setting, *names)
    found = report.found
    found.setdefault("runs", [])
    for part in [name for name in PARTS if name in parts]:
        found["load"][part] = round(os.getloadavg()[0], 2)  # of the machine, before
        measure(part, subject, chosen, report)
    found["table"] = table(found)
    show(found["table"])
    conclude(report, verdicts(found))
    picture(report.path, draw(found))
    apart = any(line["apart"] > line["ties"] for line in found["table"])
    return int(
        apart or any(equal_rows(x) < x["rows"] for x in found["target"].values())
    )


if __name__ == "__main__":
    sys.exit(main())
