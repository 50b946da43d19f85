"""Contrastive decoding beside greedy text and plain sampling.

Claim: on prompts of Spec-Bench, text of SmolLM2-135M-Instruct by contrastive decoding,
in both forms, repeats itself less than greedy text, and another model (Gemma-3-270M)
finds it likelier than plain samples; greedy text of the composite is the same with
drafts.
Command: python experiments/contrastive_decoding.py [--smoke] [--data DIR] [--rows N]
[--new N] [--first A] [--last B] [--heal STEPS] [--ways NAME ...] [--output FILE]
[--fresh]; a run that was stopped is taken up again.
Data: DIR or $COLLAB_JAX_DATA holds spec_bench/question.jsonl as for
speculative_speed.py. Without it, a few prompts of this project are used.
Hardware: two CPU cores, 8 GiB; ten minutes for 8 prompts, three of them to heal the
small model where it is not there (`--smoke`: seconds, random toy models).
Expected: (November 2026) half of the claim holds. All forms of the second kind are
likelier than plain samples (by 0.7 to 0.95 bits a byte of 1.59), and greedy ones repeat
3-grams less than greedy text by a margin that eight prompts do not tell from none
(0.07 and 0.05 against 0.12). Search, the first form, repeats nothing (0.00) with the
last token as amateur, at the likelihood of samples; with the small model as amateur,
which was healed on the same prompts, it loops (0.29). Greedy texts equal with drafts.

Amateurs: the small model of proxy_tuning.py, and the model itself where it sees no more
of the prompt than its last token. Search is the first form, `log p_e - log p_a` over
what the expert finds plausible, by beams; the second form, `(1 + beta) log p_e - beta
log p_a`, is decoded greedily and by sampling. rep-n is the share of n-grams of a text
that it had before, diversity the product of `1 - rep-n` for n = 2, 3, 4. Bits per byte
of a text are those of the other model behind the prompt, whose own template is not the
chat's. Differences are paired over prompts, with 95 percent around them, one sample a
prompt; intervals are not corrected for their number. The small model was healed on
these prompts, not on answers to them.
"""

import math
import sys
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from joining.data import prompts
from joining.laws import as_target, equal_rows, same_with_drafts
from joining.member import GEMMA, SMOLLM2, Member, real, toy
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
from joining.small import Healing, Small, healed
from measuring.picture import picture
from speculating.same import packed, unpacked
from speculating.subject import texts

from collab_jax import combine, decode, score, warp
from collab_jax.commands.progress import progress
from collab_jax.cooperate.transfer.context import contexts, contextual
from collab_jax.cooperate.transfer.contrast import contrastive, contrastive_search
from collab_jax.decoder import Decoder
from collab_jax.io.hub import cache
from collab_jax.pool import Pool, contrast
from collab_jax.uncertainty import bootstrap

ROWS = 4  # prompts of a batch
BEAMS = 5
LONGEST = 160  # tokens of a prompt; longer ones are left out
START = 0  # of a shared text whose members have prompts of their own


class Way(NamedTuple):
    """One way to write."""

    decoder: Callable[[], Decoder]
    # prompts -> parameters, and what is decoded from
    inputs: Callable[[Sequence[Sequence[int]]], tuple[Any, Sequence[Sequence[int]]]]


def ways(
    member: Member, small: Small, new: int, eos: Sequence[int]
) -> tuple[dict[str, Way], dict[str, Any]]:
    """Every way to write, by name, and the composites for drafts."""
    own, ends = member.lm, {"eos": tuple(eos)}

    def alone(some):
        return member.params, some

    def both(some):
        return (member.params, small.params), some

    def blind(some):
        params, tokens, length = contexts(
            member.params, some, [prompt[-1:] for prompt in some]
        )
        fill = (0, -tokens.shape[-1] % 32)
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), fill))
        return (params, tokens, length), [[START]] * len(some)

    nucleus = warp.warp(own, warp.top_p(0.95))
    found = {
        "greedy": Way(lambda: decode.greedy(own, new, **ends), alone),
        "sampled": Way(lambda: decode.sample(own, new, **ends), alone),
        "sampled, top-p 0.95": Way(lambda: decode.sample(nucleus, new, **ends), alone),
    }
    amateurs: dict[str, tuple[Callable[[Pool], Any], Any]] = {
        "small": (lambda pool: combine.product([own, small.lm], pool), both),
        "last token": (lambda pool: contextual(own, pool), blind),
    }
    targets = {}
    for name, (make, inputs) in amateurs.items():
        search, second = make(contrastive(0.1)), make(contrast(0.1, 0.5))
        found[f"{name}: search"] = Way(
            lambda lm=search: contrastive_search(lm, new, BEAMS, **ends), inputs
        )
        found[f"{name}: contrast, greedy"] = Way(
            lambda lm=second: decode.greedy(lm, new, **ends), inputs
        )
        found[f"{name}: contrast, sampled"] = Way(
            lambda lm=second: decode.sample(lm, new, **ends), inputs
        )
        targets[name] = second, inputs
    return found, targets


def write(
    way: Way, some: Sequence[Sequence[int]], known: dict[str, str], report: Report
) -> None:
    """The text behind every prompt that has none yet."""
    program = decode.compile(lambda _: way.decoder())
    for place in range(0, len(some), ROWS):
        batch = [*some[place : place + ROWS]]
        names = [str(place + i) for i in range(len(batch))]
        if not all(name in known for name in names):
            batch += batch[:1] * (ROWS - len(batch))
            params, begin = way.inputs(batch)
            widest = max(map(len, begin))
            prompt, length = decode.pad(begin, 1 if widest == 1 else 32)
            key = jax.random.fold_in(jax.random.key(0), place)
            result = program(None, params, prompt, length, key)
            known |= dict(zip(names, packed(texts(result, len(names))), strict=True))
            report.save()


def judge(judging: Member) -> Callable[[Sequence[tuple[str, str]]], list[float]]:
    """Nats of texts behind their prompts, in the law of another model."""
    lm = judging.lm
    program = jax.jit(lambda *arguments: score.score(lm, *arguments, chunk=32).logprob)

    def read(pairs: Sequence[tuple[str, str]]) -> list[float]:
        cut = [(judging.encode(a), judging.encode(b)) for a, b in pairs]
        tokens, length = decode.pad([[judging.start, *a, *b] for a, b in cut], 64)
        logprob = np.asarray(program(judging.params, tokens, length))
        ends = [(1 + len(a), 1 + len(a) + len(b)) for a, b in cut]
        rows = zip(logprob, ends, strict=True)
        return [-float(row[a:b].sum()) for row, (a, b) in rows]

    return read


def repeated(tokens: Sequence[int], n: int) -> float:
    """The share of n-grams that a text had before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Text(NamedTuple):
    """What is measured of one text."""

    rates: dict[int, float]  # n -> rep-n
    diversity: float
    bits: float  # per byte
    tokens: int


def measured(found: dict[str, Any], member: Member) -> dict[str, list[Text]]:
    """Every text of every way, in the order of the prompts."""
    every = {}
    for name, known in found["texts"].items():
        order = sorted(known, key=int)
        own = []
        for key, row in zip(order, unpacked([known[k] for k in order]), strict=True):
            rates = {n: repeated(row, n) for n in (2, 3, 4)}
            size = 1 + len(member.decode(row).encode())  # with the space in front
            bits = found["nats"][name][key] / math.log(2) / size
            spread = math.prod(1 - rate for rate in rates.values())
            own.append(Text(rates, spread, bits, len(row)))
        every[name] = own
    return every


def table(every: dict[str, list[Text]]) -> list[dict[str, Any]]:
    """One line for each way: means over texts, and 95 percent around two of them."""
    lines = []
    for name, rows in every.items():
        two = {
            "diversity": bootstrap([row.diversity for row in rows]),
            "bits per byte": bootstrap([row.bits for row in rows]),
        }
        lines.append(
            {
                "way": name,
                "rows": len(rows),
                **{f"rep-{n}": fmean(r.rates[n] for r in rows) for n in (2, 3, 4)},
                **{what: interval.estimate for what, interval in two.items()},
                "intervals": {
                    what: [round(x.low, 3), round(x.high, 3)] for what, x in two.items()
                },
                "tokens": fmean(row.tokens for row in rows),
            }
        )
    return lines


def verdicts(every: dict[str, list[Text]], targets: dict) -> list[Verdict]:
    """What was expected, and what was seen; differences are over prompts."""

    def of(name: str, what: Callable[[Text], float]) -> list[float]:
        return [what(text) for text in every[name]]

    def rep(text: Text) -> float:
        return text.rates[3]

    def bits(text: Text) -> float:
        return text.bits

    said = [
        decided(
            "plain samples repeat themselves less than greedy text",
            between(of("greedy", rep), of("sampled", rep)),
            " of rep-3",
        ),
        decided(
            "and are less likely to the other model",
            between(of("sampled", bits), of("greedy", bits)),
            " bits per byte",
        ),
    ]
    for name in every:
        if ":" not in name:
            continue
        if not name.endswith("sampled"):
            said.append(
                decided(
                    f"{name}: it repeats itself less than greedy text",
                    between(of("greedy", rep), of(name, rep)),
                    f" of rep-3, which is {fmean(of(name, rep)):.3f} and "
                    f"{fmean(of('greedy', rep)):.3f}",
                )
            )
        said.append(
            decided(
                f"{name}: likelier to the other model than plain samples",
                between(of("sampled", bits), of(name, bits)),
                f" bits per byte; {fmean(of(name, bits)):.3f} and "
                f"{fmean(of('sampled', bits)):.3f}",
            )
        )
    for name, target in targets.items():
        said.append(
            same_with_drafts(
                f"greedy text is the same with drafts, amateur {name}", target
            )
        )
    return said


def draw(lines: Sequence[dict[str, Any]]) -> Any:
    """Every way as a point: how it repeats, and how likely it is."""

    def made(pyplot):
        figure, axis = pyplot.subplots(figsize=(7.5, 5))
        for line in lines:
            marker = "o" if ":" in line["way"] else "s"
            at = line["diversity"], line["bits per byte"]
            spread = [
                [[x - low], [high - x]]
                for x, (low, high) in zip(at, line["intervals"].values(), strict=True)
            ]
            axis.errorbar(*at, *spread[::-1], fmt=marker, elinewidth=0.5)
            axis.annotate(
                line["way"],
                (line["diversity"], line["bits per byte"]),
                textcoords="offset points",
                xytext=(5, 3),
                fontsize=7,
            )
        axis.set_xlabel("diversity: product of 1 - rep-n, n = 2, 3, 4")
        axis.set_ylabel("bits per byte of the text, another model")
        return figure

    return made


def main(arguments: list[str] | None = None) -> int:
    """Writes and measures; 0 where the texts with drafts are the plain ones."""
    parse = parser(__doc__)
    add = parse.add_argument
    add("--rows", type=int, default=2, help="prompts of a group")
    add("--new", type=int, default=64, help="new tokens")
    add("--first", type=int, default=10, help="layers of the small model")
    add("--last", type=int, default=10, help="and its last ones")
    add("--heal", type=int, default=40, help="steps on general text")
    add("--ways", nargs="+", metavar="NAME", help="these alone, by first words")
    chosen = parse.parse_args(arguments)
    member = toy(layers=2) if chosen.smoke else real(SMOLLM2)
    if chosen.smoke:
        chosen.first, chosen.last = 1, 0
        chosen.heal, chosen.rows, chosen.new = 0, 1, 12
        chosen.ways = ["greedy", "sampled", "small: search", "last token: contrast, g"]
    setting = {"model": member.name, "rows": chosen.rows, "new": chosen.new}
    setting |= {"first": chosen.first, "last": chosen.last, "heal": chosen.heal}
    parts = "texts", "nats", "target"
    report = opened("contrastive_decoding", chosen, setting, *parts)
    found, data = report.found, folder_of(chosen)
    how = Healing(chosen.first, chosen.last, chosen.heal)
    small = healed(member, how, cache() / "experiments" / "small_models", data)
    asked = [
        text
        for group in prompts(data).values()
        for text in [t for t in group if len(member.chat(t)) <= LONGEST][: chosen.rows]
    ]
    some = [member.chat(text) for text in asked]
    every, targets = ways(member, small, chosen.new, member.config.eos)
    if chosen.ways:
        begin = tuple(chosen.ways)
        every = {k: way for k, way in every.items() if k.startswith(begin)}
    with progress("ways", len(every)) as advance:
        for name, way in every.items():
            write(way, some, found["texts"].setdefault(name, {}), report)
            advance()
    for name, (lm, inputs) in [*targets.items()][: 1 if chosen.smoke else None]:
        if name not in found["target"]:
            params, begin = inputs(some[:ROWS])
            found["target"][name] = as_target(
                lm, params, begin, min(chosen.new, 32), eos=member.config.eos
            )
            report.save()
    left = [
        (name, place)
        for name in found["texts"]
        for place in range(0, len(some), ROWS)
        if str(place) not in found["nats"].setdefault(name, {})
    ]
    read = judge(toy(1) if chosen.smoke else real(GEMMA)) if left else None
    for name, place in left:
        rows = range(place, min(place + ROWS, len(some)))
        pairs = []
        for row in [*rows, *[place] * (ROWS - len(rows))]:
            (new,) = unpacked([found["texts"][name][str(row)]])
            pairs.append((f"Question: {asked[row]}\nAnswer:", f" {member.decode(new)}"))
        nats = read(pairs)
        found["nats"][name] |= {str(row): nats[row - place] for row in rows}
        report.save()
    every_text = measured(found, member)
    found["table"] = table(every_text)
    heads = "rep-2", "rep-3", "rep-4", "diversity", "bits per byte", "tokens"
    show(
        ["way to write", *heads],
        [(x["way"], *(x[head] for head in heads)) for x in found["table"]],
    )
    if {"greedy", "sampled"} <= {line["way"] for line in found["table"]}:
        conclude(report, verdicts(every_text, found["target"]))
    picture(report.path, draw(found["table"]))
    report.save()
    return int(any(equal_rows(x) < x["rows"] for x in found["target"].values()))


if __name__ == "__main__":
    sys.exit(main())
