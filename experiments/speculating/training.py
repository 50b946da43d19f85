"""Training on what a model writes, and what its drafts are worth before and after."""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from measuring.atomic import write_json
from speculating import same
from speculating.subject import Subject, count, real, texts, toy

from collab_jax import decode, finetune
from collab_jax.commands.progress import progress
from collab_jax.cooperate.efficient import exact
from collab_jax.cooperate.efficient.draft import Proposer
from collab_jax.cooperate.efficient.speculate import speculate
from collab_jax.cooperate.efficient.target import on_lm
from collab_jax.io import hub
from collab_jax.io.checkpoint import load_checkpoint, save_checkpoint
from collab_jax.packing import Batch, rows

ROWS = 8  # of a batch while text is written
BATCH = 4  # rows of a step of training
PROMPT = 96  # tokens of a prompt that are trained with, its last ones


def opened(
    parser: argparse.ArgumentParser, chosen: argparse.Namespace, output: Path
) -> tuple[Subject, Path]:
    """The model with its prompts, and the folder of what was written or trained."""
    if chosen.smoke:
        subject, cache = toy(), output.parent / "trained"
    else:
        subject = real(chosen.data, chosen.rows)
        cache = hub.cache() / "experiments" / "train_drafters"
    if not any(subject.more.values()):
        parser.error(
            f"--rows {chosen.rows} leaves no prompt to train on; fewer rows, or --data "
            "with Spec-Bench are expected"
        )
    cache.mkdir(parents=True, exist_ok=True)
    return subject, cache


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


def data_of(
    subject: Subject, pairs: Sequence[tuple[list[int], list[int]]], least: int = 1
) -> Batch:
    """Rows of a prompt's end and its continuation of some tokens; only that counts."""
    both = [(prompt[-PROMPT:], new) for prompt, new in pairs]
    both = [(prompt, new) for prompt, new in both if len(new) > least]
    return rows(
        [[*prompt, *new] for prompt, new in both],
        PROMPT + subject.new,
        [[0.0] * len(prompt) + [1.0] * len(new) for prompt, new in both],
    )


def train(
    name: str,
    tuner: finetune.Finetuner,
    start: Any,
    base: Any,
    data: Batch,
    setting: Sequence[Any],
    epochs: int,
    cache: Path,
) -> Trained:
    """Trains, or finds what was trained on the same data with the same setting."""
    said = [name, epochs, *setting, [leaf.tolist() for leaf in data]]
    path = cache / f"{name}-{_digest(said)}"
    notes = path.with_suffix(".json")
    if not notes.exists():
        print(name, flush=True)
        began = time.perf_counter()
        after, history = finetune.fit(
            tuner, start, data, base=base, batch_size=BATCH, epochs=epochs
        )
        seconds = round(time.perf_counter() - began, 1)
        save_checkpoint(path, after)
        few = max(1, len(history) // 10)
        loss = [float(np.mean(part)) for part in (history[:few], history[-few:])]
        write_json(
            notes, {"seconds": seconds, "steps": len(history), "first and last": loss}
        )
    return Trained(start, load_checkpoint(path, start), json.loads(notes.read_text()))


def optimizer(rate: float, data: Batch, epochs: int) -> optax.GradientTransformation:
    """Adam with weight decay, clipped; the rate rises over a tenth and falls again."""
    steps = epochs * -(-len(data.tokens) // BATCH)
    rates = optax.warmup_cosine_decay_schedule(
        0, rate, max(1, steps // 10), max(2, steps)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, b2=0.95))


def measured(
    subject: Subject, proposer: Proposer, own: Any, plain: dict[str, list[str]]
) -> dict[str, Any]:
    """Tokens a call on the prompts that are measured, and whether the text is plain.

    Args:
      subject: the target.
      proposer: what drafts.
      own: its parameters.
      plain: greedy texts by batch; what is missing is added.
    """
    ends = {"eos": subject.eos}
    decoder = speculate(
        on_lm(subject.lm), proposer, subject.new, verifier=exact.greedy(), **ends
    )
    program = decode.compile(lambda _: decoder)
    greedy = decode.compile(lambda _: decode.greedy(subject.lm, subject.new, **ends))
    margin = same.margins(subject.lm, subject.params)
    report: dict[str, Any] = {"tokens": 0, "calls": 0, "apart": [], "groups": {}}
    tried, taken, drafted = 0, 0, 0
    for some in subject.batches(ROWS):
        prompt, length = subject.padded(subject.of(some), ROWS)
        key, place = jax.random.key(0), same.name_of(some)
        if place not in plain:
            result = greedy(None, subject.params, prompt, length, key)
            plain[place] = same.packed(texts(result, len(some)))
        result = program(None, (subject.params, own), prompt, length, key)
        got = texts(result, len(some))
        count(report["groups"], some, got, result.info.calls)
        expected = same.unpacked(plain[place])
        report["apart"] += same.differences(
            some, subject.of(some), got, expected, margin
        )
        drafted += int(np.asarray(result.info.drafted)[: len(some)].sum())
        tried = tried + np.asarray(result.info.tried)[: len(some)].sum(0)
        taken = taken + np.asarray(result.info.taken)[: len(some)].sum(0)
    every = zip(*report["groups"].values(), strict=True)
    report["tokens"], report["calls"] = map(sum, every)
    report["drafted"] = drafted
    report["acceptance"] = (taken / np.maximum(tried, 1)).round(3).tolist()
    return report


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
