"""Stop strings as automata over bytes, compiled to a table over tokens.

A decoder follows the table on the device, one look-up a token, so that a stop string is
found wherever it starts and ends inside tokens. The same kind of table restricts an LM
to a language: a grammar is an automaton without accepting rest.

Shapes: S states of the automaton, V vocabulary, B rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Stop(NamedTuple):
    """A deterministic automaton over tokens; state 0 is the start."""

    next: jax.Array  # [S, V] int32, the state after a token
    accept: jax.Array  # [S] bool, a stop string has been completed

    def advance(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """The state `[B]` after one more token a row; accepting states are kept."""
        return self.next[state, token]


def byte_table(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The Aho-Corasick automaton of some strings, over bytes.

    Args:
      strings: byte strings, none of them empty.

    Returns:
      `[S, 256]` int32 next states and `[S]` bool accepting states, which are absorbing.

    Raises:
      ValueError: without strings, or for an empty one, which would stop at once.

    Source: Aho and Corasick, 1975.

    >>> table, accept = byte_table([b"ab"])
    >>> int(table[table[0, ord("a")], ord("b")]), accept.tolist()
    (2, [False, False, True])
    """
    if not strings or not all(strings):
        raise ValueError(
            f"stop strings {list(strings)}: at least one is expected, and none empty"
        )
    children: list[dict[int, int]] = [{}]
    accept = [False]
    for string in strings:
        at = 0
        for byte in string:
            if byte not in children[at]:
                children[at][byte] = len(children)
                children.append({})
                accept.append(False)
            at = children[at][byte]
        accept[at] = True
    table = np.zeros((len(children), 256), np.int32)
    fail = [0] * len(children)
    queue = []
    for byte, child in children[0].items():
        table[0, byte] = child
        queue.append(child)
    for at in queue:  # grows while it is walked: breadth first
        accept[at] |= accept[fail[at]]
        table[at] = table[fail[at]]
        for byte, child in children[at].items():
            fail[child] = int(table[fail[at], byte])
            table[at, byte] = child
            queue.append(child)
    done = np.array(accept)
    table[done] = np.flatnonzero(done)[:, None]
    return table, done


def automaton(strings: Sequence[str], token_bytes: Sequence[bytes]) -> Stop:
    """The table that finds stop strings in the bytes of the tokens.

    `next[s, v]` is the state that the byte automaton reaches from s over the bytes of
    token v. A token without bytes (special, or padding) changes nothing.

    Args:
      strings: stop strings.
      token_bytes: the bytes of each of the V tokens.

    Raises:
      ValueError: without strings, or for an empty one.

    >>> stop = automaton(["ab"], [b"a", b"b", b"xab", b""])
    >>> stop.accept[stop.next[0]].tolist()
    [False, False, True, False]
    >>> bool(stop.accept[stop.next[stop.next[0, 0], 1]])
    True
    """
    table, accept = byte_table([string.encode() for string in strings])
    states = np.arange(len(table), dtype=np.int32)
    size = np.array([len(b) for b in token_bytes])
    result = np.tile(states[:, None], (1, len(token_bytes)))
    for width in np.unique(size[size > 0]):  # tokens of one width are walked together
        ids = np.flatnonzero(size == width)
        block = np.frombuffer(b"".join(token_bytes[i] for i in ids.tolist()), np.uint8)
        at = np.tile(states[:, None], (1, len(ids)))
        for column in block.reshape(len(ids), width).T:
            at = table[at, column]
        result[:, ids] = at
    return Stop(jnp.asarray(result), jnp.asarray(accept))


def trim(text: str, strings: Sequence[str]) -> str:
    """The text before the first stop string.

    >>> trim("one. two", ["."])
    'one'
    """
    ends = [text.find(string) for string in strings if string in text]
    return text[: min(ends)] if ends else text
