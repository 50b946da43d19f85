"""The flags that make several models one: ensembles, contrasts, proxies, context."""

from collections.abc import Sequence

import click

BRIDGES = "union", "unite", "exact", "mined", "eva", "deepen"
STRENGTH = {"contrast": 0.5, "proxy": 1.0, "context": 0.5}  # of the papers
PLAUSIBLE = 0.1  # share of the likeliest token's probability
LISTS = "--ensemble", "--weights"  # take every value up to the next option


class ListsCommand(click.Command):
    """A command whose `LISTS` take several values: `--ensemble A B C`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats the option before each of its values."""
        return super().parse_args(ctx, spread(args))


def spread(args: Sequence[str]) -> list[str]:
    """Arguments with each option of `LISTS` before every one of its values.

    Args:
      args: of the command line.

    >>> spread(["--ensemble", "a", "b", "--prompt", "c"])
    ['--ensemble', 'a', '--ensemble', 'b', '--prompt', 'c']
    """
    found: list[str] = []
    now = None  # the option whose values are read
    for place, arg in enumerate(args):
        if arg == "--":
            return [*found, *args[place:]]
        if arg.startswith("-") and arg != "-":
            now = arg if arg in LISTS else None
            alone = now and (place + 1 == len(args) or args[place + 1].startswith("-"))
            found += [arg] if alone or not now else []  # click says what is missing
        else:
            found += [arg] if now is None else [now, arg]
    return found


ensemble = click.option(
    "--ensemble",
    multiple=True,
    metavar="SOURCE...",
    help="The mean of the laws of several models at every token, SOURCE's with them.",
)
weights = click.option(
    "--weights",
    multiple=True,
    type=click.FloatRange(min=0),
    metavar="W...",
    help="Of the members of --ensemble, in their order.  [default: equal]",
)
bridge = click.option(
    "--bridge",
    type=click.Choice(BRIDGES),
    help="How an ensemble joins different vocabularies: over their union (GaC), the "
    "union of likely tokens (UniTE), the tokens that all have, with the nearest "
    "spelling (MinED), by aligned embeddings (EVA) or by relations to common tokens "
    "(DeePEn).  [default: union]",
)
contrast = click.option(
    "--contrast",
    metavar="AMATEUR",
    help="Contrastive decoding: what SOURCE says and a weaker model would not.",
)
proxy = click.option(
    "--proxy",
    nargs=2,
    metavar="EXPERT ANTIEXPERT",
    help="Proxy tuning: SOURCE, moved by what tuning did to a small model.",
)
context = click.option(
    "--context",
    metavar="TEXT",
    help="Context-aware decoding: prompts stand behind this text, and what it says "
    "counts for more than what the model remembers.",
)
strength = click.option(
    "--strength",
    type=float,
    metavar="X",
    help="Of --contrast (beta, 0.5), --proxy (1) or --context (0.5).",
)


def check_flags(
    source: str | None,
    ensemble: Sequence[str],
    weights: Sequence[float],
    bridge: str | None,
    contrast: str | None,
    proxy: tuple[str, str] | None,
    context: str | None,
    strength: float | None,
) -> str | None:
    """Refuses flags that contradict each other; which of the joins was asked for.

    Raises:
      click.UsageError: naming the flag.

    >>> check_flags("a", ["b"], [], None, None, None, None, None)
    'ensemble'
    >>> check_flags("a", [], [1.0], None, None, None, None, None)
    Traceback (most recent call last):
    click.exceptions.UsageError: --weights goes with --ensemble
    """
    given = {
        "ensemble": bool(ensemble),
        "contrast": contrast is not None,
        "proxy": proxy is not None,
        "context": context is not None,
    }
    kinds = [kind for kind, here in given.items() if here]
    if len(kinds) > 1:
        raise click.UsageError(f"--{kinds[0]} goes without --{kinds[1]}")
    kind = kinds[0] if kinds else None
    for flag, there in ("--weights", bool(weights)), ("--bridge", bridge is not None):
        if there and kind != "ensemble":
            raise click.UsageError(f"{flag} goes with --ensemble")
    if strength is not None and kind not in STRENGTH:
        raise click.UsageError("--strength goes with --contrast, --proxy or --context")
    if context is not None and not context.strip():
        raise click.UsageError("--context wants a text that is not empty")
    members = len(ensemble) + (source is not None)
    if kind == "ensemble" and members < 2:
        raise click.UsageError("--ensemble wants two models at least")
    if weights and len(weights) != members:
        raise click.UsageError(f"{len(weights)} --weights for {members} members")
    if weights and not sum(weights) > 0:
        raise click.UsageError("--weights that are not all 0 are expected")
    if source is None and kind != "ensemble":
        raise click.UsageError("Missing argument 'SOURCE'.")
    return kind
