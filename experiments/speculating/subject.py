"""What the experiments on speculative decoding run on: a model and prompts by group."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax import decode
from collab_jax.io.load import load
from collab_jax.lm import LM, Backbone, language_model
from collab_jax.models import config as configs
from collab_jax.models import transformer

NAME = "smollm2-135m-instruct"
GROUPS = "mt-bench", "translation", "summarization", "qa", "math_reasoning", "rag"
OWN = {  # without the data
    "repeats": ["List the numbers from 1 to 10, twice.", "Say hello ten times."],
    "copies": ["Repeat: the cat sat on the mat, the dog sat on the log."],
    "free": ["Name three rivers.", "Why is the sky blue?"],
}


Row = tuple[str, int]  # a prompt: its group, and its place in the group


class Subject(NamedTuple):
    """A model, and prompts by group as tokens."""

    lm: LM
    params: Any
    config: configs.Config
    prompts: dict[str, list[list[int]]]
    eos: tuple[int, ...]
    new: int  # tokens that a text may become longer
    length: int  # tokens of a draft
    widths: tuple[int, ...]  # prompts are padded to one of these, for few programs
    more: dict[str, list[list[int]]] = {}  # other prompts, to train on
    name: str = NAME  # what `load` calls it

    @property
    def vocab(self) -> int:
        """V."""
        return self.config.vocab

    def backbone(
        self, taps: tuple[str, ...] = (), layers: tuple[int, int] | None = None
    ) -> Backbone:
        """The model one level below, or some of its layers."""
        return transformer.transformer(self.config, taps, layers)

    def of(self, rows: Sequence[Row]) -> list[list[int]]:
        """The prompts of rows."""
        return [self.prompts[group][row] for group, row in rows]

    def padded(self, prompts: Sequence[list[int]], size: int):
        """Prompts for `run`; where rows are missing, the first again."""
        filled = [*prompts, *prompts[:1] * (size - len(prompts))]
        longest = max(map(len, filled))
        return decode.pad(filled, min(w for w in self.widths if w >= longest))

    def batches(self, size: int) -> list[list[Row]]:
        """All prompts, short ones first, at most `size` together."""
        rows = [
            (name, i) for name, some in self.prompts.items() for i in range(len(some))
        ]
        rows.sort(key=lambda row: len(self.of([row])[0]))
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def spec_bench(folder: Path) -> dict[str, list[str]]:
    """The first question of every dialogue, by group."""
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    path = folder / "spec_bench" / "question.jsonl"
    for line in path.read_text("utf-8").splitlines():
        question = json.loads(line)
        group = groups.get(question["category"], groups["mt-bench"])
        group.append(question["turns"][0])
    # mt-bench has ten questions of each of eight kinds: some of every kind first
    spread = groups["mt-bench"]
    groups["mt-bench"] = [spread[i] for n in range(8) for i in range(n, len(spread), 8)]
    return groups


def real(
    data: str | None,
    rows: int,
    new: int = 128,
    length: int = 10,
    matrices: str | None = None,
    name: str = NAME,
) -> Subject:
    """A model, SmolLM2 unless said; prompts are cut to 512 tokens from the left.

    They are in its chat template where it has one, and as they are for a base model.

    Args:
      data: the folder with `spec_bench/`, or None for a few prompts of this file.
      rows: prompts of each group that are measured; the others are for training.
      new: new tokens.
      length: tokens of a draft.
      matrices: how they are held, as in `load`.
      name: what `load` calls the model.
    """
    model = load(name, matrices=matrices)
    plain = model.tokenizer.chat_template is None

    def encode(text: str) -> list[int]:
        if plain:
            return model.tokenizer(text)["input_ids"][-512:]
        return model.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )[-512:]

    texts = OWN if data is None else spec_bench(Path(data))
    tokens = {group: [encode(text) for text in some] for group, some in texts.items()}
    return Subject(
        model.lm,
        model.params,
        model.config,
        {group: some[:rows] for group, some in tokens.items()},
        tuple(model.config.eos),
        new,
        length,
        (129, 257, 513),
        {group: some[rows:] for group, some in tokens.items()},
        name,
    )


def toy() -> Subject:
    """A random Llama; bytes are its tokens."""
    raw = {"model_type": "llama", "vocab_size": 257, "hidden_size": 32}
    raw |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = configs.from_hf(raw)
    model = language_model(transformer.transformer(config))
    params = transformer.init(jax.random.key(0), config)
    prompts = {k: [list(text.encode()) for text in v] for k, v in OWN.items()}
    return Subject(model, params, config, prompts, (), 24, 4, (65,), prompts)


def texts(result: decode.Sequences, count: int) -> list[list[int]]:
    """The new tokens of the first rows."""
    tokens, begin, end = (
        np.asarray(x) for x in (result.tokens, result.prompt_length, result.length)
    )
    return [tokens[b, begin[b] : end[b]].tolist() for b in range(count)]


def count(
    groups: dict[str, list[int]],
    rows: Sequence[Row],
    found: Sequence[Sequence[int]],
    calls: Any,
) -> None:
    """Adds new tokens, and calls of the target, to those of the rows' groups."""
    for (group, _), text, some in zip(rows, found, calls, strict=False):
        counts = groups.setdefault(group, [0, 0])
        counts[0] += len(text)
        counts[1] += int(some)
