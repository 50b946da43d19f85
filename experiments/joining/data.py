"""Texts for the experiments on laws: from files, or a few of this file.

Files: gsm8k/{train,test}.jsonl of https://github.com/openai/grade-school-math
(grade_school_math/data), spec_bench/question.jsonl of
https://github.com/hemingkx/Spec-Bench (data/spec_bench), and
true_false/*_true_false.csv of https://github.com/balevinstein/Probes.
"""

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

from speculating.subject import OWN, spec_bench

SAID = {  # topic -> how the file says it, how a question asks, and an answer begins
    "capitals": ("{} is a city in {}", "In which country is {}?", "{} is in"),
    "companies": (
        "{} has headquarters in {}",
        "In which country does {} have its headquarters?",
        "The headquarters of {} are in",
    ),
}
FACTS = [
    ("Oslo", "Norway"),
    ("Lima", "Peru"),
    ("Cairo", "Egypt"),
    ("Rome", "Italy"),
    ("Tokyo", "Japan"),
    ("Quito", "Ecuador"),
]
SUMS = [
    ("Ann has 3 pens and buys 4. How many has she?", "3 + 4 = 7\n#### 7"),
    ("Bob had 9 nuts and ate 5. How many are left?", "9 - 5 = 4\n#### 4"),
    ("Two boxes hold 6 eggs each. How many eggs?", "2 * 6 = 12\n#### 12"),
]


class Text(NamedTuple):
    """A text of which the second part is predicted."""

    group: str
    given: str
    wanted: str


def facts(folder: Path | None) -> dict[str, list[tuple[str, str]]]:
    """(subject, country) that the file calls true, by topic, each subject once."""
    if folder is None:
        return {"capitals": FACTS}
    found: dict[str, list[tuple[str, str]]] = {}
    for topic, (said, *_) in SAID.items():
        pattern = re.compile(said.format("(.+)", r"(.+?)\.?") + "$")
        known: dict[str, str] = {}
        path = folder / "true_false" / f"{topic}_true_false.csv"
        with path.open(encoding="utf-8-sig", newline="") as file:
            for record in csv.DictReader(file):
                match = pattern.match(record["statement"].strip())
                if match and record["label"] == "1":
                    known.setdefault(*match.groups())
        found[topic] = list(known.items())
    return found


def problems(folder: Path | None, split: str) -> list[tuple[str, str]]:
    """Questions and worked answers of GSM8K."""
    if folder is None:
        return SUMS
    lines = (folder / "gsm8k" / f"{split}.jsonl").read_text("utf-8").splitlines()
    records = map(json.loads, lines)
    return [(record["question"], record["answer"]) for record in records]


def prompts(folder: Path | None) -> dict[str, list[str]]:
    """The first question of every dialogue of Spec-Bench, by group."""
    return OWN if folder is None else spec_bench(folder)


def held_out(folder: Path | None, rows: int, letters: int = 320) -> list[Text]:
    """Worked answers behind their questions, and second halves of Spec-Bench's texts.

    Args:
      folder: of the data, or None.
      rows: of each group.
      letters: longest text; a longer one is cut behind a word.
    """
    found = []
    for question, answer in problems(folder, "test"):
        given, wanted = f"Question: {question}\nAnswer:", f" {answer}"
        if len(given + wanted) <= 2 * letters and len(found) < rows:
            found.append(Text("GSM8K answers", given, wanted))
    groups = [texts for texts in prompts(folder).values() if texts]
    mixed = [text for some in zip(*groups, strict=False) for text in some]
    if folder is None:
        mixed = [text for texts in groups for text in texts]
    halves = []
    for text in mixed:
        words = text[:letters].rsplit(" ", 1)[0].strip()
        middle = words.find(" ", len(words) // 2)
        if middle > 0:
            halves.append(Text("Spec-Bench texts", words[:middle], words[middle:]))
    return found + halves[:rows]
