"""`collab-jax demo`."""

import click


@click.command()
def demo() -> None:
    """Tour of collaboration on two real models.

    Generates with each, joins them in several ways, and prints a table of strategies,
    texts, speed, and the checks that held. The first run downloads the models.

    \b
    collab-jax demo
    """
    from collab_jax import demo as tour

    tour.main()
