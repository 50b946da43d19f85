"""`collab-jax merge`."""

import shlex
import sys

import click

from collab_jax.commands import options

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "": 1}


class _Size(click.ParamType):
    name = "size"

    def convert(self, value, param, ctx):
        """Bytes, as 5GB, 500MB or a number."""
        text = str(value).strip().lower().removesuffix("b")
        unit = text[-1:] if text[-1:] in UNITS else ""
        try:
            size = int(float(text.removesuffix(unit)) * UNITS[unit])
        except ValueError:
            size = 0
        if size < 1:
            self.fail(f"{value!r} is no size: 5GB, 500MB or a number is expected")
        return size


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path(), required=False)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, stop.")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    metavar="S",
    help="Of the masks of random methods.",
)
@click.option(
    "--max-shard-size",
    type=_Size(),
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Largest file of weights; a tensor may be larger.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Threads that each read, merge and write a tensor.",
)
@options.as_json
def merge(
    config: str,
    out: str | None,
    dry_run: bool,
    seed: int,
    max_shard_size: int,
    workers: int,
    as_json: bool,
) -> None:
    """Merges models as a YAML file of mergekit says.

    \b
    collab-jax merge ties.yml ./merged
    collab-jax merge ties.yml --dry-run

    CONFIG is read as mergekit 0.1.5 reads it; a model is a SOURCE, with an adapter as
    MODEL+ADAPTER. Everything is checked before the first tensor is read: misspelt keys,
    missing tensors, unequal shapes, vocabularies, memory. OUT is a new folder with
    config.json, tokenizer, weights and a model card; it appears whole or not at all.

    With --json, stdout is an object with "out", "tensors", "bytes", "seconds" and
    "notes"; with --dry-run "plan", a list of lines, in place of "out" and "seconds".
    """
    import json
    import time

    from collab_jax.commands.opening import keep_programs
    from collab_jax.commands.progress import progress

    if out is None and not dry_run:
        raise click.UsageError(
            "OUT is missing: a new folder, or --dry-run, is expected"
        )
    start = time.perf_counter()
    _keep_pages()
    keep_programs()
    from collab_jax.io.layout import size_of
    from collab_jax.merge import files

    recipe = files.prepare(config)
    plan = files.summary(recipe)
    targets = recipe.stages[-1].targets
    found: dict[str, object] = {
        "tensors": len(targets),
        "bytes": sum(size_of(target.layout) for target in targets),
    }
    if dry_run or not as_json:
        for line in [] if as_json else plan:
            click.echo(line, err=not dry_run)
    if dry_run:
        if as_json:
            click.echo(json.dumps({"plan": plan, **found}))
        return
    assert out is not None
    notes = files.run(
        recipe,
        out,
        seed=seed,
        command=shlex.join(["collab-jax", *sys.argv[1:]]),
        max_shard_size=max_shard_size,
        workers=workers,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    if as_json:
        found |= {"out": out, "seconds": round(seconds, 3), "notes": notes}
        click.echo(json.dumps(found))
        return
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{out}: {found['tensors']} tensors in {seconds:.1f} s")


def _keep_pages() -> None:
    """Lets glibc reuse the memory of a freed array, where it would give it back.

    Arrays of a few megabytes come and go by the thousand, and the kernel clears each
    page anew: half a second of a merge of 135M parameters. What is larger is given
    back. Elsewhere nothing happens.
    """
    import ctypes

    try:
        limit = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    limit(M_MMAP_THRESHOLD, 1 << 25)
    limit(M_TRIM_THRESHOLD, 1 << 30)
    limit(M_ARENA_MAX, 1)  # what one thread frees is there for all
