"""Tokens per call of the model, for every way to draft, on the prompts of Spec-Bench.

Claim: greedy text of SmolLM2-135M-Instruct with any draft is that of plain greedy
decoding, up to ties that are shown (the two best candidates within 1e-4), in batches of
8 rows that accept unequal numbers; adaptive n-grams and suffixes need no more calls
than the prompt lookup of transformers at the same draft length. From the acceptance by
position the theory foretells the tokens per call that were counted.
Command: python experiments/speculative_speed.py [--smoke] [--data DIR] [--output FILE]
[--proposers NAME ...] [--rows N]; a run that was stopped is taken up again.
Data: DIR or $COLLAB_JAX_DATA holds spec_bench/question.jsonl of
https://github.com/hemingkx/Spec-Bench (data/spec_bench). Without it, a few prompts
of this file are used.
Hardware: two CPU cores, 6 GiB; estimated at an hour for 60 prompts (`--smoke`: seconds,
a random toy model).
Expected: not run whole yet.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from measuring.atomic import write_json

from collab_jax import decode
from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import (
    adaptive,
    exact,
    ngram,
    recycle,
    suffix,
    theory,
)
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.io.load import load
from collab_jax.lm import LM, language_model
from collab_jax.models import config as configs
from collab_jax.models import transformer

RESULTS = Path(__file__).parent / "results" / "speculative_speed.json"
TIE = 1e-4  # two candidates closer than this may come in either order
ROWS = 8  # of a batch
GROUPS = "mt-bench", "translation", "summarization", "qa", "math_reasoning", "rag"
OWN = {  # without the data
    "repeats": ["List the numbers from 1 to 10, twice.", "Say hello ten times."],
    "copies": ["Repeat: the cat sat on the mat, the dog sat on the log."],
    "free": ["Name three rivers.", "Why is the sky blue?"],
}


class Subject(NamedTuple):
    """A model, and prompts by group as tokens."""

    lm: LM
    params: Any
    prompts: dict[str, list[list[int]]]
    eos: tuple[int, ...]
    new: int
    length: int  # tokens of a draft
    widths: tuple[int, ...]  # prompts are padded to one of these, for few programs
    vocab: int


def spec_bench(folder: Path, rows: int) -> dict[str, list[str]]:
    """The first question of so many dialogues of each of the six groups."""
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    path = folder / "spec_bench" / "question.jsonl"
    for line in path.read_text("utf-8").splitlines():
        question = json.loads(line)
        group = groups.get(question["category"], groups["mt-bench"])
        group.append(question["turns"][0])
    # mt-bench has ten questions of each of eight kinds: some of every kind
    spread = groups["mt-bench"]
    groups["mt-bench"] = [spread[i] for i in range(0, len(spread), 8)]
    return {name: texts[:rows] for name, texts in groups.items()}


def real(data: str | None, rows: int) -> Subject:
    """SmolLM2 in its chat template; prompts are cut to 512 tokens from the left."""
    model = load("smollm2-135m-instruct")
    texts = OWN if data is None else spec_bench(Path(data), rows)
    prompts = {}
    for name, group in texts.items():
        prompts[name] = [
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )[-512:]
            for text in group
        ]
    eos = tuple(model.config.eos)
    widths = 129, 257, 513
    vocab = model.config.vocab
    return Subject(model.lm, model.params, prompts, eos, 128, 10, widths, vocab)


def toy() -> Subject:
    """A random Llama; bytes are its tokens."""
    raw = {"model_type": "llama", "vocab_size": 257, "hidden_size": 32}
    raw |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = configs.from_hf(raw)
    model = language_model(transformer.transformer(config))
    params = transformer.init(jax.random.key(0), config)
    prompts = {k: [list(text.encode()) for text in v] for k, v in OWN.items()}
    return Subject(model, params, prompts, (), 24, 4, (65,), config.vocab)


def proposers(subject: Subject) -> dict[str, Callable[[], Proposer]]:
    """What drafts, by name; all with drafts of at most K tokens."""
    size, vocab = subject.length, subject.vocab
    return {
        "prompt lookup (transformers)": lambda: ngram.prompt_lookup(size),
        "n-gram, longest and latest": lambda: ngram.ngram(size),
        "adaptive n-gram (ANPD)": lambda: adaptive.adaptive(size),
        "suffix": lambda: suffix.suffix(size),
        "token recycling, chain": lambda: recycle.recycle(size, vocab),
    }


def batches(subject: Subject) -> list[tuple[str, list[int]]]:
    """Rows of one group at a time, at most `ROWS` together."""
    found = []
    for name, prompts in subject.prompts.items():
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), ROWS):
            found.append((name, order[start : start + ROWS]))
    return found


def padded(subject: Subject, name: str, rows: Sequence[int]):
    """The prompts of a batch; rows that are missing repeat the first."""
    prompts = [subject.prompts[name][row] for row in rows]
    prompts += prompts[:1] * (ROWS - len(prompts))
    longest = max(map(len, prompts))
    return decode.pad(prompts, min(w for w in subject.widths if w >= longest))


def texts(result: decode.Sequences, count: int) -> list[list[int]]:
    """The new tokens of the first rows."""
    tokens, begin, end = (
        np.asarray(x) for x in (result.tokens, result.prompt_length, result.length)
    )
    return [tokens[b, begin[b] : end[b]].tolist() for b in range(count)]


def part(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first step at which two rows differ."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other))
    )


def margin(
    subject: Subject, read: Callable, prompt: list[int], new: list[int]
) -> float:
    """How far the two best candidates lie apart behind these new tokens."""
    ids = np.array([prompt + new])
    width = min(w for w in (*subject.widths, 1024) if w >= ids.shape[1])
    tokens = np.pad(ids, ((0, 0), (0, width - ids.shape[1])))
    best = np.sort(np.asarray(read(subject.params, tokens, ids.shape[1] - 1)))[-2:]
    return float(best[1] - best[0])


def measure(
    subject: Subject, chosen: Sequence[str], found: dict, save: Callable
) -> None:
    """Decodes what is missing, plain text first."""
    model, ends = subject.lm, {"eos": subject.eos}
    plain = decode.compile(lambda _: decode.greedy(model, subject.new, **ends))

    @jax.jit
    def read(params, tokens, last):
        state = model.init(params, 1, tokens.shape[1])
        out, _ = model.extend(params, state, tokens)
        return out.logits[0, last]

    every, work = proposers(subject), batches(subject)
    with progress("batches", len(work) * (1 + len(chosen))) as advance:
        for name, rows in work:
            key = f"{name} {rows[0]}"
            if key not in found["plain"]:
                prompt, length = padded(subject, name, rows)
                result = plain(None, subject.params, prompt, length, jax.random.key(0))
                found["plain"][key] = texts(result, len(rows))
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
            for name, rows in work:
                key = f"{name} {rows[0]}"
                if key not in own:
                    prompt, length = padded(subject, name, rows)
                    params = subject.params, ()
                    result = program(None, params, prompt, length, jax.random.key(0))
                    own[key] = batch_report(
                        subject, read, result, name, rows, found["plain"][key]
                    )
                    save()
                advance()


def batch_report(subject, read, result, name, rows, expected) -> dict[str, Any]:
    """What a batch took, and where its text is not the plain one."""
    count = len(rows)
    info = jax.tree.map(lambda x: np.asarray(x)[:count], result.info)
    apart = []
    for row, one, other in zip(rows, texts(result, count), expected, strict=True):
        step = part(one, other)
        if step is not None:
            prompt = subject.prompts[name][row]
            gap = margin(subject, read, prompt, other[:step])
            apart.append({"row": row, "step": step, "margin": gap, "tie": gap < TIE})
    return {
        "group": name,
        "rows": rows,
        "tokens": [len(text) for text in texts(result, count)],
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

        def rate(names, reports=reports):
            chosen = [r for r in reports if r["group"] in names]
            calls = sum(sum(r["calls"]) for r in chosen)
            return sum(sum(r["tokens"]) for r in chosen) / max(calls, 1)

        tried = np.sum([r["tried"] for r in reports], axis=0)
        taken = np.sum([r["taken"] for r in reports], axis=0)
        calls = sum(sum(r["calls"]) for r in reports)
        rates = taken / np.maximum(tried, 1)
        begun = tried[0] / max(calls, 1)  # rounds with any draft
        reach = theory.expected_tokens(rates, len(rates)) - 1
        lines.append(
            {
                "draft": draft,
                "tokens per call": {name: round(rate([name]), 3) for name in groups},
                "all": round(rate(groups), 3),
                "foretold": round(1 + begun * reach, 3),
                "acceptance": [round(float(x), 3) for x in rates],
                "rows": sum(len(r["rows"]) for r in reports),
                "apart": [x for r in reports for x in r["apart"]],
            }
        )
    return lines


def show(lines: Sequence[dict[str, Any]], groups: Sequence[str]) -> None:
    """The table."""
    heads = [*groups, "all", "foretold", "equal rows"]
    print(f"\n{'tokens per call':30}" + "".join(f"{head[:14]:>15}" for head in heads))
    for line in lines:
        values = [line["tokens per call"][name] for name in groups]
        values += [line["all"], line["foretold"]]
        wrong = sum(not x["tie"] for x in line["apart"])
        ties = len(line["apart"]) - wrong
        equal = f"{line['rows'] - wrong} of {line['rows']}"
        equal += f" ({ties} by a tie)" if ties else ""
        print(
            f"{line['draft']:30}" + "".join(f"{v:15.2f}" for v in values), f" {equal}"
        )


def plot(lines: Sequence[dict[str, Any]], groups: Sequence[str], path: Path) -> None:
    """Bars by group, and acceptance by position; not without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    width = 0.8 / max(len(lines), 1)
    for n, line in enumerate(lines):
        places = np.arange(len(groups)) + (n - (len(lines) - 1) / 2) * width
        values = [line["tokens per call"][name] for name in groups]
        left.bar(places, values, width, label=line["draft"])
        rates = line["acceptance"]
        right.plot(range(1, len(rates) + 1), rates, marker="o", label=line["draft"])
    left.axhline(1, color="black", linewidth=0.8)
    left.set_xticks(range(len(groups)), groups, rotation=20)
    left.set_ylabel("tokens per call of the model")
    left.legend(fontsize=8)
    right.set_xlabel("position in the draft")
    right.set_ylabel("accepted, if all before it are")
    right.set_ylim(0, 1)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measures what is missing; 0 where every row is the plain one, up to ties."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a random toy model")
    parser.add_argument("--data", default=os.environ.get("COLLAB_JAX_DATA"))
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--proposers", nargs="+", metavar="NAME", help="by first words")
    parser.add_argument("--rows", type=int, default=10, help="prompts of a group")
    chosen = parser.parse_args(arguments)
    output = chosen.output or (Path("smoke.json") if chosen.smoke else RESULTS)
    subject = toy() if chosen.smoke else real(chosen.data, chosen.rows)
    groups = list(subject.prompts)
    setting = {"data": bool(chosen.data), "rows": chosen.rows, "smoke": chosen.smoke}
    setting |= {"new": subject.new, "length": subject.length}
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
    found["table"] = table(found, groups)
    save()
    show(found["table"], groups)
    plot(found["table"], groups, output.with_suffix(".png"))
    return int(any(not x["tie"] for line in found["table"] for x in line["apart"]))


if __name__ == "__main__":
    sys.exit(main())
