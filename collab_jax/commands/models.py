"""`collab-jax pull` and `collab-jax models`."""

import json
import os

import click

from collab_jax.commands import options


@click.command()
@click.argument("name")
def pull(name: str) -> None:
    """Download a model once, verify it, and print the folder it is in.

    NAME is a short name of `collab-jax models`, or ORG/NAME of the Hugging Face Hub.

    \b
    collab-jax pull smollm2-135m-instruct
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from collab_jax.io import hub

    click.echo(hub.fetch(name))


@click.command()
@options.as_json
def models(as_json: bool) -> None:
    """List the short names: what they are, licence, size, where they lie.

    \b
    collab-jax models
    collab-jax models --json
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from collab_jax.io import hub

    rows = [
        {
            "name": name,
            "about": source.about,
            "licence": source.licence,
            "size": f"{source.megabytes} MB",
            "pulled": hub.folder(name).is_dir(),
            "path": str(hub.folder(name)),
        }
        for name, source in hub.MODELS.items()
    ]
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for row in rows:
        click.secho(row["name"], bold=True)
        click.echo(f"  {row['about']}")
        click.echo(f"  licence: {row['licence']}")
        state = f"pulled, in {row['path']}" if row["pulled"] else "not pulled"
        click.echo(f"  {row['size']} to download, {state}")
