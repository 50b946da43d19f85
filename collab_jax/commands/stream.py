"""Text on the terminal while it is generated."""

from collections.abc import Iterator, Sequence
from typing import Any

import click

from collab_jax.decoder import Decoder, streaming
from collab_jax.respond import Codec, Own, bucket, feed, read
from collab_jax.stop import trim


def heading(number: int, count: int, prompt: str) -> str:
    """One line that tells texts apart.

    >>> click.unstyle(heading(0, 2, "Name three\\nrivers."))
    '[1/2] Name three rivers.'
    """
    line = " ".join(prompt.split())
    short = line if len(line) <= 72 else line[:69] + "..."
    return click.style(f"[{number + 1}/{count}] {short}", bold=True)


def print_streams(
    codec: Codec,
    params: Any,
    decoder: Decoder,
    texts: Sequence[str],
    stops: Sequence[str],
    keys: Any,
    own: Own | None = None,
) -> None:
    """Prints each text as it grows, one after the other.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from collab_jax import decode, law
    >>> from collab_jax.models import table
    >>> letters = Codec(lambda texts: [[*map(ord, t)] for t in texts],
    ...     lambda ids: "".join(map(chr, ids)))
    >>> successor = 9.0 * jnp.eye(128, k=1)
    >>> greedy = decode.greedy(table.language_model(1), max_new_tokens=4)
    >>> keys = law.row_keys(jax.random.key(0), 1)
    >>> print_streams(letters, successor, greedy, ["a"], ["e"], keys)
    bcd
    """
    steps = streaming(lambda _: decoder)
    for number, text in enumerate(texts):
        if len(texts) > 1:
            click.echo(heading(number, len(texts), text))
        prompts = read(codec, own, [text])
        width = bucket(max(len(rows[0]) for rows in prompts))
        fed = feed(own, params, prompts, width)
        new = steps(None, *fed, keys[number : number + 1])
        for piece in pieces((row[0] for row in new), codec, stops):
            click.echo(piece, nl=False)
        click.echo()


def pieces(
    new: Iterator[list[int]], codec: Codec, stops: Sequence[str]
) -> Iterator[str]:
    """The text of a growing list of tokens, in pieces that never have to be taken back.

    Held back are characters whose bytes are not complete, and what may become a stop
    string.

    Args:
      new: the new token ids of each step.
      codec: how tokens become text.
      stops: the text ends before the first of these.

    >>> from collab_jax.respond import Codec
    >>> letters = Codec(lambda texts: [], lambda ids: "".join(map(chr, ids)))
    >>> list(pieces(iter([[72], [105], [46], [46]]), letters, [".."]))
    ['H', 'i']
    """
    tokens: list[int] = []
    shown = whole = ""
    for ids in new:
        tokens += [token for token in ids if token not in codec.eos]
        text = codec.decode(tokens)
        whole = trim(text, stops)
        ready = whole if whole != text else whole[: len(whole) - _held(whole, stops)]
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    if len(whole) > len(shown):
        yield whole[len(shown) :]


def _held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may still change or be cut."""
    if text.endswith("\ufffd"):
        return len(text) - len(text.rstrip("\ufffd"))
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
