"""MinED: a token that another vocabulary lacks is matched with the most similar one.

Similar is what takes the fewest insertions, deletions and substitutions of characters.
All distances are computed, bit-parallel: one bit a character of a query, one lane a
query, along a walk over the trie of the candidates, so that equal beginnings are
compared once.

Shapes: Q queries, P queries of a block, C candidates, W words of 32 characters, A
characters, K nodes of the trie, D its depth.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.io.kept import kept

BLOCK = 8192  # queries that are compared at once
WORD = 32  # characters of a query in one integer
FAR = np.iinfo(np.int32).max
UNKNOWN = "\ud800"  # in no token: what is no UTF-8 is read as \udc80 to \udcff


class Nearest(NamedTuple):
    """For each query a candidate at the least distance; the first of several."""

    candidate: np.ndarray  # [Q] int32; -1 for an empty query, and without candidates
    distance: np.ndarray  # [Q] int32, characters to change; -1 likewise


class _Trie(NamedTuple):
    """The candidates' characters in order, each behind the one before it."""

    depth: np.ndarray  # [K] int32, from 1
    symbol: np.ndarray  # [K] int32, the code point
    found: np.ndarray  # [K] int32, the candidate that ends here; -1 for none


def nearest(queries: Sequence[bytes], candidates: Sequence[bytes]) -> Nearest:
    """The candidate with the least edit distance to each query.

        index[q] = argmin_c levenshtein(queries[q], candidates[c])

    in characters; a byte that is part of none counts as one. Empty candidates (special
    tokens, see `collab_jax.io.tokenizer.token_bytes`) are not compared.

    Args:
      queries: Q byte strings.
      candidates: C byte strings.

    Source: MinED of FuseLLM, arXiv 2401.10491. Distances by bit vectors: Myers 1999,
    J. ACM 46(3); in words: Hyyro 2003.

    >>> found = nearest([b"colour", b"c", b""], [b"d", b"cool", b"color"])
    >>> found.candidate.tolist(), found.distance.tolist()
    ([2, 0, -1], [1, 1, -1])
    """
    index = np.full(len(queries), -1, np.int32)
    distance = np.full(len(queries), -1, np.int32)
    first: dict[str, int] = {}
    for c, text in enumerate(candidates):
        if text:
            first.setdefault(_characters(text), c)
    asked: dict[str, list[int]] = {}
    alphabet = set("".join(first))
    for q, text in enumerate(queries):
        word = _characters(text)
        if word in first:
            index[q], distance[q] = first[word], 0
        elif word and first:
            # characters that no candidate has are alike: they match nothing
            word = "".join(x if x in alphabet else UNKNOWN for x in word)
            asked.setdefault(word, []).append(q)
    if asked:
        words = sorted(asked, key=lambda word: (_words(word), word))
        found = _compare(words, _trie(first))
        for word, c, d in zip(words, *found, strict=True):
            index[asked[word]], distance[asked[word]] = c, d
    return Nearest(index, distance)


def complete(
    known: np.ndarray,
    queries: Sequence[bytes],
    candidates: Sequence[bytes],
    keep: bool = False,
) -> np.ndarray:
    """A map of tokens, completed by edit distance where it says nothing.

    With `known = where(bridge.shared(), bridge.spelling[:, 0], -1)` it is a member's
    token for every token of the text, for `lift.borrow`; with `known = bridge.pivot`
    and the two exchanged it is a home for every token of the member, for `lift.carry`.

    Args:
      known: `[Q]` int, the candidate that a query stands for; -1 where none.
      queries: Q byte strings; an empty one keeps its -1.
      candidates: C byte strings.
      keep: keep the result on disk, and read it from there the next time.

    Returns:
      `[Q]` int32.

    Raises:
      ValueError: for a map of another size, or to candidates that are not there.

    >>> complete(np.array([1, -1]), [b"<s>", b"ab"], [b"abc", b"", b"xy"]).tolist()
    [1, 0]
    """
    known = np.asarray(known, np.int32)
    if known.shape != (len(queries),) or (known >= len(candidates)).any():
        raise ValueError(
            f"a map of shape {known.shape} with entries up to {known.max(initial=-1)}: "
            f"[{len(queries)}] is expected, one entry a query, below {len(candidates)}"
        )
    missing = [t if i < 0 else b"" for i, t in zip(known, queries, strict=True)]
    if not keep:
        return np.where(known < 0, nearest(missing, candidates).candidate, known)
    made_of = [known.tobytes(), str(len(queries)).encode(), *missing, *candidates]
    found = kept(
        "mined-1", made_of, lambda: {"index": complete(known, queries, candidates)}
    )
    return found["index"]


def _characters(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def _words(word: str) -> int:
    return -(-len(word) // WORD)


def _codes(words: Sequence[str]) -> np.ndarray:
    """Code points, one after the other."""
    joined = "".join(words).encode("utf-32-le", "surrogatepass")
    return np.frombuffer(joined, np.uint32).astype(np.int32)


def _trie(first: dict[str, int]) -> _Trie:
    depth, found, kept, before = list[int](), list[int](), list[str](), ""
    for word in sorted(first):
        shared = 0
        for one, other in zip(word, before, strict=False):
            if one != other:
                break
            shared += 1
        depth += range(shared + 1, len(word) + 1)
        found += [-1] * (len(word) - shared - 1) + [first[word]]
        kept.append(word[shared:])
        before = word
    return _Trie(np.array(depth, np.int32), _codes(kept), np.array(found, np.int32))


def _compare(words: list[str], trie: _Trie) -> tuple[np.ndarray, np.ndarray]:
    """Candidate and distance for words in the order of their length in integers."""
    count = np.array([_words(word) for word in words])
    best, least = [], []
    for w in np.unique(count):
        group = [words[i] for i in np.flatnonzero(count == w)]
        width = min(BLOCK, 1 << (len(group) - 1).bit_length())
        for start in range(0, len(group), width):
            block = group[start : start + width]
            found = _walk(*_matches(block, width, int(w), trie.symbol), trie)
            best.append(np.asarray(found[0])[: len(block)])
            least.append(np.asarray(found[1])[: len(block)])
    return np.concatenate(best), np.concatenate(least)


def _matches(
    block: list[str], width: int, words: int, symbols: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each character stands in each query, `[A, W, P]` bits; sizes `[P]`; and
    the row of each of the trie's characters, `[K]`, 0 for one that no query has."""
    size = np.array([len(word) for word in block])
    codes = _codes(block)
    alphabet, row = np.unique(codes, return_inverse=True)
    rows = 1 << len(alphabet).bit_length()  # few sizes, so few programs
    bits = np.zeros((rows, words, width), np.uint32)
    at = np.arange(len(codes)) - np.repeat(np.cumsum(size) - size, size)
    where = row + 1, at // WORD, np.repeat(np.arange(len(block)), size)
    np.bitwise_or.at(bits, where, np.uint32(1) << (at % WORD).astype(np.uint32))
    place = np.minimum(np.searchsorted(alphabet, symbols), len(alphabet) - 1)
    symbol = np.where(alphabet[place] == symbols, place + 1, 0).astype(np.int32)
    return bits, np.pad(size, (0, width - len(size))).astype(np.int32), symbol


def _walk(bits, size, symbol, trie: _Trie):
    return _search(
        bits, size, symbol, trie.depth, trie.found, deepest=int(trie.depth.max())
    )


@functools.partial(jax.jit, static_argnames="deepest")
def _search(bits, size, symbol, depth, found, *, deepest: int):
    """The first candidate at the least distance, and the distance, `[P]` each.

    Levels of the trie are columns of the table of distances. A column is kept as the
    signs of its vertical differences (`up` +1, `down` -1) and its last value.
    """
    words, width = bits.shape[1:]
    last = jnp.uint32(1) << ((size - 1) % WORD).astype(jnp.uint32)

    def column(up, down, score, match):
        """The next column, for one more character of the candidate."""
        ups, downs = [], []
        rise, fall = jnp.uint32(1), jnp.uint32(0)  # the row above: it counts characters
        for w in range(words):
            reach = match[w] | down[w]
            here = match[w] | fall
            carried = (((here & up[w]) + up[w]) ^ up[w]) | here
            more = down[w] | ~(carried | up[w])  # horizontal differences, +1
            less = up[w] & carried  # and -1
            if w == words - 1:
                score += ((more & last) != 0).astype(jnp.int32)
                score -= ((less & last) != 0).astype(jnp.int32)
            next_rise, next_fall = more >> (WORD - 1), less >> (WORD - 1)
            more, less = (more << 1) | rise, (less << 1) | fall
            ups.append(less | ~(reach | more))
            downs.append(more & reach)
            rise, fall = next_rise, next_fall
        return jnp.stack(ups), jnp.stack(downs), score

    def step(carry, node):
        levels, best, least = carry
        level, symbol, c = node
        above = [jax.lax.dynamic_index_in_dim(x, level - 1, 0, False) for x in levels]
        match = jax.lax.dynamic_index_in_dim(bits, symbol, 0, False)
        up, down, score = column(above[0], above[1], above[2], match)
        levels = tuple(
            jax.lax.dynamic_update_index_in_dim(x, new, level, 0)
            for x, new in zip(levels, (up, down, score), strict=True)
        )
        nearer = (c >= 0) & ((score < least) | ((score == least) & (c < best)))
        best, least = jnp.where(nearer, c, best), jnp.where(nearer, score, least)
        return (levels, best, least), None

    start = jnp.zeros((deepest + 1, words, width), jnp.uint32)
    scores = jnp.zeros((deepest + 1, width), jnp.int32).at[0].set(size)
    levels = start.at[0].set(jnp.uint32(0xFFFFFFFF)), start, scores
    nothing = jnp.full(width, -1, jnp.int32), jnp.full(width, FAR, jnp.int32)
    carry, _ = jax.lax.scan(step, (levels, *nothing), (depth, symbol, found))
    return carry[1:]
