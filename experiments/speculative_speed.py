"""Tokens per call of the model, for every way to draft, on the prompts of Spec-Bench.

Claim: greedy text of SmolLM2-135M-Instruct with any draft is that of plain greedy
decoding, up to ties that are shown (the two best candidates within 1e-4), in batches of
8 rows that accept unequal numbers; adaptive n-grams and suffixes need no more calls
than the prompt lookup of transformers at the same draft length. From the acceptance by
position the theory foretells the tokens per call that were counted.
Command: python experiments/speculative_speed.py [--smoke] [--data DIR] [--output FILE]
[--proposers NAME ...] [--rows N] [--plain]; a run that was stopped is taken up again.
Matrices are packed (`collab_jax.models.packed`), with `--plain` they are not. Prompt
lookup of transformers is counted too where torch is (the extra `parity`), in batches of
one.
Data: DIR or $COLLAB_JAX_DATA holds spec_bench/question.jsonl of
https://github.com/hemingkx/Spec-Bench (data/spec_bench). Without it, a few prompts
of this file are used.
Hardware: two CPU cores, 6 GiB; 24 prompts (`--rows 4`) took most of an hour beside
other work (`--smoke`: seconds, a random toy model).
Expected: (November 2026, 24 prompts, drafts of ten) all texts equal; tokens a call:
prompt lookup 1.74, by our count and in every group by that of transformers, latest
n-gram 1.80, adaptive n-grams and suffixes 1.82, lookahead 1.83, recycling 1.64 as a
chain and 2.10 as a tree. Translation repeats itself most (2.9 with n-grams), mt-bench
least (1.2). Theory foretells 1.1 to 4.4 percent more than was counted.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measuring.atomic import write_json
from measuring.options import options
from measuring.picture import picture
from speculating import same
from speculating.peer import torch_greedy, torched
from speculating.subject import Subject, real, texts, toy

from collab_jax import decode
from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import (
    adaptive,
    exact,
    lookahead,
    ngram,
    recycle,
    suffix,
    theory,
    topology,
)
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.io.load import load

RESULTS = Path(__file__).parent / "results" / "speculative_speed.json"
ROWS = 8  # of a batch
FEW = 20  # rounds that tried a position: of fewer no share is drawn
PEER = "prompt lookup of transformers itself"


def proposers(subject: Subject) -> dict[str, Callable[[], Proposer]]:
    """What drafts, by name: chains of at most K tokens, trees of a few times that."""
    size, vocab = subject.length, subject.vocab
    return {
        "prompt lookup": lambda: ngram.prompt_lookup(size),
        "n-gram, longest and latest": lambda: ngram.ngram(size),
        "adaptive n-gram (ANPD)": lambda: adaptive.adaptive(size),
        "suffix": lambda: suffix.suffix(size),
        "token recycling, chain": lambda: recycle.recycle(size, vocab),
        "token recycling, tree": lambda: recycle.recycle_tree(
            topology.grow(4 * size), vocab
        ),
        "lookahead": lambda: lookahead.lookahead(vocab),
    }


def measure(
    subject: Subject, chosen: Sequence[str], found: dict, save: Callable
) -> None:
    """Decodes what is missing, plain text first."""
    model, ends = subject.lm, {"eos": subject.eos}
    plain = decode.compile(lambda _: decode.greedy(model, subject.new, **ends))
    margin = same.margins(model, subject.params)
    every, work = proposers(subject), subject.batches(ROWS)
    with progress("batches", len(work) * (1 + len(chosen))) as advance:
        for rows in work:
            key = same.name_of(rows)
            if key not in found["plain"]:
                prompt, length = subject.padded(subject.of(rows), ROWS)
                result = plain(None, subject.params, prompt, length, jax.random.key(0))
                found["plain"][key] = same.packed(texts(result, len(rows)))
                save()
            advance()
        for draft in chosen:
            own = found["drafted"].setdefault(draft, {})
            decoder = speculate(
                on_lm(model),
                every[draft](),
                subject.new,
                verifier=exact.greedy(),
                **ends,
            )
            program = decode.compile(lambda _, decoder=decoder: decoder)
            for rows in work:
                key = same.name_of(rows)
                if key not in own:
                    prompt, length = subject.padded(subject.of(rows), ROWS)
                    params = subject.params, ()
                    result = program(None, params, prompt, length, jax.random.key(0))
                    own[key] = batch_report(
                        subject,
                        margin,
                        result,
                        rows,
                        same.unpacked(found["plain"][key]),
                    )
                    save()
                advance()


def ask_peer(subject: Subject, found: dict, save: Callable) -> None:
    """Prompt lookup of transformers, one prompt at a time, where it is missing."""
    own = found["drafted"].setdefault(PEER, {})
    work = [rows for rows in subject.batches(ROWS) if same.name_of(rows) not in own]
    if not work:
        return
    options = {"prompt_lookup_num_tokens": subject.length}
    generate = torch_greedy(torched(load(subject.name)), subject, lambda: options)
    margin = same.margins(subject.lm, subject.params)
    with progress("batches", len(work)) as advance:
        for rows in work:
            key, prompts = same.name_of(rows), subject.of(rows)
            every = [generate([prompt]) for prompt in prompts]
            new = [text for (text,), _, _ in every]
            expected = same.unpacked(found["plain"][key])
            own[key] = {
                "rows": rows,
                "tokens": [len(text) for text in new],
                "calls": [calls for _, _, (calls,) in every],
                "apart": same.differences(rows, prompts, new, expected, margin),
            }
            save()
            advance()


def batch_report(subject, margin, result, rows, expected) -> dict[str, Any]:
    """What a batch took, and where its text is not the plain one."""
    count = len(rows)
    info = jax.tree.map(lambda x: np.asarray(x)[:count], result.info)
    found = texts(result, count)
    apart = same.differences(rows, subject.of(rows), found, expected, margin)
    return {
        "rows": rows,
        "tokens": [len(text) for text in found],
        "calls": info.calls.tolist(),
        "drafted": info.drafted.tolist(),
        "accepted": info.accepted.tolist(),
        "tried": info.tried.sum(0).tolist(),
        "taken": info.taken.sum(0).tolist(),
        "apart": apart,
    }


def table(found: dict, groups: Sequence[str]) -> list[dict[str, Any]]:
    """One line for each way to draft."""
    lines = []
    for draft, own in found["drafted"].items():
        reports = list(own.values())

        every = [
            (group, tokens, calls)
            for r in reports
            for (group, _), tokens, calls in zip(
                r["rows"], r["tokens"], r["calls"], strict=True
            )
        ]

        def rate(names, every=every):
            chosen = [
                (tokens, calls) for group, tokens, calls in every if group in names
            ]
            tokens, calls = map(sum, zip(*chosen, strict=True)) if chosen else (0, 0)
            return tokens / max(calls, 1)

        line = {
            "draft": draft,
            "tokens per call": {name: round(rate([name]), 3) for name in groups},
            "all": round(rate(groups), 3),
            "rows": sum(len(r["rows"]) for r in reports),
            "apart": [x for r in reports for x in r["apart"]],
        }
        if draft != PEER:  # which does not say what it tried
            tried = np.sum([r["tried"] for r in reports], axis=0)
            taken = np.sum([r["taken"] for r in reports], axis=0)
            calls = sum(sum(r["calls"]) for r in reports)
            rates = taken / np.maximum(tried, 1)
            begun = tried[0] / max(calls, 1)  # rounds with any draft
            reach = theory.expected_tokens(rates, len(rates)) - 1
            line["foretold"] = round(1 + begun * reach, 3)
            line["acceptance"] = [round(float(x), 3) for x in rates]
            line["tried"] = tried.tolist()
        lines.append(line)
    return lines


def show(lines: Sequence[dict[str, Any]], groups: Sequence[str]) -> None:
    """The table."""
    heads = [*groups, "all", "foretold", "equal rows"]
    print(f"\n{'tokens per call':36}" + "".join(f"{head[:14]:>15}" for head in heads))
    for line in lines:
        values = [line["tokens per call"][name] for name in groups]
        values += [line["all"], line.get("foretold", float("nan"))]
        wrong = sum(not x["tie"] for x in line["apart"])
        ties = len(line["apart"]) - wrong
        equal = f"{line['rows'] - wrong} of {line['rows']}"
        equal += f" ({ties} by a tie)" if ties else ""
        print(
            f"{line['draft']:36}" + "".join(f"{v:15.2f}" for v in values), f" {equal}"
        )


def draw(pyplot: Any, lines: Sequence[dict[str, Any]], groups: Sequence[str]) -> Any:
    """Bars by group, and acceptance by position."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    width = 0.8 / max(len(lines), 1)
    for n, line in enumerate(lines):
        places = np.arange(len(groups)) + (n - (len(lines) - 1) / 2) * width
        values = [line["tokens per call"][name] for name in groups]
        left.bar(places, values, width, label=line["draft"])
        rates = zip(line.get("acceptance", []), line.get("tried", []), strict=True)
        shown = [rate if tried >= FEW else np.nan for rate, tried in rates]
        right.plot(range(1, len(shown) + 1), shown, marker="o")
    left.axhline(1, color="black", linewidth=0.8)
    left.set_xticks(range(len(groups)), groups, rotation=20)
    left.set_ylabel("tokens per call of the model")
    right.set_xlabel("position in the draft")
    right.set_ylabel("accepted, if all before it are")
    right.set_ylim(0, 1)
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing; 0 where every row is the plain one, up to ties."""
    parser = options(__doc__)
    parser.add_argument("--proposers", nargs="+", metavar="NAME", help="by first words")
    parser.add_argument("--rows", type=int, default=10, help="prompts of a group")
    parser.add_argument("--plain", action="store_true", help="no packed matrices")
    chosen = parser.parse_args(arguments)
    output = chosen.output or (Path("smoke.json") if chosen.smoke else RESULTS)
    held = None if chosen.plain or chosen.smoke else "packed"
    subject = toy() if chosen.smoke else real(chosen.data, chosen.rows, matrices=held)
    groups = list(subject.prompts)
    setting = {"data": bool(chosen.data), "rows": chosen.rows, "smoke": chosen.smoke}
    setting |= {"new": subject.new, "length": subject.length}
    setting |= {"matrices": held} if held else {}
    found: dict[str, Any] = {"setting": setting, "plain": {}, "drafted": {}}
    if output.exists():
        before = json.loads(output.read_text("utf-8"))
        found = before if before["setting"] == setting else found

    def save() -> None:
        write_json(output, found)

    names = list(proposers(subject))
    if chosen.proposers:
        names = [n for n in names if n.startswith(tuple(chosen.proposers))]
        if not names:
            parser.error(f"no proposer begins so; there are {list(proposers(subject))}")
    measure(subject, names, found, save)
    if not chosen.smoke and importlib.util.find_spec("torch") is not None:
        ask_peer(subject, found, save)
    found["table"] = table(found, groups)
    save()
    show(found["table"], groups)
    picture(output, draw, found["table"], groups)
    return int(any(not x["tie"] for line in found["table"] for x in line["apart"]))


if __name__ == "__main__":
    sys.exit(main())
