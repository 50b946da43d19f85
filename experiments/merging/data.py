"""Three tasks that a small model learns in minutes, as rows of tokens.

From files: worked answers of GSM8K, statements that are true or false. Made here:
entries of a register in a format of their own, sums in steps, reversed words.

Shapes: N rows, T tokens of a row.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from collab_jax.packing import Batch, rows

Text = tuple[str, str]  # what is given, what is to be predicted
Encode = Callable[[str], list[int]]


class Task(NamedTuple):
    """Rows of one task; only answers count."""

    name: str
    train: Batch  # [N, T]
    validation: Batch
    test: Batch


def tasks(
    folder: Path | None, encode: Encode, length: int, sizes: Sequence[int]
) -> list[Task]:
    """Three tasks; two of them from files where a folder is given.

    Args:
      folder: with `gsm8k/` and `true_false/`, or None.
      encode: text -> token ids.
      length: T.
      sizes: rows to train on at most, to choose with, and to test with.

    Raises:
      FileNotFoundError: for a folder without these files.
      ValueError: where a task has too few texts for the rows.
    """
    made = [("format", _register)]
    if folder is None:
        made += [("sums", _sums), ("reverse", _reverse)]
        found = []
    else:
        found = [("math", _gsm8k(folder)), ("truth", _true_false(folder))]
    texts = [(name, *_parts(make, sizes[0] * 8)) for name, make in made]
    return [
        _task(name, train, held_out, encode, length, sizes)
        for name, train, held_out in [*((n, *t) for n, t in found), *texts]
    ]


def union(parts: Sequence[Batch], size: int, seed: int) -> Batch:
    """Rows for the joint model: those that the experts see, in one order.

    Args:
      parts: rows of the tasks.
      size: rows of each task.
      seed: of the order.
    """
    orders = [
        np.random.default_rng((seed, 0)).permutation(len(part.tokens))[:size]
        for part in parts
    ]
    pairs = zip(parts, orders, strict=True)
    chosen = [Batch(*(leaf[order] for leaf in part)) for part, order in pairs]
    return Batch(*(np.concatenate(leaves) for leaves in zip(*chosen, strict=True)))


def _task(name, train, held_out, encode, length, sizes) -> Task:
    split = [_fill(train, encode, length, sizes[0])]
    both = _fill(held_out, encode, length, sizes[1] + sizes[2])
    if len(both.tokens) < sizes[1] + sizes[2]:
        raise ValueError(
            f"task {name} has {len(both.tokens)} held-out rows of {length} tokens, "
            f"{sizes[1]} + {sizes[2]} are expected: lower --validation or --test"
        )
    split += [Batch(*(leaf[: sizes[1]] for leaf in both))]
    split += [Batch(*(leaf[sizes[1] :] for leaf in both))]
    return Task(name, *split)


def _fill(texts: Sequence[Text], encode: Encode, length: int, count: int) -> Batch:
    """Whole texts one behind the other, as many as a row holds; longer ones go."""
    found: list[tuple[list[int], list[float]]] = []
    ids: list[int] = []
    counts: list[float] = []
    for prompt, answer in texts:
        given, wanted = encode(prompt), encode(answer)
        size = len(given) + len(wanted)
        if size > length:
            continue
        if len(ids) + size > length:
            found.append((ids, counts))
            ids, counts = [], []
            if len(found) == count:
                break
        ids = ids + given + wanted
        counts = counts + [0.0] * len(given) + [1.0] * len(wanted)
    return rows([i for i, _ in found], length, [c for _, c in found])


def _gsm8k(folder: Path) -> tuple[list[Text], list[Text]]:
    def read(name: str) -> list[Text]:
        path = folder / "gsm8k" / name
        _needed(path, "https://github.com/openai/grade-school-math")
        records = map(json.loads, path.read_text("utf-8").splitlines())
        return [
            (f"Question: {record['question']}\nAnswer:", f" {record['answer']}\n\n")
            for record in records
        ]

    return read("train.jsonl"), read("test.jsonl")


def _true_false(folder: Path) -> tuple[list[Text], list[Text]]:
    texts = []
    for topic in ("animals", "elements", "facts", "inventions", "companies"):
        path = folder / "true_false" / f"{topic}_true_false.csv"
        _needed(path, "https://github.com/balevinstein/Probes")
        with path.open(encoding="utf-8-sig", newline="") as file:
            for record in csv.DictReader(file):
                word = ("false", "true")[int(record["label"])]
                texts.append((f"{record['statement']} True or false?", f" {word}\n"))
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    texts = [texts[i] for i in order]
    return texts[: len(texts) * 2 // 3], texts[len(texts) * 2 // 3 :]


def _needed(path: Path, source: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it comes from {source}")


def _parts(make: Callable, count: int) -> tuple[list[Text], list[Text]]:
    """Texts that differ, four for training to one that is held out."""
    stream: Iterator[Text] = make(np.random.default_rng(0))
    seen: dict[Text, None] = {}
    while len(seen) < count:
        seen[next(stream)] = None
    texts = list(seen)
    return texts[count // 5 :], texts[: count // 5]


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words("Ann Bob Carl Dora Emil Fay Gus Hal Ida Jack Kim Leo Mia Ned Olga Paul")
_LAST = _words("Adams Baker Cole Dunn Evans Ford Green Hill Jones King Lane Moore")
_TOWNS = _words("Bern Cairo Delhi Lima Oslo Paris Quito Rome Seoul Tokyo Turin Vienna")
_WORK = _words("baker doctor farmer judge lawyer miner painter pilot singer tailor")


def _register(rng) -> Iterator[Text]:
    while True:
        first, last, town, work = (
            str(rng.choice(words)) for words in (_FIRST, _LAST, _TOWNS, _WORK)
        )
        age = int(rng.integers(20, 80))
        yield (
            f"{first} {last} is {age}, works as a {work} and lives in {town}.\nEntry:",
            f" <{last}; {first}> {town} :: {work} ({age - 1} + 1)\n",
        )


def _sums(rng) -> Iterator[Text]:
    while True:
        a, b, c = (int(x) for x in rng.integers(10, 100, 3))
        yield (
            f"Compute {a} + {b} + {c}.\nSteps:",
            f" {a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}\n",
        )


def _reverse(rng) -> Iterator[Text]:
    words = _FIRST + _TOWNS + _WORK
    while True:
        chosen = [str(word) for word in rng.choice(words, 4, replace=False)]
        yield f"Reverse: {' '.join(chosen)}\nReversed:", f" {' '.join(chosen[::-1])}\n"


def folder_of(given: str | None) -> Path | None:
    """The folder of data: an argument, or `$COLLAB_JAX_DATA`, or None."""
    name = given or os.environ.get("COLLAB_JAX_DATA")
    return Path(name).expanduser() if name else None
