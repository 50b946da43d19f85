"""`collab-jax pull` and `collab-jax models`."""

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
