"""Greedy text is the same with every draft, for every target, in batches of 1 and 8.

Claim: with any proposer the greedy text of the plain target, and with n-gram drafts
that of every target (penalised, merged, ensembled, contrastive, cascaded, proxy-tuned,
context-aware, and all of these at once), is token for token that of plain greedy
decoding of the same target; where it is not, the two best candidates are shown to lie
within 1e-4. So is the full cross of targets and proposers, on short texts.
Command: python experiments/speculative_exact.py [--smoke] [--toy] [--data DIR]
[--parts P ...] [--rows N] [--plain] [--output FILE]; a run that was stopped is taken
up again, and several processes share one file (each on cores of its own: compilation
takes one). Matrices are packed (`collab_jax.models.packed`), with `--plain` they are
not.
Parts: `proposers`, `targets` (batches of 8, 128 new tokens), `alone` (batches of 1) and
`cross` (the last 128 tokens of one prompt of a group, 32 new tokens).
Data: as for speculative_speed.py.
Hardware: two CPU cores, 14 GiB, two processes: `cross` 38 minutes, `proposers` and
`targets` an hour each, `alone` three; `--toy`, a random Llama: 16 minutes (`--smoke`: a
few cases of it).
Expected: `--toy`: all 706 texts of 202 cases equal. Of the real prompts: all 1,020 of
`proposers` and all 912 of `cross` equal; of `targets` 539 of 540, and a penalised text
leaves where its two best candidates lie 8e-6 apart; all 1,500 of `alone` equal, with
the calls of batches of 8 up to three in 5,900. Tokens a call with drafts of four:
prompt lookup 1.56, n-grams 1.63, adaptive n-grams and suffixes 1.65, recycling 1.53
(tree 1.70), lookahead 1.50, 25 of the 30 layers as a draft model or as an early exit
1.61 (stopping where it is not sure 1.60, tree 1.74, expanded tree 1.77), heads and
feature layers, which are untrained here, 1.00 to 1.09; n-grams for a cascade 3.07, a
merged model 2.16, an ensemble 1.72, context-aware 1.69, contrastive 1.65, all of these
at once 1.47, proxy-tuned 1.42, penalised 1.01. Seconds hold pauses and other work.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from measuring.options import options
from measuring.sharing import Report
from speculating import same
from speculating.strategies import (
    EARLY,
    Source,
    Strategy,
    in_halves,
    packed_each,
    sources,
    targets,
)
from speculating.subject import Subject, count, real, texts, toy

from collab_jax import decode
from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import exact
from collab_jax.cooperate.efficient.speculate import speculate

RESULTS = Path(__file__).parent / "results" / "speculative_exact.json"
PARTS = "proposers", "targets", "cross", "alone"
PLAIN, FREE, AWARE = "plain", "n-gram", "context-aware"
SHORT = 128  # tokens of a short prompt, its last ones
LENGTH = 4  # tokens of a draft: longer ones cost time, and show nothing else


class Case(NamedTuple):
    """A target with a proposer, over some prompts."""

    target: str
    source: str
    size: int  # rows of a batch
    short: bool  # one prompt of a group and few tokens

    @property
    def key(self) -> str:
        """Its name in the report."""
        return " | ".join([self.target, self.source, str(self.size), *self.ending])

    def batches(self, subject: Subject) -> int:
        """How many."""
        return 1 if self.short else len(subject.batches(self.size))

    @property
    def ending(self) -> list[str]:
        """What is said of short texts."""
        return ["short"] if self.short else []


def cases(parts: Sequence[str], every: Sequence[str], drafts: Sequence[str]):
    """What is run; the cheap parts first."""
    found = []
    if "proposers" in parts:
        found += [Case(PLAIN, draft, 8, False) for draft in drafts]
    if "targets" in parts:
        found += [Case(target, FREE, 8, False) for target in every]
    if "cross" in parts:
        pairs = [(target, draft) for target in every for draft in drafts]
        # what a layer read behind one context is nothing for a member behind another
        pairs = [pair for pair in pairs if pair != (AWARE, EARLY)]
        found += [Case(target, draft, 8, True) for target, draft in pairs]
    if "alone" in parts:
        found += [Case(PLAIN, draft, 1, False) for draft in drafts]
        found += [Case(target, FREE, 1, False) for target in every]
    return list(dict.fromkeys(found))


class Trial:
    """Everything that cases share: plain texts, and margins where texts differ."""

    def __init__(self, subject: Subject, chosen: argparse.Namespace, found: dict):
        """Keeps what was found before."""
        self.subject, self.found = subject, found
        plain = "matrices" not in found["setting"]
        self.packed = (lambda params: params) if plain else packed_each
        self.targets = targets(subject, chosen.layers)
        halves = in_halves(subject, chosen.layers)
        self.halved = targets(subject, chosen.layers, large=halves)
        self.sources = sources(subject, chosen.layers)
        self.of: tuple[tuple[str, bool], Strategy] | None = None

    def strategy(self, name: str, halved: bool = False) -> Strategy:
        """A target; only the last one stays in memory."""
        if self.of is None or self.of[0] != (name, halved):
            self.of = None
            made = (self.halved if halved else self.targets)[name]()
            params, own = self.packed((made.params, made.own))
            self.of = (name, halved), made._replace(params=params, own=own)
        return self.of[1]

    def run(self, case: Case, advance: Callable[[], None]) -> dict[str, Any]:
        """Decodes the case, and plainly what is not known yet."""
        target = self.strategy(case.target, case.source == EARLY)
        source: Source = self.sources[case.source]()
        drafting = self.packed(source.params)
        drafting = target.own if drafting is None else drafting
        new = 32 if case.short else self.subject.new
        ends = {"eos": self.subject.eos}
        plain = decode.compile(lambda _: decode.greedy(target.lm, new, **ends))
        drafted = decode.compile(
            lambda _: speculate(
                source.target(target.lm),
                source.proposer,
                new,
                verifier=exact.greedy(),
                **ends,
            )
        )
        groups = self.subject.prompts
        one_of_each = [[(group, 0) for group in groups]]
        batches = one_of_each if case.short else self.subject.batches(case.size)
        report: dict[str, Any] = {"rows": 0, "tokens": 0, "calls": 0, "apart": []}
        by_group: dict[str, list[int]] = {}  # tokens and calls
        begin = time.perf_counter()
        for rows in batches:
            size = len(groups) if case.short else case.size
            lists = self.subject.of(rows)
            if case.short:
                lists = [tokens[-SHORT:] for tokens in lists]
            prompt, length = self.subject.padded(lists, size)
            params, key = target.rows(target.params, prompt), jax.random.key(0)
            place = " | ".join([case.target, same.name_of(rows), *case.ending])
            known = self.found["plain"]
            if place not in known:
                result = plain(None, params, prompt, length, key)
                known[place] = same.packed(texts(result, len(lists)))
            result = drafted(None, (params, drafting), prompt, length, key)
            got = texts(result, len(lists))
            report["rows"] += len(lists)
            count(by_group, rows, got, result.info.calls)
            report["apart"] += self.differences(
                target, rows, lists, got, same.unpacked(known[place])
            )
            advance()
        report["tokens"], report["calls"] = map(
            sum, zip(*by_group.values(), strict=True)
        )
        seconds = round(time.perf_counter() - begin, 1)
        return report | {"groups": by_group, "seconds": seconds}

    def differences(self, target, rows, lists, got, expected):
        """Where rows differ from the plain ones, in the law of the target itself."""
        if got == expected:
            return []

        def margin(prompt, new):
            one, _ = decode.pad([prompt], 1)
            own = target.rows(target.params, one)
            return same.margins(target.lm, own)(prompt, new)

        return same.differences(rows, lists, got, expected, margin)


def show(found: dict[str, Any]) -> None:
    """The tables."""
    print(
        f"\n{'target':16}{'proposer':18}{'batch':>6}{'rows':>6}{'tok/call':>10}  apart"
    )
    for key, report in found["cases"].items():
        target, source, size, *short = key.split(" | ")
        rate = report["tokens"] / max(report["calls"], 1)
        ties = sum(gap["tie"] for gap in report["apart"])
        size = "6" if short else size
        print(
            f"{target:16}{source:18}{size:>6}{report['rows']:6}{rate:10.2f}  "
            f"{len(report['apart'])} ({ties} by a tie)"
        )
    show_groups(found)


def show_groups(found: dict[str, Any]) -> None:
    """Tokens a call of the plain target, by group of prompts."""
    whole = {
        key: report["groups"]
        for key, report in found["cases"].items()
        if "groups" in report and key.split(" | ")[0] == PLAIN and "short" not in key
    }
    if not whole:
        return
    names = list(next(iter(whole.values())))
    print(f"\n{'tokens a call':24}" + "".join(f"{name[:13]:>15}" for name in names))
    for key, groups in whole.items():
        rates = (groups[name][0] / max(groups[name][1], 1) for name in names)
        source, size = key.split(" | ")[1:]
        cells = "".join(f"{rate:15.2f}" for rate in rates)
        print(f"{source + ', ' + size:24}{cells}")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing; 0 where every text is the plain one, up to ties."""
    parser = options(__doc__)
    parser.add_argument("--toy", action="store_true", help="a random Llama")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=10, help="prompts of a group")
    parser.add_argument(
        "--plain", action="store_true", help="matrices that are not packed, as --toy"
    )
    parser.add_argument("--layers", type=int, help="of draft models and amateurs")
    chosen = parser.parse_args(arguments)
    small = chosen.smoke or chosen.toy
    if small:  # its time is that of compiling
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    output = chosen.output or (
        RESULTS.with_stem("speculative_exact_toy") if small else RESULTS
    )
    subject = toy() if small else real(chosen.data, chosen.rows, length=LENGTH)
    chosen.layers = chosen.layers or (1 if small else 25)
    setting = {"data": bool(chosen.data), "rows": chosen.rows, "toy": small}
    setting |= {} if chosen.plain or small else {"matrices": "packed"}
    setting |= {"layers": chosen.layers, "new": subject.new, "length": subject.length}
    shared = Report(output, setting)
    found = shared.found
    trial = Trial(subject, chosen, found)
    every = cases(chosen.parts, list(trial.targets), list(trial.sources))
    if chosen.smoke:
        every = [Case(PLAIN, "tree of heads", 8, True), Case("ensemble", FREE, 8, True)]
        every += [Case(AWARE, "expanded tree", 8, True)]
        every += [Case("all of these", EARLY, 8, True)]
    missing = [case for case in every if case.key not in found["cases"]]
    total = sum(case.batches(subject) for case in missing)
    with progress("batches", total) as advance:
        for case in missing:
            if shared.claim(case.key):
                shared.add(case.key, trial.run(case, advance))
            else:
                for _ in range(case.batches(subject)):
                    advance()
    shared.read()
    show(found)
    gaps = [gap for report in found["cases"].values() for gap in report["apart"]]
    return int(any(not gap["tie"] for gap in gaps))


if __name__ == "__main__":
    sys.exit(main())
