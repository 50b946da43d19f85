"""`collab-jax demo`."""

import click


@click.command()
@click.option("--smoke", is_flag=True, help="Random toy models instead: no downloads.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=2),
    default=40,
    show_default=True,
    help="Most new tokens a row.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Gradient steps for the LoRA variant.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True),
    help="A file to write the table to, as JSON.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, no table.")
@click.pass_context
def demo(
    context: click.Context,
    smoke: bool,
    max_new_tokens: int,
    steps: int,
    output: str | None,
    as_json: bool,
) -> None:
    """Tour of collaboration on two real models.

    Generates with each, joins them in parameters, in distributions and by prompts, and
    prints a table of strategies, texts, speed, and the checks that held; exit status 1
    if one did not. The first run downloads the models.

    \b
    collab-jax demo
    collab-jax demo --output demo.json
    """
    from collab_jax.commands.opening import keep_programs

    keep_programs()
    from collab_jax import demo as tour

    held = tour.main(smoke, max_new_tokens, steps, output, as_json)
    context.exit(0 if held else 1)
