"""`collab-jax evaluate`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collab_jax.commands import options

if TYPE_CHECKING:
    from collab_jax.commands.opening import Opened
    from collab_jax.commands.strategy import Strategy
    from collab_jax.evaluate import Choice, Question, Result

CHUNK = 32  # tokens whose logits exist at a time


@click.command()
@options.source
@click.option(
    "--task",
    required=True,
    type=click.Path(),
    metavar="FILE",
    help="JSONL of records.",
)
@click.option(
    "--mode",
    type=click.Choice(["choice", "generate"]),
    help="Told by the records, where it is not given.",
)
@click.option(
    "--output",
    type=click.Path(),
    metavar="FILE",
    help="JSONL of the results, one a record; a run that was cut short goes on there.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="First N records."
)
@options.text
@options.sampling
@options.dtype
@options.matrices
@options.batch_size
@options.as_json
def evaluate(
    source: str,
    task: str,
    mode: str | None,
    output: str | None,
    limit: int | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    stops: tuple[str, ...],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    dtype: str,
    matrices: str,
    batch_size: int,
    as_json: bool,
) -> None:
    """Accuracy on a file of records, with 95% intervals.

    Multiple choice by likelihood reads {"prompt", "choices": [...], "answer": index or
    text}; generation reads {"prompt", "answer": text, number or list}, and takes the
    options of `generate`.

    \b
    collab-jax evaluate gemma-3-270m --task questions.jsonl
    collab-jax evaluate smollm2-135m-instruct --task sums.jsonl --mode generate --chat
    """
    from collab_jax import evaluate as evaluation
    from collab_jax import records

    if mode is None:
        first = records.read(task)[0]
        mode = "choice" if "choices" in first else "generate"
    sampling = options.Sampling(temperature, top_k, top_p, min_p)
    if mode == "choice":
        given = [
            *sampling.given,
            *(["--chat"] if chat else []),
            *["--stop"] * len(stops),
        ]
        if given:
            raise click.UsageError(f"{given[0]} is for --mode generate")
        tasks: list[Any] = evaluation.read_choices(task)[:limit]
    else:
        tasks = evaluation.read_questions(task)[:limit]
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")

    from collab_jax.commands.opening import open_source

    opened = open_source(source, dtype, chat=chat, system=system, matrices=matrices)
    settings: dict[str, Any] = {
        "source": source,
        "model": opened.fingerprint(),
        "dtype": dtype,
        **({} if matrices == "plain" else {"matrices": matrices}),
        "mode": mode,
        "task": hashlib.sha256(Path(task).read_bytes()).hexdigest(),
        "limit": limit,
    }
    if mode == "generate":
        settings |= {"chat": chat, "system": system, "max_new_tokens": max_new_tokens}
        settings |= {"stop": stops, "seed": seed, **sampling._asdict()}
    journal = records.journal(output, settings, identity="task") if output else None
    results: dict[int, Result] = {}
    if journal is not None:
        results |= {
            i: evaluation.Result(record["correct"], record["detail"])
            for i, record in journal.done.items()
        }
    todo = [i for i in range(len(tasks)) if i not in results]

    def keep(number: int, result: "Result") -> None:
        index = todo[number]
        results[index] = result
        if journal is not None:
            journal.append([{"index": index, **result._asdict()}])

    chosen = [tasks[i] for i in todo]
    if todo and mode == "choice":
        _choose(opened, chosen, batch_size, keep)
    elif todo:
        from collab_jax.commands import strategy as strategies

        strategy = strategies.Strategy(sampling, max_new_tokens, stops, 1, 1.0)
        _generate(
            opened, chosen, strategy, strategies.row_keys(seed, todo), batch_size, keep
        )
    if journal is not None:
        journal.finish()
    _print(task, mode, [results[i] for i in range(len(tasks))], as_json)


def _choose(opened: "Opened", tasks: Sequence["Choice"], batch_size: int, keep) -> None:
    """Scores every choice of every record."""
    from collab_jax.commands.opening import check_lengths
    from collab_jax.commands.plan import check
    from collab_jax.commands.progress import progress
    from collab_jax.evaluate import by_likelihood
    from collab_jax.respond import batches

    longest = [
        max(opened.codec.encode([f"{task.prompt} {c}" for c in task.choices]), key=len)
        for task in tasks
    ]
    check_lengths(longest, opened.config, new=0)
    first = batches([len(ids) + 1 for ids in longest], batch_size)[0]
    check(opened.plan(batch_size, capacity=first.width, wide=CHUNK, read=CHUNK))
    model = opened.load()
    judge = by_likelihood(
        model.lm,
        opened.codec,
        batch_size=batch_size,
        capacity=opened.config.context,
        chunk=CHUNK,
    )
    with progress("records", len(tasks)) as advance:

        def report(number, result):
            keep(number, result)
            advance()

        judge(model.params, tasks, report)


def _generate(
    opened: "Opened",
    questions: Sequence["Question"],
    strategy: "Strategy",
    keys: Any,
    batch_size: int,
    keep,
) -> None:
    """Generates an answer to every record and grades it."""
    from collab_jax.commands.progress import progress
    from collab_jax.commands.strategy import check_run
    from collab_jax.evaluate import grade
    from collab_jax.respond import from_decoder

    prompts = [question.prompt for question in questions]
    check_run([opened], prompts, strategy.max_new_tokens, batch_size, strategy.beams)
    model = opened.load()
    decoder = strategy.decoder(model.lm, opened.codec)
    with progress("records", len(questions)) as advance:

        def report(number, reply):
            keep(number, grade(reply.text, questions[number]))
            advance()

        ask = from_decoder(
            decoder,
            model.params,
            opened.codec,
            stops=strategy.stops,
            batch_size=batch_size,
            report=report,
        )
        ask(prompts, keys)


def _print(task: str, mode: str, results: Sequence["Result"], as_json: bool) -> None:
    from collab_jax.evaluate import accuracies

    found = accuracies(results)
    if as_json:
        summary: Mapping[str, Any] = {
            "task": task,
            "mode": mode,
            "records": len(results),
            "accuracy": {name: interval._asdict() for name, interval in found.items()},
        }
        click.echo(json.dumps(summary, ensure_ascii=False, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "accuracy", "95% interval", box=None, header_style="bold")
    for name, interval in found.items():
        table.add_row(
            name,
            f"{interval.estimate:.1%}",
            f"{interval.low:.1%} to {interval.high:.1%}",
        )
    console = Console()
    console.print(table)
    console.print(f"{len(results)} records of {task}", highlight=False)
