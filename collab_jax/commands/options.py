"""Options that several commands share, and what they mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import click

DTYPES = ("float32", "bfloat16", "float16", "stored")
MATRICES = {"packed": None, "bfloat16": 2, "int8": 1}  # bytes of a number, if known

source = click.argument("source")

dtype = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Type of parameters and cache (a CPU caches in float32); stored: as the "
    "checkpoint has it.",
)

matrices = click.option(
    "--matrices",
    type=click.Choice(("plain", *MATRICES)),
    default="plain",
    show_default=True,
    help="How matrices lie in memory; packed: faster on a CPU; bfloat16, int8: rounded "
    "as well, which is faster still.",
)

as_json = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, alone.")

batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="B",
    help="Texts that run together.",
)


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None

    @property
    def given(self) -> list[str]:
        """The flags that were given."""
        return [
            "--" + name.replace("_", "-")
            for name, value in zip(self._fields, self, strict=True)
            if value is not None
        ]

    def warps(self) -> tuple[Any, ...] | None:
        """None for the likeliest token; otherwise what changes the law drawn from."""
        from collab_jax import warp

        if self.temperature == 0 or not self.given:
            return None
        made = []
        if self.temperature not in (None, 1):
            made.append(warp.temperature(self.temperature))
        for value, make in (
            (self.top_k, warp.top_k),
            (self.top_p, warp.top_p),
            (self.min_p, warp.min_p),
        ):
            if value is not None:
                made.append(make(value))
        return tuple(made)


def _sampling_options() -> list[Callable]:
    inside = click.FloatRange(min=0, max=1, min_open=True)
    return [
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            metavar="T",
            help="Sample from the law sharpened (below 1) or flattened; 0: greedy.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=1),
            metavar="K",
            help="Sample among the K likeliest tokens.",
        ),
        click.option(
            "--top-p",
            type=inside,
            metavar="P",
            help="Sample among the likeliest tokens of probability P together.",
        ),
        click.option(
            "--min-p",
            type=inside,
            metavar="P",
            help="Sample among tokens at least P times as likely as the likeliest.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0, max=2**32 - 1),
            default=0,
            show_default=True,
            metavar="S",
            help="Of the random draws; the same seed gives the same text.",
        ),
    ]


def _text_options() -> list[Callable]:
    return [
        click.option(
            "--chat", is_flag=True, help="Put prompts into the model's chat template."
        ),
        click.option("--system", metavar="TEXT", help="System message of the chat."),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=128,
            show_default=True,
            metavar="N",
            help="Longest reply.",
        ),
        click.option(
            "--stop",
            "stops",
            multiple=True,
            metavar="STRING",
            help="End a reply before this string; may be repeated.",
        ),
    ]


def _together(options: list[Callable]) -> Callable:
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


sampling = _together(_sampling_options())
text = _together(_text_options())
