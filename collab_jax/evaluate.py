"""Accuracy on records: multiple choice by likelihood, and generated answers.

Records are plain JSONL, results are kept one a record, and an accuracy comes with its
interval. Two systems are compared on the same records.

Shapes: n records, C choices of a record, B rows of a program, T its widest text.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from collab_jax import match, records, score, uncertainty
from collab_jax.decoder import pad
from collab_jax.lm import LM
from collab_jax.respond import Codec, Responder, batches
from collab_jax.uncertainty import Interval


class Choice(NamedTuple):
    """A question with its possible answers, one of which is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int  # index of the right one


class Question(NamedTuple):
    """A question that wants a text."""

    prompt: str
    answers: tuple[str, ...]  # any of them is right


class Result(NamedTuple):
    """What came of one record."""

    correct: dict[str, bool]  # by measure
    detail: dict[str, Any]  # JSON values


class Difference(NamedTuple):
    """Two systems on the same records; the first less the second."""

    accuracy: Interval  # difference of the accuracies, by paired bootstrap
    bootstrap: float  # its two-sided p-value
    mcnemar: float  # exact two-sided p-value


Measure = Callable[[str, str], bool]  # (text, reference answer)
Report = Callable[[int, Result], None]  # called as soon as a result is known

MEASURES: Mapping[str, Measure] = {
    "exact": match.exact,
    "normalised": match.normalised,
    "contains": match.contains,
    "last_number": match.last_number,
}


def read_choices(path: str | Path) -> list[Choice]:
    """Reads lines of `{"prompt": text, "choices": [texts], "answer": index or text}`.

    Args:
      path: a JSONL file; "question" may stand for "prompt".

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming file, line and key.

    >>> import tempfile
    >>> line = '{"question": "Sky?", "choices": ["red", "blue"], "answer": "blue"}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "task.jsonl")
    ...     _ = path.write_text(line)
    ...     read_choices(path)
    [Choice(prompt='Sky?', choices=('red', 'blue'), answer=1)]
    """
    return records.read(path, [("prompt", "question"), "choices", "answer"], _choice)


def _choice(record: Mapping[str, Any]) -> Choice:
    choices, answer = record["choices"], record["answer"]
    texts = isinstance(choices, list) and all(type(c) is str and c for c in choices)
    if not texts or len(choices) < 2:
        raise ValueError(f'"choices" must be two or more texts, found {choices!r}')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f'"answer" must be one of the choices, or its index from 0 to '
            f"{len(choices) - 1}; found {answer!r}"
        )
    return Choice(_prompt(record), tuple(choices), answer)


def read_questions(path: str | Path) -> list[Question]:
    """Reads lines of `{"prompt": text, "answer": text, number or list of them}`.

    Args:
      path: a JSONL file; "question" may stand for "prompt".

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming file, line and key.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "task.jsonl")
    ...     _ = path.write_text('{"prompt": "1 + 1 =", "answer": 2}')
    ...     read_questions(path)
    [Question(prompt='1 + 1 =', answers=('2',))]
    """
    return records.read(path, [("prompt", "question"), "answer"], _question)


def _question(record: Mapping[str, Any]) -> Question:
    answer = record["answer"]
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(type(a) in (str, int, float) for a in answers):
        raise ValueError(
            f'"answer" must be a text, a number or a list of them, found {answer!r}'
        )
    return Question(_prompt(record), tuple(map(str, answers)))


def _prompt(record: Mapping[str, Any]) -> str:
    prompt = record.get("prompt", record.get("question"))
    if not isinstance(prompt, str):
        raise ValueError(f'"prompt" must be a text, found {prompt!r}')
    return prompt


def by_likelihood(
    lm: LM,
    codec: Codec,
    *,
    between: str = " ",
    batch_size: int = 8,
    capacity: int | None = None,
    chunk: int = 32,
) -> Callable[..., list[Result]]:
    """Answers multiple choice with the likeliest choice, by three rules at once.

    A choice scores `log p(choice | prompt)` ("sum"), that divided by its tokens
    ("token"), or by its bytes of UTF-8 ("byte"). Where a prompt's last token and a
    choice's first merge, the tokens after what all choices share are scored, so that
    the choices of a record stay comparable.

    Args:
      lm: any LM.
      codec: how texts become tokens; without a chat template.
      between: put between prompt and choice where neither has white space there.
      batch_size: most rows of a program.
      capacity: most tokens of prompt and choice together.
      chunk: tokens whose logits `[B, chunk, V]` exist at a time.

    Returns:
      A function of (params, tasks, report=None) that gives one `Result` a task. It
      compiles once a width, also for other parameters.

    References:
      The rules are those of Brown et al., arXiv 2005.14165, and of the lm-evaluation-
      harness (acc and acc_norm).

    >>> import jax.numpy as jnp
    >>> from collab_jax.models import table
    >>> letters = Codec(lambda texts: [[ord(c) - 97 for c in t] for t in texts], str)
    >>> judge = by_likelihood(table.language_model(order=1), letters, between="")
    >>> judge(jnp.eye(5, 4), [Choice("a", ("bb", "aa"), 1)])[0].correct
    {'sum': True, 'token': True, 'byte': True}
    """
    program = jax.jit(functools.partial(score.score, lm, chunk=chunk))

    def judge(params, tasks, report: Report | None = None):
        rows = [row for task in tasks for row in _encode(task, codec, between)]
        owner = [i for i, task in enumerate(tasks) for _ in task.choices]
        for i, (ids, _) in zip(owner, rows, strict=True):
            if capacity is not None and len(ids) > capacity:
                raise ValueError(
                    f"record {i} has {len(ids)} tokens with its choice, the model has "
                    f"{capacity} positions"
                )
        logprob = np.zeros(len(rows))
        missing = [len(task.choices) for task in tasks]
        first = np.cumsum([0, *missing])
        results: dict[int, Result] = {}
        # the last token is read here too: one more than what a decoder's prefill reads
        for batch in batches([len(ids) + 1 for ids, _ in rows], batch_size):
            at = [*batch.rows, *batch.rows[:1] * (batch.size - len(batch.rows))]
            tokens, length = pad([rows[i][0] for i in at], batch.width - 1)
            table = np.asarray(program(params, tokens, length).logprob, np.float64)
            for row, i in enumerate(batch.rows):
                ids, shared = rows[i]
                logprob[i] = table[row, shared : len(ids)].sum()
                task = owner[i]
                missing[task] -= 1
                if not missing[task]:
                    part = slice(first[task], first[task + 1])
                    counts = [len(ids) - shared for ids, shared in rows[part]]
                    results[task] = _chosen(tasks[task], logprob[part], counts, task)
                    if report is not None:
                        report(task, results[task])
        return [results[i] for i in range(len(tasks))]

    return judge


def _encode(task: Choice, codec: Codec, between: str) -> list[tuple[list[int], int]]:
    """Tokens of the prompt with each choice, and how many of them all share."""
    texts = []
    for choice in task.choices:
        free = task.prompt and not task.prompt[-1].isspace() and not choice[0].isspace()
        texts.append(task.prompt + (between if free else "") + choice)
    prompt, *whole = codec.encode([task.prompt, *texts])
    if not task.prompt:
        # the tokens of an empty text are what every text starts from
        whole = [ids if ids[: len(prompt)] == prompt else prompt + ids for ids in whole]
    shared = 0
    for column in zip(prompt, *whole, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    if shared == 0:
        start = codec.encode([""])[0]
        whole, shared = [start + ids for ids in whole], len(start)
    # a choice that is a beginning of the prompt's tokens still scores its last token
    shared = min(shared, *(len(ids) - 1 for ids in whole))
    return [(ids, shared) for ids in whole]


def _chosen(
    task: Choice, logprob: np.ndarray, tokens: Sequence[int], index: int
) -> Result:
    """The result of a record whose choices are all scored."""
    if np.isnan(logprob).any():
        raise FloatingPointError(f"the likelihood of record {index} became NaN")
    sizes = [len(choice.encode()) for choice in task.choices]
    chosen = {
        "sum": int(np.argmax(logprob)),
        "token": int(np.argmax(logprob / np.array(tokens))),
        "byte": int(np.argmax(logprob / np.array(sizes))),
    }
    return Result(
        {rule: pick == task.answer for rule, pick in chosen.items()},
        {
            "answer": task.answer,
            "chosen": chosen,
            "logprob": logprob.tolist(),
            "tokens": list(tokens),
            "bytes": sizes,
        },
    )


def grade(
    text: str, question: Question, measures: Mapping[str, Measure] = MEASURES
) -> Result:
    """The result of one generated answer.

    Args:
      text: what was generated.
      question: the record.
      measures: by name.

    >>> grade("It is 4.", Question("2 + 2 =", ("4",))).correct
    {'exact': False, 'normalised': False, 'contains': True, 'last_number': True}
    """
    correct = {
        name: any(measure(text, answer) for answer in question.answers)
        for name, measure in measures.items()
    }
    return Result(correct, {"text": text, "answers": list(question.answers)})


def by_generation(
    responder: Responder,
    questions: Sequence[Question],
    key: jax.Array,
    measures: Mapping[str, Measure] = MEASURES,
) -> list[Result]:
    """Asks a responder and grades what it says.

    Args:
      responder: a model, or any composite of models.
      questions: n records.
      key: one key, or `[n]` of them.
      measures: by name.

    >>> from collab_jax.respond import Cost, Reply
    >>> parrot = lambda prompts, key: [Reply(p, 0.0, Cost(1)) for p in prompts]
    >>> by_generation(parrot, [Question("4", ("4",))], jax.random.key(0))[0].correct
    {'exact': True, 'normalised': True, 'contains': True, 'last_number': True}
    """
    replies = responder([question.prompt for question in questions], key)
    return [
        grade(reply.text, question, measures)
        for reply, question in zip(replies, questions, strict=True)
    ]


def accuracies(results: Sequence[Result], level: float = 0.95) -> dict[str, Interval]:
    """The accuracy by every measure, with Wilson's interval.

    Args:
      results: `[n]`, at least one.
      level: probability that such an interval covers.

    >>> accuracies([Result({"exact": True}, {})] * 4)["exact"].estimate
    1.0
    """
    return {
        name: uncertainty.wilson(
            sum(result.correct[name] for result in results), len(results), level
        )
        for name in results[0].correct
    }


def compare(
    first: Sequence[Result], second: Sequence[Result], measure: str, seed: int = 0
) -> Difference:
    """Is one system better than another on the same records?

    Args:
      first: `[n]`, results of the first system.
      second: `[n]`, results of the second on the same records.
      measure: which.
      seed: of the bootstrap.

    Raises:
      ValueError: when the two do not have the same length.

    >>> right, wrong = Result({"exact": True}, {}), Result({"exact": False}, {})
    >>> compare([right] * 6, [wrong] * 6, "exact").mcnemar
    0.03125
    """
    one = [float(result.correct[measure]) for result in first]
    two = [float(result.correct[measure]) for result in second]
    difference, p = uncertainty.paired_bootstrap(one, two, seed)
    return Difference(difference, p, uncertainty.mcnemar(one, two))
