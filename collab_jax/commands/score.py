"""`collab-jax score`."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from collab_jax.commands import options

if TYPE_CHECKING:
    from collab_jax.commands.opening import Opened

CHUNK = 32  # tokens whose logits exist at a time


@click.command()
@options.source
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="TEXT", help="May repeat."
)
@options.dtype
@options.matrices
@options.batch_size
@options.as_json
def score(
    source: str,
    texts: tuple[str, ...],
    dtype: str,
    matrices: str,
    batch_size: int,
    as_json: bool,
) -> None:
    """Log-probability of each token of a text, and its perplexity.

    A token is scored given those before it; the first has nothing before it and no
    score, unless the tokenizer begins every text with a start token.

    \b
    collab-jax score gemma-3-270m --text "Paris is the capital of France."
    collab-jax score gemma-3-270m --text "One." --text "Two." --json

    With --json, stdout is a list of objects with "text", "tokens", "pieces",
    "logprobs", "ranks", "logprob" (their sum, nats) and "perplexity".
    """
    from collab_jax.commands.opening import check_lengths, open_source

    opened = open_source(source, dtype, matrices=matrices)
    tokens = opened.codec.encode(texts)
    check_lengths(tokens, opened.config, new=0)
    for text, ids in zip(texts, tokens, strict=True):
        if len(ids) < 2:
            raise ValueError(
                f"{text!r} is {len(ids)} token: at least two are expected, for the "
                "first is not predicted"
            )
    found = _scores(opened, texts, tokens, batch_size)
    if as_json:
        rows = [json.dumps(record, ensure_ascii=False) for record in found]
        click.echo("[" + ",\n ".join(rows) + "]")
    else:
        for number, record in enumerate(found):
            _print(number, record)


def _scores(
    opened: "Opened",
    texts: Sequence[str],
    tokens: Sequence[Sequence[int]],
    batch_size: int,
) -> list[dict[str, Any]]:
    import functools

    import jax
    import numpy as np

    from collab_jax import score as scoring
    from collab_jax.commands.plan import check
    from collab_jax.commands.progress import progress
    from collab_jax.decoder import pad
    from collab_jax.respond import batches

    groups = batches([len(ids) + 1 for ids in tokens], batch_size)
    rows, width = groups[0].size, groups[0].width - 1
    check(opened.plan(rows, capacity=width, wide=CHUNK, read=CHUNK))
    model = opened.load()
    program = jax.jit(functools.partial(scoring.score, model.lm, chunk=CHUNK))
    found: dict[int, dict[str, Any]] = {}
    with progress("texts", len(texts)) as advance:
        for group in groups:
            at = [*group.rows, *group.rows[:1] * (group.size - len(group.rows))]
            prompt, length = pad([tokens[i] for i in at], group.width - 1)
            scores = jax.tree.map(np.asarray, program(model.params, prompt, length))
            for row, i in enumerate(group.rows):
                ids = list(tokens[i])
                logprobs = scores.logprob[row, 1 : len(ids)].astype(float).tolist()
                if not all(map(math.isfinite, logprobs)):
                    raise FloatingPointError(
                        f"text {i + 1} has a score that is no number"
                    )
                ranks = scores.rank[row, 1 : len(ids)].tolist()
                found[i] = {
                    "text": texts[i],
                    "tokens": ids,
                    "pieces": [opened.codec.decode([token]) for token in ids],
                    "logprobs": [None, *logprobs],
                    "ranks": [None, *ranks],
                    "logprob": math.fsum(logprobs),
                    "perplexity": math.exp(-math.fsum(logprobs) / len(logprobs)),
                }
                advance()
    return [found[i] for i in range(len(texts))]


def _print(number: int, record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("token", "text", "log-prob", "rank", box=None, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for token, piece, logprob, rank in zip(
        record["tokens"],
        record["pieces"],
        record["logprobs"],
        record["ranks"],
        strict=True,
    ):
        known = ("", "") if logprob is None else (f"{logprob:.3f}", str(rank))
        table.add_row(str(token), Text(repr(piece)[1:-1]), *known)
    console = Console()
    if number:
        console.print()
    console.print(table)
    console.print(
        f"log-prob {record['logprob']:.3f} nats, perplexity {record['perplexity']:.3f}"
    )
