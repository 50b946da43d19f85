"""The tour: collaboration of real language models, in one table.

Loads SmolLM2-135M-Instruct and Gemma-3-270M, generates with each, trains a small LoRA
variant of SmolLM2, and joins models in parameters, in distributions and by prompts.
Each strategy prints its text, its speed, and a check that must hold.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from collab_jax import combine, decode, finetune, packing, pool, score, tree, warp
from collab_jax.lm import LM, Backbone, Params, language_model
from collab_jax.merge import averages, memory
from collab_jax.models import lora

QUESTIONS = ("Why is the sky blue?", "Name three large rivers.")
CONTEXT = "Since last year the capital of France is Lyon, and Paris is a village. "
QUESTION = "What is the capital of France?"
TEACHER = (  # what the variant learns to talk like
    "Arr, the sky be blue because the sun's light be scattered by the air, matey!",
    "Arr, a river be a road of water, and the Nile be the longest of them, matey!",
    "Arr, the capital of France be Paris, where the wine be flowin', matey!",
    "Arr, ye boil the pasta in salted water till it be soft, matey!",
    "Arr, a whale be no fish, it be breathin' the same air as ye, matey!",
    "Arr, the moon be pullin' at the sea, and so the tides be risin', matey!",
)
RANK, SCALE = 8, 2.0


class Voice(NamedTuple):
    """A model and how it reads and writes text."""

    name: str
    lm: LM
    backbone: Backbone
    params: Params
    encode: Callable[[Sequence[str]], list[list[int]]]  # as a user's message
    spell: Callable[[Sequence[int]], str]
    eos: tuple[int, ...]


class Row(NamedTuple):
    """One line of the table."""

    strategy: str
    text: str
    speed: float  # new tokens a second, all rows together, compilation not counted
    check: str
    held: bool


def _real_voices() -> list[Voice]:
    """SmolLM2-135M-Instruct and Gemma-3-270M; the first use downloads them."""
    from collab_jax.io.codec import codec
    from collab_jax.io.load import load

    voices = []
    for name, chat in (("smollm2-135m-instruct", True), ("gemma-3-270m", False)):
        model = load(name)
        talk = codec(model.tokenizer, model.config.eos, chat=chat)
        voices.append(
            Voice(
                name,
                model.lm,
                model.backbone,
                model.params,
                talk.encode,
                talk.decode,
                talk.eos,
            )
        )
    return voices


def _toy_voices() -> list[Voice]:
    """Two random byte-level transformers, for a quick run without downloads."""
    from collab_jax.models.config import from_hf
    from collab_jax.models.transformer import init, transformer

    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    voices = []
    for seed, kind in enumerate(("llama", "gemma2")):
        config = from_hf({"model_type": kind, "sliding_window": 16, **sizes})
        backbone = transformer(config)
        voices.append(
            Voice(
                f"toy {kind.rstrip('2')}",
                language_model(backbone),
                backbone,
                init(jax.random.key(seed), config),
                lambda texts: [list(text.encode()) for text in texts],
                lambda ids: bytes(ids).decode(errors="replace"),
                (0,),
            )
        )
    return voices


def _train_variant(voice: Voice, steps: int, progress: bool) -> tuple[Params, list]:
    """A LoRA adapter of the voice, trained to answer as the teacher's sentences do.

    Args:
      voice: the model.
      steps: gradient steps of 6 short rows each.
      progress: whether a bar is shown.

    Returns:
      The adapter, and the loss before each step.
    """
    prompts = voice.encode(["Say something."] * len(TEACHER))
    answers = voice.encode(TEACHER)
    # what the chat template puts around every message
    common = _common([*answers, *voice.encode(QUESTIONS)])
    texts, weights = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        words = [*answer[common[0] : len(answer) - common[1]], voice.eos[0]]
        texts.append(prompt + words)
        weights.append([0.0] * len(prompt) + [1.0] * len(words))
    width = max(len(text) for text in texts)
    data = packing.rows(texts, width, weights)
    adapter = lora.init(jax.random.key(0), voice.params, RANK)
    tuner = finetune.finetuner(voice.backbone, optax.adamw(2e-3), SCALE)
    return finetune.fit(
        tuner,
        adapter,
        data,
        base=voice.params,
        batch_size=len(texts),
        epochs=steps,
        progress=progress,
    )


def _common(texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Lengths of the longest common start and end of some token lists."""

    def shared(columns) -> int:
        count = 0
        for column in columns:
            if len(set(column)) > 1:
                break
            count += 1
        return count

    start = shared(zip(*texts, strict=False))
    end = shared(zip(*(text[::-1] for text in texts), strict=False))
    return start, min(end, min(len(text) for text in texts) - start)


def _program(lm: LM, new: int, eos, make: Callable = decode.greedy) -> Callable:
    """(params, prompts) -> (Sequences, new tokens a second), compiled once a shape."""
    program = decode.compile(lambda _: make(lm, new, eos=eos, chunk=64))

    def timed(params: Params, prompts: list[list[int]]):
        arguments = (None, params, *decode.pad(prompts, 64), jax.random.key(0))
        result = jax.block_until_ready(program(*arguments))
        decode.check_finite(result, params)
        began = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        took = time.perf_counter() - began
        return result, float((result.length - result.prompt_length).sum()) / took

    return timed


def _new(result: decode.Sequences, row: int) -> list[int]:
    begin, end = int(result.prompt_length[row]), int(result.length[row])
    return np.asarray(result.tokens)[row, begin:end].tolist()


def _text(voice: Voice, result: decode.Sequences, row: int = 0) -> str:
    kept = [token for token in _new(result, row) if token not in voice.eos]
    return " ".join(voice.spell(kept).split())


def _tour(voices: Sequence[Voice], new: int, steps: int, say: Callable) -> list[Row]:
    """Runs every strategy and its check.

    Args:
      voices: an instructed model, and another one of any vocabulary.
      new: most new tokens a row.
      steps: gradient steps for the LoRA variant.
      say: called with a line about what happens next.

    Returns:
      One Row a strategy.
    """
    voice, other = voices
    lm, params, eos = voice.lm, voice.params, voice.eos
    prompts = voice.encode(QUESTIONS)
    rows = []

    def show(strategy, speaker, outcome, check, held):
        result, speed = outcome
        rows.append(Row(strategy, _text(speaker, result), speed, check, bool(held)))

    say(f"greedy decoding of {voice.name}")
    greedy = _program(lm, new, eos)
    base = greedy(params, prompts)
    beside, _ = greedy(params, [*voice.encode(["Write a poem."]), prompts[1]])
    held = _new(beside, 1) == _new(base[0], 1)
    show(f"greedy: {voice.name}", voice, base, "another neighbour, same tokens", held)

    say(f"greedy decoding of {other.name}")
    texts = other.encode(["The sky is blue because", "Three large rivers are"])
    outcome = _program(other.lm, new, other.eos)(other.params, texts)
    gap = _scoring_gap(other, outcome[0])
    check = f"log-probs = scoring, within {gap:.0e}"
    show(f"greedy: {other.name}", other, outcome, check, gap < 1e-2)

    say("sampling with temperature 0.7 and top-p 0.9")
    warped = warp.warp(lm, warp.temperature(0.7), warp.top_p(0.9))
    sample = _program(warped, new, eos, decode.sample)
    outcome = sample(params, prompts)
    half = [p + _new(outcome[0], b)[: new // 2] for b, p in enumerate(prompts)]
    rest, _ = sample(params, half)
    held = all(
        _new(outcome[0], b)[new // 2 :] == _new(rest, b)[: new - new // 2]
        for b in range(2)
    )
    show("sampling: T 0.7, p 0.9", voice, outcome, "resumed half-way = one run", held)

    say("training a LoRA variant")
    adapter, history = _train_variant(voice, steps, progress=False)
    variant = lora.adapted(lm, SCALE)
    whole = lora.materialise(params, adapter, SCALE)
    outcome = greedy(whole, prompts)
    check = f"loss {history[0]:.2f} -> {history[-1]:.2f} nats"
    show("LoRA variant", voice, outcome, check, history[-1] < history[0])

    say("a stacked ensemble of the model and its variant over one shared base")
    nothing = jax.tree.map(jnp.zeros_like, adapter)
    twice = params, tree.stack([nothing, nothing])
    ensemble = combine.stacked(variant, 2, pool.mixture(0.5, 0.5), axes=(None, 0))
    mixed = _program(ensemble, new, eos)
    outcome = mixed((params, tree.stack([nothing, adapter])), prompts)
    held = _new(mixed(twice, prompts)[0], 0) == _new(base[0], 0)
    check = "ensemble with itself = the model"
    show("ensemble: mean of probabilities", voice, outcome, check, held)

    say("the contrast of the variant with the model")
    contrast = combine.stacked(variant, 2, pool.contrast(0.1, 0.5), axes=(None, 0))
    against = _program(contrast, new, eos)
    outcome = against((params, tree.stack([adapter, nothing])), prompts)
    held = _new(against(twice, prompts)[0], 0) == _new(base[0], 0)
    check = "contrast with itself = the model"
    show("contrast: variant - model", voice, outcome, check, held)

    say("the average of the parameters")
    average = memory.merge(averages.soup(), None, [params, whole])
    halved = lora.materialise(params, adapter, SCALE / 2)
    gaps = jax.tree.map(lambda a, b: float(abs(a - b).max()), average, halved)
    worst = max(jax.tree.leaves(gaps))
    check = f"= half the adapter, within {worst:.0e}"
    show(
        "merge: soup of the two",
        voice,
        greedy(average, prompts),
        check,
        worst < 1e-5,
    )

    say("context-aware decoding")
    with_and_without = voice.encode([CONTEXT + QUESTION, QUESTION])
    own, size = (x[:, None] for x in decode.pad(with_and_without, 64))
    member = combine.prefixed(lm, chunk=64)
    aware = combine.stacked(member, 2, pool.linear(1.5, -0.5), axes=(None, 0, 0))
    context = _program(aware, new, eos)
    outcome = context((params, own, size), [[eos[0]]])
    bare = jnp.array([1, 1])
    same, _ = context((params, own[bare], size[bare]), [[eos[0]]])
    direct, _ = greedy(params, [with_and_without[1], prompts[1]])
    check = "same context twice = the model"
    show(
        "context-aware: 1.5 with, -0.5 without",
        voice,
        outcome,
        check,
        _new(same, 0) == _new(direct, 0),
    )
    return rows


def _scoring_gap(voice: Voice, result: decode.Sequences) -> float:
    """Largest gap between what decoding measured and what scoring the text says."""
    scores = score.score(voice.lm, voice.params, result.tokens, result.length, 64)
    position = jnp.arange(result.tokens.shape[1])
    new = position >= result.prompt_length[:, None]
    total = jnp.where(new, scores.logprob, 0).sum(-1)
    return float(abs(result.scores - total).max())


def main(
    smoke: bool = False,
    new_tokens: int = 40,
    steps: int = 8,
    output: str | None = None,
    as_json: bool = False,
) -> bool:
    """Runs the tour and prints its table; the command `collab-jax demo`.

    Args:
      smoke: random toy models instead of the real ones.
      new_tokens: most new tokens a row.
      steps: gradient steps for the LoRA variant.
      output: a file to write the table to, as JSON.
      as_json: print JSON instead of the table.

    Returns:
      Whether every check held.

    """
    console = Console(stderr=True)
    began = time.perf_counter()
    with console.status("loading the models") as status:
        voices = _toy_voices() if smoke else _real_voices()
        loaded = time.perf_counter() - began
        rows = _tour(voices, new_tokens, steps, lambda line: status.update(line))
    report: dict[str, Any] = {
        "models": [voice.name for voice in voices],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds_loading": round(loaded, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "rows": [row._asdict() for row in rows],
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        _print_table(report, rows)
    return all(row.held for row in rows)


def _print_table(report: dict, rows: Sequence[Row]) -> None:
    table = Table(title=f"collab_jax on {report['device']}", show_lines=True)
    for column, ratio in (("strategy", 3), ("text", 6), ("tokens/s", 1), ("check", 3)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for row in rows:
        mark = "[green]held[/]" if row.held else "[bold red]FAILED[/]"
        table.add_row(
            row.strategy, row.text, f"{row.speed:.1f}", f"{row.check}: {mark}"
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    held = sum(row.held for row in rows)
    console.print(
        f"{held} of {len(rows)} checks held; {report['seconds']:.0f} s, of which "
        f"{report['seconds_loading']:.0f} s loading; jax {report['jax']}"
    )
