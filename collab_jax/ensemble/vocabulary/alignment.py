"""Tokens of two vocabularies matched by their output embeddings, on the host.

Shapes: U tokens of a member, V of the text's model, X and Y widths of their embeddings,
K matches of a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.io.kept import kept
from collab_jax.translate import Bridge

CELLS = 1 << 26  # similarities that are computed at once


class Alignment(NamedTuple):
    """The tokens of the text that each token of a member stands for."""

    match: jax.Array  # [U, K] int32
    score: jax.Array  # [U, K] float32, how surely; 0 for no match


def align(
    source: np.ndarray,
    target: np.ndarray,
    pairs: np.ndarray,
    *,
    matches: int = 10,
    least: float = 0.1,
    fixed: np.ndarray | None = None,
    keep: bool = False,
) -> Alignment:
    """Matches tokens whose output embeddings lie near, once a rotation aligns both.

    The rows, made unit, centred and made unit again, are rotated so that the pairs lie
    as near as they can (orthogonal Procrustes): with `A S B' = svd(x[pairs]' y[pairs])`
    the rotations are A and B. The score is CSLS with a neighbourhood of 1,

        score[u, v] = 2 cos(u, v) - max_u' cos(u', v)

    so that a token of the text that lies near everything matches little. Each token of
    the member keeps its best matches, those below `least` are dropped, and a token with
    more than 5 whose scores are all the same (standard deviation <= 0.01) stands for
    nothing.

    Args:
      source: `[U, X]` output embeddings of the member.
      target: `[V, Y]` of the text's model.
      pairs: `[P, 2]` ints (u, v) of tokens that both have, as `exact_pairs` gives.
      matches: K.
      least: score below which a match is dropped.
      fixed: `[F, 2]` ints (u, v): tokens, such as special ones, that stand for one
        token with score 1, whatever their embeddings.
      keep: keep the result on disk, and read it from there the next time.

    Raises:
      ValueError: for no pairs, or pairs of tokens that are not there.

    Source: EVA, arXiv 2404.09492; its authors align with other software, whose
    weighting of directions this leaves out. CSLS: arXiv 1710.04087.

    >>> x = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> turned = x[:, [2, 0, 1]]  # the same tokens in other coordinates
    >>> pairs = np.array([[0, 0], [1, 1], [2, 2]])
    >>> found = align(x, turned, pairs, matches=1)
    >>> found.match[:, 0].tolist(), found.score[:, 0].tolist()
    ([0, 1, 2], [1.0, 1.0, 1.0])
    """
    source, target = (np.asarray(e, np.float32) for e in (source, target))
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    fixed = np.zeros((0, 2), np.int64) if fixed is None else np.asarray(fixed, np.int64)
    sizes = len(source), len(target)
    for name, some in (("pairs", pairs), ("fixed", fixed)):
        if (some < 0).any() or (some >= sizes).any():
            raise ValueError(
                f"{name} up to {some.max(0).tolist()}: tokens below {[*sizes]} are "
                "expected, one of the member's and one of the text's each"
            )
    if not len(pairs):
        raise ValueError("no pairs of tokens that both have: nothing to align with")

    def make():
        index, score = _matched(source, target, pairs, min(matches, sizes[1]))
        score = _meaningful(score, least)
        index[fixed[:, 0], 0], score[fixed[:, 0]] = fixed[:, 1], 0.0
        score[fixed[:, 0], 0] = 1.0
        return {"index": index, "score": score}

    if keep:
        numbers = repr((sizes, source.shape, target.shape, matches, least)).encode()
        parts = (source.tobytes(), target.tobytes(), pairs.tobytes(), fixed.tobytes())
        found = kept("eva-1", [numbers, *parts], make)
    else:
        found = make()
    return Alignment(jnp.asarray(found["index"]), jnp.asarray(found["score"]))


def exact_pairs(bridge: Bridge) -> np.ndarray:
    """Tokens that are the same in both vocabularies, (member's, text's), `[P, 2]`.

    Args:
      bridge: from the tokens of the text to the member's.

    >>> from collab_jax.translate import from_spellings
    >>> exact_pairs(from_spellings([[1], [0, 1], [0]], 3)).tolist()
    [[1, 0], [0, 2]]
    """
    shared = np.flatnonzero(np.asarray(bridge.shared()))
    return np.stack([np.asarray(bridge.spelling)[shared, 0], shared], axis=1)


def _matched(source, target, pairs, matches: int):
    """Best matches by CSLS, `[U, K]` ints and scores."""
    x, y = _directions(source), _directions(target)
    product = x[pairs[:, 0]].T.astype(np.float64) @ y[pairs[:, 1]]
    left, _, right = np.linalg.svd(product, full_matrices=False)
    x, y = x @ left.astype(np.float32), jnp.asarray(y @ right.T.astype(np.float32))
    block = max(1, min(len(x), CELLS // len(y)))
    pieces = [x[i : i + block] for i in range(0, len(x), block)]
    # the last is filled up with a row that is there, which changes no maximum
    short = block - len(pieces[-1])
    pieces[-1] = np.pad(pieces[-1], ((0, short), (0, 0)), mode="edge")
    peak = jnp.full(len(y), -jnp.inf)
    for piece in pieces:
        peak = _peak(peak, piece, y)
    found = [_best(piece, y, peak, matches) for piece in pieces]
    score, index = (np.concatenate([np.asarray(f[i]) for f in found]) for i in range(2))
    return index[: len(x)].astype(np.int32), score[: len(x)]


def _directions(rows: np.ndarray) -> np.ndarray:
    def unit(rows):
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(length == 0, 1, length)

    rows = unit(rows)
    return unit(rows - rows.mean(0))


@jax.jit
def _peak(peak, x, y):
    return jnp.maximum(peak, _cosines(x, y).max(0))


@functools.partial(jax.jit, static_argnames="matches")
def _best(x, y, peak, matches: int):
    return jax.lax.top_k(2 * _cosines(x, y) - peak, matches)


def _cosines(x, y):
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def _meaningful(score: np.ndarray, least: float) -> np.ndarray:
    """Scores that say something; others are 0."""
    kept = score >= least
    count = kept.sum(1)
    mean = np.where(kept, score, 0).sum(1) / np.maximum(count, 1)
    spread = np.where(kept, (score - mean[:, None]) ** 2, 0).sum(1)
    flat = (count > 5) & (np.sqrt(spread / np.maximum(count, 1)) <= 0.01)
    return np.where(kept & ~flat[:, None], score, 0).astype(np.float32)
