"""Speculative greedy decoding beside assisted generation of transformers, in one run.

Claim: on the same model, prompts and drafts, in float32, ours is at least 1.5x faster
than transformers' assisted generation (prompt lookup, and a draft model); a batch of 8
runs, which transformers refuses; the time of a round does not follow the capacity of
the cache; and prompts of one width share a program.
Command: python experiments/bench_speculative.py [--smoke] [--model NAME] [--data DIR]
[--rows N] [--repeats R] [--layers E] [--ways NAME ...] [--output FILE] [--fresh]
[--plain]; a run that was stopped is taken up again. Needs the extra `parity`; without
torch ours is measured alone. Matrices are packed (`collab_jax.models.packed`), with
`--plain` they are not.
Data: as for speculative_speed.py.
Hardware: two idle CPU cores, 6 GiB; 20 minutes with `--rows 1 --repeats 1` (`--smoke`:
seconds, ours alone, a random toy model).
Expected: seen in November 2026 on two CPU cores, 6 prompts, one repeat, texts equal:
over transformers 2.7x for greedy, 3.2x for prompt lookup, 3.4x for a draft model;
adaptive n-grams 4.1x and suffixes 3.9x its prompt lookup. Over our own plain decoding
adaptive n-grams 1.28x, suffixes 1.19x, prompt lookup 1.05x; the draft model loses
(0.4x). A batch of 8 runs, with n-gram drafts of 10 tokens slower than one by one
(0.8x). A round at 8,192 slots takes 3 percent more than at 512. Gemma-3-270M, a base
model whose text soon repeats itself (`--model gemma-3-270m --rows 1 --repeats 1 --ways
first greedy prompt adaptive suffix`): prompt lookup writes summaries and rag answers
3.3x as fast as plain decoding, 5.1x without the prompt, and 3.5x as fast as that of
transformers; adaptive n-grams 3.8x and 6.6x; over all six groups 2.2x and 2.4x. In a
batch of 8, 88 rows of a call lose (0.7x).

The draft model is the first E layers of the model itself, with its norm and head. Who
comes first alternates from prompt to prompt. Ours reads 1, 4 or all tokens of a round,
whichever holds the draft; transformers reads what it drafted. Seconds are those of the
whole call, with the prompt read; programs are compiled before. A ratio is that of the
sums; "decoding" is the one without what a first token takes, which is the prompt. Of a
base model prompts are what they are, without a chat template.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from measuring.atomic import write_json
from measuring.options import options
from speculating import same
from speculating.peer import torch_greedy, torched
from speculating.ratios import FIRST, PLAIN, by_group, show, table
from speculating.strategies import DRAFTED, cut
from speculating.subject import NAME, Subject, real, texts, toy

from collab_jax import decode
from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import adaptive, exact, ngram, suffix
from collab_jax.cooperate.efficient.draft_model import draft_lm
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.io import load
from collab_jax.lm import language_model
from collab_jax.models import transformer

RESULTS = Path(__file__).parent / "results" / "bench_speculative.json"
PACKAGES = "collab-jax", "jax", "jaxlib", "numpy", "torch", "transformers"
WIDTHS = 1, 4  # tokens of a round, beside the widest
CAPACITIES = 512, 8192  # tokens
ROUNDS = 32

# what a way says of prompts: new tokens, seconds, and calls of the target
Run = Callable[[Sequence[Sequence[int]]], tuple[list[list[int]], float, list[int]]]


class Way(NamedTuple):
    """One way to decode, ours and the peer's."""

    ours: Run
    peer: Run | None


def timed(program: Callable, params: Any, subject: Subject) -> Run:
    """Our program as a function of prompts; see `Run`."""

    def run(prompts):
        longest = max(map(len, prompts))
        width = min(w for w in subject.widths if w >= longest)
        prompt, length = decode.pad(prompts, width)
        begin = time.perf_counter()
        result = program(None, params, prompt, length, jax.random.key(0))
        jax.block_until_ready(result.tokens)
        seconds = time.perf_counter() - begin
        calls = result.info.calls[: len(prompts)].tolist()
        return texts(result, len(prompts)), seconds, calls

    return run


def ways(subject: Subject, layers: int, peers: bool) -> tuple[dict[str, Way], dict]:
    """Everything that is compared, by name, and our programs."""
    model, params = subject.lm, subject.params
    config, small = cut(subject, layers)
    draft = draft_lm(
        language_model(transformer.transformer(config)), DRAFTED, greedy=True
    )
    ends = {"eos": subject.eos}

    def with_draft(proposer):
        return speculate(
            on_lm(model, widths=WIDTHS),
            proposer,
            subject.new,
            verifier=exact.greedy(),
            **ends,
        )

    size = subject.length
    decoders = {
        FIRST: (decode.greedy(model, 1, **ends), params),
        PLAIN: (decode.greedy(model, subject.new, **ends), params),
        "prompt lookup": (with_draft(ngram.prompt_lookup(size)), (params, ())),
        "adaptive n-gram": (with_draft(adaptive.adaptive(size)), (params, ())),
        "suffix": (with_draft(suffix.suffix(size)), (params, ())),
        "draft model": (with_draft(draft), (params, small)),
    }
    programs = {
        name: decode.compile(lambda _, decoder=decoder: decoder)
        for name, (decoder, _) in decoders.items()
    }
    theirs = peer(subject, config, small) if peers else {}
    # these have no counterpart: they meet the peer's prompt lookup
    for name in ("adaptive n-gram", "suffix"):
        theirs[name] = theirs.get("prompt lookup")
    found = {}
    for name, (_, own) in decoders.items():
        ours = timed(programs[name], own, subject)
        found[name] = Way(ours, theirs.get(name))
    return found, programs


def peer(subject: Subject, config: Any, small: Any) -> dict[str, Run]:
    """transformers on the same parameters."""
    whole = load.load(subject.name)
    big = torched(whole)
    assistant = torched(whole._replace(params=small, config=config))
    assistant.generation_config.num_assistant_tokens = DRAFTED
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0

    ways: dict[str, dict[str, Any]] = {
        FIRST: {"max_new_tokens": 1},
        PLAIN: {},
        "prompt lookup": {"prompt_lookup_num_tokens": subject.length},
        "draft model": {"assistant_model": assistant},
    }
    return {
        name: torch_greedy(big, subject, lambda options=options: options)
        for name, options in ways.items()
    }


def compare(
    subject: Subject,
    every: dict[str, Way],
    repeats: int,
    found: list[dict],
    save: Callable[[], None],
) -> None:
    """Times what is missing of every way on every prompt, one at a time.

    Every program and every way of the peer runs once before, untimed.
    """
    prompts = [
        (g, n) for g, found in subject.prompts.items() for n in range(len(found))
    ]
    margin = same.margins(subject.lm, subject.params)
    known = {
        (line["way"], line["repeat"], line["group"], line["row"]) for line in found
    }
    turn = 0
    with progress("prompts", len(prompts) * len(every) * repeats) as advance:
        for name, way in every.items():
            seen: set[int] = set()
            for repeat in range(repeats):
                for group, number in prompts:
                    turn += 1
                    if (name, repeat, group, number) in known:
                        advance()
                        continue
                    prompt = subject.prompts[group][number]
                    width = min(w for w in subject.widths if w >= len(prompt))
                    if way.peer is not None and not seen:
                        way.peer([prompt])
                    if width not in seen:
                        way.ours([prompt])
                        seen.add(width)
                    kinds = [k for k in ("ours", "peer") if getattr(way, k)]
                    kinds = kinds[::-1] if turn % 2 else kinds
                    line: dict[str, Any] = {"way": name, "repeat": repeat}
                    line |= {"group": group, "row": number}
                    new = {}
                    for kind in kinds:
                        (text,), seconds, (calls,) = getattr(way, kind)([prompt])
                        new[kind] = text
                        line[kind] = {"seconds": seconds, "tokens": len(text)}
                        line[kind]["calls"] = calls
                    if len(new) == 2:
                        line["apart"] = same.differences(
                            [number], [prompt], [new["ours"]], [new["peer"]], margin
                        )
                    found.append(line)
                    save()
                    advance()


def in_a_batch(
    subject: Subject,
    every: dict[str, Way],
    lines: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Eight rows at once: ours beside ours one by one, and what the peer says."""
    prompts = [p for group in subject.prompts.values() for p in group]
    prompts = (prompts * 8)[:8]
    for name, way in every.items():
        if name in lines or name == FIRST:
            continue
        widths = {min(w for w in subject.widths if w >= len(p)): p for p in prompts}
        for some in (prompts, *([prompt] for prompt in widths.values())):
            way.ours(some)  # compiled before
        together, seconds, _ = way.ours(prompts)
        alone = [way.ours([prompt]) for prompt in prompts]
        line = {
            "tokens": sum(map(len, together)),
            "seconds": seconds,
            "one by one": sum(own for _, own, _ in alone),
            "equal rows": sum(
                one == other[0]
                for one, (other, *_) in zip(together, alone, strict=True)
            ),
        }
        if way.peer is not None and name != PLAIN:
            try:
                way.peer([prompts[0]] * 2)
                line["peer"] = "ran"
            except ValueError as error:
                line["peer"] = str(error).splitlines()[0]
        lines[name] = line
        save()


def rounds(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of the loop at two capacities, alternating."""
    model, params = subject.lm, subject.params
    prompt, length = decode.pad([next(iter(subject.prompts.values()))[0]])
    steps = {}
    for capacity in CAPACITIES:
        decoder = speculate(
            on_lm(model, widths=WIDTHS),
            ngram.ngram(subject.length),
            capacity - prompt.shape[1],
        )

        @jax.jit
        def run(params, state, decoder=decoder):
            return jax.lax.fori_loop(
                0, ROUNDS, lambda _, state: decoder.step((params, ()), state), state
            )

        start = jax.jit(decoder.init)((params, ()), prompt, length, jax.random.key(0))
        jax.block_until_ready(run(params, start))
        steps[capacity] = run, start
    lines = []
    for number in range(repeats):
        for capacity, (run, start) in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(params, start))
            seconds = (time.perf_counter() - begin) / ROUNDS
            lines.append({"repeat": number, "capacity": capacity, "seconds": seconds})
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measures; 0 where the texts are the peer's, up to ties."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1, help="prompts of a group")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default=NAME, help="what `load` takes")
    parser.add_argument(
        "--layers", type=int, help="of the draft model; five of six unless given"
    )
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="by first words")
    parser.add_argument("--fresh", action="store_true", help="forget what FILE holds")
    parser.add_argument("--plain", action="store_true", help="no packed matrices")
    chosen = parser.parse_args(arguments)
    own = "" if chosen.model == NAME else f"_{chosen.model.rpartition('/')[2]}"
    written = RESULTS.with_stem(RESULTS.stem + own)
    output = chosen.output or (Path("smoke.json") if chosen.smoke else written)
    held = None if chosen.plain or chosen.smoke else "packed"
    if chosen.smoke:
        subject, chosen.repeats = toy(), 1
    else:
        subject = real(chosen.data, chosen.rows, matrices=held, name=chosen.model)
    if chosen.layers is None:
        chosen.layers = subject.config.layers * 5 // 6
    if not 0 < chosen.layers <= subject.config.layers:
        parser.error(f"--layers {chosen.layers}: 1 to {subject.config.layers} expected")
    peers = not chosen.smoke and importlib.util.find_spec("torch") is not None
    every, programs = ways(subject, chosen.layers, peers)
    known = list(every)
    if chosen.ways:
        every = {k: w for k, w in every.items() if k.startswith(tuple(chosen.ways))}
    if not every:
        parser.error(f"no way begins so; there are {known}")
    present = [name for name in PACKAGES if importlib.util.find_spec(_module(name))]
    found: dict[str, Any] = {
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in present},
        "setting": {"new": subject.new, "length": subject.length, "smoke": chosen.smoke}
        | {"draft model": [chosen.layers, DRAFTED], "data": bool(chosen.data)}
        | {"model": subject.name}
        | ({"matrices": held} if held else {}),
        "runs": [],
        "batch": {},
    }
    if output.exists() and not chosen.fresh:
        before = json.loads(output.read_text("utf-8"))
        found = before if before["setting"] == found["setting"] else found

    def save() -> None:
        write_json(output, found)

    compare(subject, every, chosen.repeats, found["runs"], save)
    widths = {
        min(w for w in subject.widths if w >= len(p))
        for group in subject.prompts.values()
        for p in group
    }
    found["programs"] = {
        name: f"{program._cache_size()} for {len(widths)}"
        for name, program in programs.items()
        if name in every
    }
    in_a_batch(subject, every, found["batch"], save)
    found["rounds"] = rounds(subject, 3)
    found["table"], found["groups"] = table(found), by_group(found)
    write_json(output, found)
    show(found)
    return int(any(line["apart"] > line["ties"] for line in found["table"]))


def _module(package: str) -> str:
    return package.replace("-", "_")


if __name__ == "__main__":
    sys.exit(main())
