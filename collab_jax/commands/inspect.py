"""`collab-jax inspect`."""

from typing import TYPE_CHECKING

import click

from collab_jax.commands import options

if TYPE_CHECKING:
    from pathlib import Path

    from collab_jax.commands.inspect_report import Report


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="A B ...")
@click.option(
    "--base", metavar="BASE", help="What the models were made from; else it is A."
)
@click.option(
    "--by",
    type=click.Choice(("layer", "module", "tensor")),
    default="layer",
    show_default=True,
    help="What a row of the table adds up.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    metavar="N",
    help="Rows at most: more layers are put together, of others the most moved stay.",
)
@click.option(
    "--ranks",
    type=click.Choice(("some", "all", "none")),
    default="some",
    show_default=True,
    help="Matrices whose effective rank is computed; some: spread over the layers.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw the layers: .png, .pdf or .svg.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="Threads that each read and compare a tensor.",
)
@options.as_json
def inspect(
    sources: tuple[str, ...],
    base: str | None,
    by: str,
    limit: int,
    ranks: str,
    plot: str | None,
    workers: int,
    as_json: bool,
) -> None:
    """Tells beforehand whether models can be merged.

    \b
    collab-jax inspect ./code ./math --base ./base
    collab-jax inspect ./base ./tuned --by module --plot layers.png
    collab-jax inspect org/base+me/adapter ./math --base org/base --json

    A model is a SOURCE with full weights, or MODEL+ADAPTER. Every tensor is read once.
    Printed are: what configs, tokenizers, names and shapes say against a merge; how far
    each model is from the base, how the changes agree in direction and sign, how many
    directions they have; NaN and infinities; and what follows. Without --base, changes
    are taken from A.

    Findings do not change the exit status. With --json, stdout is an object with
    "models", "base", "base_given", "findings", "not_finite", "equal", "not_compared",
    "total", "rows", "ranks", "verdict" and "seconds"; arrays have the order of
    "models", what is undefined is null.
    """
    import os

    # read when NumPy is imported, which is now: the workers are the threads, and those
    # of a matrix product beside them would only wait for each other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from collab_jax.commands import inspect_plot, inspect_report

    names = [*([] if base is None else [base]), *sources]
    if len(names) < 2:
        raise click.UsageError(
            "one model was named, two are expected: A B, or A with --base"
        )
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise click.UsageError(f"{twice[0]} is named twice; name each model once")
    if plot is not None:
        inspect_plot.check(plot)
    report = _report(names, base is not None, ranks, workers)
    if plot is not None:
        inspect_plot.draw(report, plot)
    if as_json:
        import json

        click.echo(json.dumps(inspect_report.as_dict(report, by), allow_nan=False))
        return
    inspect_report.show(report, by, limit)
    if plot is not None:
        click.echo(f"plot: {plot}")


def _report(names: list[str], given: bool, ranks: str, workers: int) -> "Report":
    """Opens the models, looks for findings, and reads all tensors."""
    import os
    import time
    from concurrent.futures import ThreadPoolExecutor

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from collab_jax.commands.inspect_report import Report, labels
    from collab_jax.commands.progress import progress
    from collab_jax.merge.inspect import compare, correspond, tally
    from collab_jax.merge.plan.reference import parse
    from collab_jax.merge.sources import open_source

    start = time.perf_counter()
    opened = [open_source(parse(name, name)) for name in names]
    short = labels(names)
    checkpoints = [source.checkpoint for source in opened]
    found = correspond.correspond(short, checkpoints, [s.config for s in opened])
    where = tally.sites(checkpoints[0].layouts)
    parts = tally.matrices(found.matched, where)
    chosen: list[str] = []
    if ranks != "none":
        chosen = compare.choose(parts, float("inf") if ranks == "all" else None)
    with (
        ThreadPoolExecutor(1) as aside,
        progress("tensors", len(found.matched)) as advance,
    ):
        told = aside.submit(_configs, short, [source.folder for source in opened])
        compared = compare.compare(
            checkpoints, found.matched, chosen, workers=workers, advance=advance
        )
        findings = [*told.result(), *found.findings]
    return Report(
        short,
        names,
        given,
        sorted(findings, key=lambda line: not line.startswith("wrong")),
        compared,
        where,
        found.apart,
        sum(map(len, parts.values())),
        time.perf_counter() - start,
    )


def _configs(names: list[str], folders: list["Path"]) -> list[str]:
    """What configs and tokenizers say; equal tokenizers need not be understood."""
    import json

    from collab_jax.io.compatible import Facts, check_models, read_facts
    from collab_jax.io.templates import read_template

    first = _tokenizer(folders[0])
    if any(_tokenizer(folder) != first for folder in folders[1:]):
        facts = [read_facts(n, f) for n, f in zip(names, folders, strict=True)]
        return check_models(facts)
    read = []
    for name, folder in zip(names, folders, strict=True):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        try:
            template = read_template(folder)
        except ValueError as error:
            raise ValueError(f"{name}: {folder} is damaged ({error})") from None
        read.append(Facts(name, config, None, template))
    return check_models(read)


def _tokenizer(folder: "Path") -> dict[str, str]:
    """The files that decide which token has which id, as hashes."""
    import hashlib

    found = {}
    for path in sorted(folder.iterdir()):
        named = path.name.startswith(("tokenizer", "vocab", "merges", "added_tokens"))
        if path.is_file() and (named or path.suffix in (".model", ".tiktoken")):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
