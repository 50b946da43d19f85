"""Context-aware decoding where the context contradicts what the model remembers.

Claim: with a context that says something false, SmolLM2-135M-Instruct follows the
context more often, the larger alpha is; AdaCAD amplifies a false context more than a
true one, and spoils less than a large alpha where the context is true; a context that
says nothing of the question moves less; greedy text of the composite is the same with
drafts.
Command: python experiments/context_conflict.py [--smoke] [--data DIR] [--rows N]
[--output FILE] [--fresh]; a run that was stopped is taken up again.
Data: DIR or $COLLAB_JAX_DATA holds true_false/{capitals,companies}_true_false.csv of
https://github.com/balevinstein/Probes. Without it, six capitals of joining/data.py.
Hardware: two CPU cores, 4 GiB; 20 minutes while the machine was busy, for 12 rows of
each of eight groups (`--smoke`: seconds, a random toy model).
Expected: (November 2026; 24 subjects; mean, and 95 percent over subjects) a false
context is followed in 0.79 of the answers, without it memory says the same in 0.29;
alpha 0.5 adds 0.10 (0.00 to 0.23), 1 and 2 add 0.21 (0.08 to 0.38): to 1.00. Log odds
rise from 4.5 nats to 8.6, 12.9 and 22.0; a context that says nothing of the question
moves them by 1.2. AdaCAD in bits adds 3.8 nats (3.0 to 4.6) to a false context, 1.8
(0.8 to 2.9) more than to a true one. Not told apart: that more than half of what it
knows gives way (0.71), alpha 0.5 from 0, and AdaCAD from alpha 2 where the context is
true (both are right always).

A question asks for the country of a city or a company. The context contradicts: it
names another country, alone or after three true sentences on others; or it agrees: it
names the right one, after three such sentences. Control: the three sentences alone.
Forced choice: which of two countries has the larger log-prob, the context's or the
other; `log odds` is the mean difference.
Greedy: which of the two comes first in the text. The answer's first words ("Oslo is
in") are given: behind a bare "Answer:" the model without context says nothing. `known`
counts only questions that the model without context answers rightly. AdaCAD is measured
with its divergence in nats and in bits. That log odds rise with alpha is arithmetic
where the context raises them; that answers change is not. Intervals are not corrected
for their number.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from joining.data import SAID, facts
from joining.laws import argued, as_target, equal_rows, same_with_drafts, swept
from joining.member import SMOLLM2, Member, real, toy
from joining.report import (
    Report,
    Verdict,
    between,
    conclude,
    decided,
    folder_of,
    opened,
    parser,
    show,
)
from measuring.picture import picture
from speculating.subject import texts

from collab_jax import decode, uncertainty
from collab_jax.commands.progress import progress
from collab_jax.cooperate.transfer.context import adacad, cad, contexts, contextual
from collab_jax.lm import LM
from collab_jax.uncertainty import Interval

KINDS = "contradicts", "contradicts, among others", "agrees, among others"
SILENT = "says nothing of it"  # the control
LAWS = {  # alpha, and the scale of the divergence: 0 for a constant alpha
    "without context": (-1.0, 0.0),
    "with context": (0.0, 0.0),
    "alpha 0.5": (0.5, 0.0),
    "alpha 1": (1.0, 0.0),
    "alpha 2": (2.0, 0.0),
    "AdaCAD, nats": (0.0, 1.0),
    "AdaCAD, bits": (0.0, 1 / math.log(2)),
}
NEW = 10  # tokens of an answer
ROWS = 6  # questions of a batch
START = 0  # of the shared text; each member reads its own prompt in its place


class Item(NamedTuple):
    """A question, with and without its context, and two answers."""

    group: str
    known: str
    question: str
    first: str  # what the context says
    second: str  # what is true, or something false where the context is true


def items(known: dict[str, list[tuple[str, str]]], rows: int) -> list[Item]:
    """Questions on the same subjects in every group; those of the control are last."""
    found, silent, rng = list[Item](), list[Item](), np.random.default_rng(0)
    for topic, pairs in known.items():
        order = rng.permutation(len(pairs))
        said, asked, begun = SAID[topic]
        countries = list(dict.fromkeys(country for _, country in pairs))
        for place in order[:rows]:
            subject, true = pairs[place]
            false = str(rng.choice([c for c in countries if c != true]))
            others = [
                pairs[i]
                for i in order
                if i != place and pairs[i][1] not in (true, false)
            ]
            some = rng.choice(len(others), min(3, len(others)), replace=False)
            before = " ".join(f"{said.format(*others[i])}." for i in some)
            for kind in KINDS:
                first = true if kind.startswith("agrees") else false
                own = f"{said.format(subject, first)}."
                context = own if kind == KINDS[0] else f"{before} {own}"
                answer = begun.format(subject)
                question = f"Question: {asked.format(subject)}\nAnswer: {answer}"
                second = false if first == true else true
                found.append(Item(f"{topic}: {kind}", context, question, first, second))
            silent.append(Item(f"{topic}: {SILENT}", before, question, false, true))
    return found + silent


def law(knob: jax.Array, _: Any, lm: LM) -> LM:
    """The composite of one (alpha, scale)."""
    alpha, scale = knob[0], knob[1]
    adaptive, constant = adacad(0.0, scale), cad(alpha)

    def pool(members):
        return jnp.where(scale > 0, adaptive(members), constant(members))

    return contextual(lm, pool)


def rows_of(member: Member, some: Sequence[Item], times: int = 1) -> Any:
    """The parameters of a batch: prompts with and without the context."""
    with_it, without = [], []
    for item in some:
        question = member.encode(item.question)
        with_it += [member.encode(f"{item.known}\n") + question] * times
        without += [question] * times
    params, tokens, length = contexts(member.params, with_it, without)
    width = (0, -tokens.shape[-1] % 32)  # few widths, few programs
    return params, jnp.pad(tokens, ((0, 0), (0, 0), width)), length


def first_named(text: str, item: Item) -> str:
    """Which answer comes first in a text."""
    places = [text.find(answer) for answer in (item.first, item.second)]
    if max(places) < 0:
        return "neither"
    if min(places) < 0:
        return "first" if places[0] >= 0 else "second"
    return "first" if places[0] < places[1] else "second"


def measure(member: Member, every: Sequence[Item], report: Report) -> None:
    """Both measures of every law, batch by batch; what is known is left out."""
    names, knobs = [*LAWS], jnp.array([*LAWS.values()])
    lm = member.lm
    choose = swept(lambda knob, parts: law(knob, parts, lm))
    write = decode.compile(
        lambda knob: decode.greedy(
            law(knob, (), lm), NEW, eos=member.encode("\n")[-1:], chunk=32
        )
    )
    chosen, written = report.found["choices"], report.found["texts"]
    places = range(0, len(every), ROWS)
    with progress("batches and laws", len(places) * (1 + len(names))) as advance:
        for place in places:
            batch = [*every[place : place + ROWS]]
            key, count = str(place), len(batch)
            some = batch + batch[:1] * (ROWS - count)
            if key not in chosen:
                answers = [
                    [START, *member.encode(f" {answer}")]
                    for item in some
                    for answer in (item.first, item.second)
                ]
                tokens, length = decode.pad(answers, 8)
                params = rows_of(member, some, 2)
                found = choose(knobs, (), params, tokens, length).sum(-1)
                found = np.asarray(found).reshape(len(names), -1, 2)[:, :count]
                chosen[key] = dict(zip(names, found.round(4).tolist(), strict=True))
                report.save()
            advance()
            if all(item.group.endswith(SILENT) for item in batch):
                continue  # choices are enough for the control
            params = rows_of(member, some)
            start = decode.pad([[START]] * ROWS)
            own = written.setdefault(key, {})
            for name, knob in zip(names, knobs, strict=True):
                if name not in own:
                    result = write(knob, params, *start, jax.random.key(0))
                    own[name] = [*map(member.decode, texts(result, count))]
                    report.save()
                advance()


def gaps_of(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Log-prob of the first answer less that of the second, by law and item."""
    parts = [found["choices"][key] for key in sorted(found["choices"], key=int)]
    rows = {law: np.array([row for part in parts for row in part[law]]) for law in LAWS}
    return {law: both[:, 0] - both[:, 1] for law, both in rows.items()}


def table(every: Sequence[Item], found: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each group and law."""
    gaps, order = gaps_of(found), sorted(found["texts"], key=int)
    said = {
        law: [text for key in order for text in found["texts"][key][law]]
        for law in LAWS
    }
    lines = []
    for group in dict.fromkeys(item.group for item in every):
        at = [i for i, item in enumerate(every) if item.group == group]
        sign = 1 if "agrees" in group else -1
        right = [i for i in at if sign * gaps["without context"][i] > 0]
        for name in LAWS:
            follows = gaps[name] > 0
            written = [i for i in at if i < len(said[name])]  # all or none
            named = [first_named(said[name][i], every[i]) for i in written]
            interval = uncertainty.wilson(int(follows[at].sum()), len(at))
            lines.append(
                {
                    "group": group,
                    "law": name,
                    "rows": len(at),
                    "follows": interval.estimate,
                    "interval": [round(interval.low, 3), round(interval.high, 3)],
                    "known": len(right),
                    "follows known": float(follows[right].mean()) if right else None,
                    "log odds": float(gaps[name][at].mean()),
                    "greedy": {
                        k: named.count(k) for k in ("first", "second", "neither")
                    },
                }
            )
    return lines


def cells(line: dict[str, Any]) -> list[Any]:
    """A line as it is shown."""
    known = "-" if line["follows known"] is None else line["follows known"]
    start = [f"{line['group']}: {line['law']}", line["rows"], line["follows"], known]
    return [*start, line["log odds"], *line["greedy"].values()]


class Seen(NamedTuple):
    """What every law says, in one array of subjects for each kind of context."""

    odds: dict[str, dict[str, np.ndarray]]  # kind -> law -> log odds of the first

    def of(self, law: str, *kinds: str) -> np.ndarray:
        """Log odds of a subject, the mean over kinds."""
        return np.mean([self.odds[kind][law] for kind in kinds], 0)

    def share(self, law: str, *kinds: str) -> np.ndarray:
        """How often a subject's answer is the first, over kinds."""
        return np.mean([self.odds[kind][law] > 0 for kind in kinds], 0)


def by_subject(every: Sequence[Item], found: dict[str, Any]) -> Seen:
    """Subjects in one order for every kind."""
    gaps = gaps_of(found)
    at: dict[str, list[int]] = {kind: [] for kind in (*KINDS, SILENT)}
    for i, item in enumerate(every):
        at[item.group.split(": ", 1)[1]].append(i)
    return Seen(
        {kind: {law: gaps[law][own] for law in LAWS} for kind, own in at.items()}
    )


def verdicts(seen: Seen, target: dict[str, Any]) -> list[Verdict]:
    """What was expected, and what was seen. Intervals are over subjects."""
    none, plain, ada = "without context", "with context", "AdaCAD, bits"
    rising = [plain, "alpha 0.5", "alpha 1", "alpha 2"]
    wrong, (_, among, right) = KINDS[:2], KINDS
    steps = [float(seen.of(name, *wrong).mean()) for name in rising]
    known = seen.of(none, among) < 0
    follows = seen.share(plain, *wrong)[known]

    def follow(law: str) -> str:
        return f"{law} {seen.share(law, *wrong).mean():.2f}"

    def more(kind: str, law: str, less: str) -> np.ndarray:
        return seen.of(law, kind) - seen.of(less, kind)

    shares = f" of the answers; {', '.join(map(follow, [none, *rising]))}"
    return [
        decided(
            "of what it knows, the model follows a false context in more than half",
            between(follows - 0.5, np.zeros(len(follows)))
            if known.any()
            else Interval(0.0, -math.inf, math.inf),
            f" above half; {known.sum()} subjects, each asked twice",
        ),
        *(
            decided(
                f"{law} follows a false context more often than alpha 0",
                between(seen.share(law, *wrong), seen.share(plain, *wrong)),
                shares,
            )
            for law in rising[1:]
        ),
        Verdict(
            "the log odds of a false context's answer rise from alpha 0 to 2",
            ", ".join(f"{name} {x:.2f}" for name, x in zip(rising, steps, strict=True)),
            all(a < b for a, b in itertools.pairwise(steps)),
        ),
        decided(
            "AdaCAD (bits) amplifies a false context",
            between(seen.of(ada, *wrong), seen.of(plain, *wrong)),
            " nats of log odds over alpha 0",
        ),
        decided(
            "and a false one more than a true one",
            between(more(among, ada, plain), more(right, ada, plain)),
            " nats",
        ),
        decided(
            "where the context is true, AdaCAD (bits) is right more often than alpha 2",
            between(seen.share(ada, right), seen.share("alpha 2", right)),
            f" of the answers; AdaCAD {seen.share(ada, right).mean():.2f}, alpha 2 "
            f"{seen.share('alpha 2', right).mean():.2f}",
        ),
        decided(
            "control: a context that says nothing of it moves alpha 1 less",
            between(more(among, "alpha 1", none), more(SILENT, "alpha 1", none)),
            f" nats of log odds; it moves them by "
            f"{more(SILENT, 'alpha 1', none).mean():.2f}",
        ),
        same_with_drafts("greedy text is the same with drafts", target),
    ]


def draw(lines: Sequence[dict[str, Any]]) -> Any:
    """Shares by law, a line for each group."""

    def made(pyplot):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
        for group in dict.fromkeys(line["group"] for line in lines):
            own = [line for line in lines if line["group"] == group]
            style = {"agre": "--", "says": ":"}.get(group.split(": ")[1][:4], "-")
            for axis, field in ((left, "follows"), (right, "log odds")):
                axis.plot([x[field] for x in own], style, marker="o", label=group)
        left.set_ylabel("share of answers that follow the context")
        right.set_ylabel("mean log odds of the context's answer, nats")
        for axis in (left, right):
            axis.set_xticks(range(len(LAWS)), [*LAWS], rotation=30, ha="right")
        left.legend(fontsize=7)
        return figure

    return made


def main(arguments: list[str] | None = None) -> int:
    """Measures; 0 where the texts with drafts are the plain ones."""
    parse = parser(__doc__)
    parse.add_argument("--rows", type=int, default=12, help="questions of a group")
    chosen = parse.parse_args(arguments)
    member = toy() if chosen.smoke else real(SMOLLM2)
    rows = 1 if chosen.smoke else chosen.rows
    every = items(facts(folder_of(chosen)), rows)
    setting = {"model": member.name, "rows": rows, "new": NEW, "laws": [*LAWS]}
    setting["asked"] = every[0].question
    report = opened("context_conflict", chosen, setting, "choices", "texts", "target")
    found = report.found
    measure(member, every, report)
    if not found["target"]:
        some = [item for item in every if "among" in item.group][: 2 * ROWS : 2]
        lm = argued(lambda knob: law(knob, (), member.lm), jnp.zeros(2))
        params = jnp.array(LAWS["alpha 1"]), rows_of(member, some)
        found["target"] = as_target(lm, params, [[START]] * len(some), NEW)
        report.save()
    found["table"] = table(every, found)
    head = "answers that follow the context", "rows", "share", "of known", "log odds"
    show([*head, "greedy", "other", "neither"], [*map(cells, found["table"])], 58)
    conclude(report, verdicts(by_subject(every, found), found["target"]))
    picture(report.path, draw(found["table"]))
    return int(equal_rows(found["target"]) < found["target"]["rows"])


if __name__ == "__main__":
    sys.exit(main())
