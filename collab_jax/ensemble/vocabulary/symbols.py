"""Tokens of any vocabulary as strings over one alphabet: the bytes, and an end.

Shapes: U tokens of a member, M the longest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

END = 256  # the symbol that an end token stands for
SYMBOLS = 257  # how many there are


class Symbols(NamedTuple):
    """What each token of a member writes: arrays, so that it may be a tracer."""

    spelling: jax.Array  # [U, M] int32, symbols; behind `size` anything
    size: jax.Array  # [U] int32, 1 to M; 0 for a token that is never written


def symbols(
    texts: Sequence[bytes],
    eos: Sequence[int] = (),
    *,
    vocab: int | None = None,
    longest: int = 32,
) -> Symbols:
    """What each token writes, from its bytes.

    Special tokens, whose bytes are empty, are never written, but for the end tokens,
    which all write `END`. So are rows of a model beyond its tokenizer, and tokens of
    more than `longest` bytes: there are few, and each makes the table wider.

    Args:
      texts: bytes of each token, of `collab_jax.io.tokenizer.token_bytes`.
      eos: end tokens.
      vocab: U, rows of the model if they are more than its tokens.
      longest: M, at most.

    Raises:
      ValueError: for an end token that is not there, or if nothing can be written.

    >>> found = symbols([b"a", b"bc", b"", b""], eos=[2])
    >>> found.spelling.tolist(), found.size.tolist()
    ([[97, 0], [98, 99], [256, 0], [0, 0]], [1, 2, 1, 0])
    """
    count = len(texts) if vocab is None else vocab
    wrong = [i for i in eos if not 0 <= i < count]
    if wrong or count < len(texts):
        raise ValueError(
            f"end tokens {[*eos]} and {len(texts)} texts for a vocabulary of {count}: "
            "tokens below it are expected"
        )
    written = {i: [*text] for i, text in enumerate(texts) if 0 < len(text) <= longest}
    written |= {i: [END] for i in eos}
    if not written:
        raise ValueError(
            f"none of {count} tokens writes 1 to {longest} bytes: are these texts of "
            "tokens?"
        )
    spelling = np.zeros((count, max(map(len, written.values()))), np.int32)
    size = np.zeros(count, np.int32)
    for i, text in written.items():
        spelling[i, : len(text)], size[i] = text, len(text)
    return Symbols(jnp.asarray(spelling), jnp.asarray(size))


def check_start(prompt: jax.Array) -> jax.Array:
    """The prompt of a decoder whose tokens are symbols: one start token a row.

    Args:
      prompt: `[B, 1]`.

    Returns:
      The same, int32.

    Raises:
      ValueError: for a prompt of several tokens.

    >>> check_start(jnp.array([[3]])).tolist()
    [[3]]
    """
    if prompt.shape[1] != 1:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens: one start token is expected, "
            "prompts are the members' own"
        )
    return prompt.astype(jnp.int32)


def text(symbols: Sequence[int]) -> bytes:
    """The bytes of a row of symbols, up to its end.

    Args:
      symbols: such as a row of `Sequences.tokens`, behind its start.

    >>> text([104, 105, 256])
    b'hi'
    """
    found = [int(s) for s in symbols]
    return bytes(found[: found.index(END)] if END in found else found)
