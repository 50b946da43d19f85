"""MinED: a token that another vocabulary lacks is matched with the most similar one.

Similar is what takes the fewest insertions, deletions and substitutions of characters.
All distances are computed, bit-parallel: one bit a character of a query, one lane a
query, along a walk over the trie of the candidates, so that equal beginnings are
compared once. Characters that only one side has match nothing, so they are all alike:
what a Latin vocabulary asks of a larger one never walks its other scripts. Lanes are
as wide as the queries need, 8, 16 or 32 bits.

Shapes: Q queries, P queries of a block, C candidates, W integers of 8, 16 or 32
characters, A characters, K nodes of the trie, D its depth.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.io.kept import kept

BLOCK = 8192  # queries that are compared at once
ALIGNED = 32  # their number is a multiple: few sizes, so few programs
LANES = np.uint8, np.uint16, np.uint32  # the integers that hold a query's characters
WORD = 32  # characters in the widest
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
    words = [_characters(text) for text in queries]
    missing = [q for q, word in enumerate(words) if word and word not in first]
    for q, word in enumerate(words):
        if word in first:
            index[q], distance[q] = first[word], 0
    if not missing or not first:
        return Nearest(index, distance)
    common = set("".join(words[q] for q in missing)) & set("".join(first))
    asked: dict[str, list[int]] = {}
    for q in missing:
        asked.setdefault(_alike(words[q], common), []).append(q)
    apart: dict[str, int] = {}
    for word, c in first.items():
        apart.setdefault(_alike(word, common), c)
    sought = list(asked)
    found = _compare(sought, _trie(apart))
    for word, c, d in zip(sought, *found, strict=True):
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


def _alike(word: str, common: set[str]) -> str:
    """With one sign for all characters that match nothing, on either side."""
    return "".join(x if x in common else UNKNOWN for x in word)


def _lanes(size: int) -> tuple[int, type[np.unsignedinteger]]:
    """How many integers hold as many characters, and which."""
    fits = (lane for lane in LANES if size <= np.iinfo(lane).bits)
    return -(-size // WORD), next(fits, LANES[-1])


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
    """Candidate and distance for each word."""
    groups: dict[tuple[int, type[np.unsignedinteger]], list[int]] = {}
    for i, word in enumerate(words):
        groups.setdefault(_lanes(len(word)), []).append(i)
    best, least = np.empty((2, len(words)), np.int32)
    for (count, lane), members in groups.items():
        width = min(BLOCK, -(-len(members) // ALIGNED) * ALIGNED)
        for start in range(0, len(members), width):
            block = members[start : start + width]
            asked = [words[i] for i in block]
            found = _walk(*_matches(asked, width, count, lane, trie.symbol), trie)
            best[block] = np.asarray(found[0])[: len(block)]
            least[block] = np.asarray(found[1])[: len(block)]
    return best, least


def _matches(
    block: list[str],
    width: int,
    words: int,
    lane: type[np.unsignedinteger],
    symbols: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each character stands in each query, `[A, W, P]` bits; sizes `[P]`; and
    the row of each of the trie's characters, `[K]`, 0 for one that no query has."""
    size = np.array([len(word) for word in block])
    codes = _codes(block)
    alphabet, row = np.unique(codes, return_inverse=True)
    rows = 1 << len(alphabet).bit_length()  # few sizes, so few programs
    word = np.iinfo(lane).bits
    bits = np.zeros((rows, words, width), lane)
    at = np.arange(len(codes)) - np.repeat(np.cumsum(size) - size, size)
    where = row + 1, at // word, np.repeat(np.arange(len(block)), size)
    np.bitwise_or.at(bits, where, lane(1) << (at % word).astype(lane))
    bits[1 : len(alphabet) + 1][alphabet == ord(UNKNOWN)] = 0  # it matches nothing
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
    signs of its vertical differences (`up` +1, `down` -1); its first value is its
    level, so its last, the distance, is that and all differences.
    """
    words, width = bits.shape[1:]
    lane, word = bits.dtype, jnp.iinfo(bits.dtype).bits
    one, zero = jnp.ones((), lane), jnp.zeros((), lane)
    at = jnp.arange(words)[:, None] * word
    used = jnp.where(size >= at + word, ~zero, (one << (size - at).astype(lane)) - one)
    used = jnp.where(size > at, used, zero)  # [W, P], the bits of characters

    def column(up, down, match):
        """The next column, for one more character of the candidate."""
        ups, downs = [], []
        rise, fall = one, zero  # the row above: it counts characters
        for w in range(words):
            reach = match[w] | down[w]
            here = match[w] | fall
            carried = (((here & up[w]) + up[w]) ^ up[w]) | here
            more = down[w] | ~(carried | up[w])  # horizontal differences, +1
            less = up[w] & carried  # and -1
            next_rise, next_fall = more >> (word - 1), less >> (word - 1)
            more, less = (more << 1) | rise, (less << 1) | fall
            ups.append(less | ~(reach | more))
            downs.append(more & reach)
            rise, fall = next_rise, next_fall
        return jnp.stack([jnp.stack(ups), jnp.stack(downs)])

    def step(carry, node):
        levels, best, least = carry
        level, symbol, c = node
        up, down = jax.lax.dynamic_index_in_dim(levels, level - 1, 0, False)
        match = jax.lax.dynamic_index_in_dim(bits, symbol, 0, False)
        new = column(up, down, match)
        levels = jax.lax.dynamic_update_index_in_dim(levels, new, level, 0)
        # read from there, or the levels would be copied
        up, down = jax.lax.dynamic_index_in_dim(levels, level, 0, False) & used
        up, down = jax.lax.population_count(up), jax.lax.population_count(down)
        score = level + up.sum(0, dtype=jnp.int32) - down.sum(0, dtype=jnp.int32)
        nearer = (c >= 0) & ((score < least) | ((score == least) & (c < best)))
        best, least = jnp.where(nearer, c, best), jnp.where(nearer, score, least)
        return (levels, best, least), None

    levels = jnp.zeros((deepest + 1, 2, words, width), lane).at[0, 0].set(~zero)
    nothing = jnp.full(width, -1, jnp.int32), jnp.full(width, FAR, jnp.int32)
    carry, _ = jax.lax.scan(step, (levels, *nothing), (depth, symbol, found))
    return carry[1:]
