"""Token lists as rows of equal length, and rows as shuffled batches.

Shapes: N rows of data, B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of text, and how much each token counts as something to predict."""

    tokens: Any  # [B, T] int32
    weights: Any  # [B, T] float32; 0 for prompts and padding; column 0 is never read


def pack(
    texts: Sequence[Sequence[int]],
    length: int,
    weights: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """Joins texts to one stream and cuts it into rows, without padding but in the last.

    Neighbouring rows share one token, so that every token but the first is predicted
    exactly once. The first token of a text has weight 0: what stands before it belongs
    to another text. Texts of one row do see each other.

    Args:
      texts: token ids, an end-of-text token included where there is one.
      length: T, tokens a row.
      weights: one number a token; None is 1 for each.

    Returns:
      Numpy arrays `[N, T]`.

    Raises:
      ValueError: where there is nothing to predict, or texts and weights differ.

    >>> pack([[1, 2, 3], [4, 5]], length=3).tokens.tolist()
    [[1, 2, 3], [3, 4, 5]]
    >>> pack([[1, 2, 3], [4, 5]], length=3).weights.tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    """
    stream, counts = _flat(texts, length, weights)
    starts = range(0, max(len(stream) - 1, 1), length - 1)
    return _batch(
        [stream[s : s + length] for s in starts],
        [counts[s : s + length] for s in starts],
        length,
    )


def rows(
    texts: Sequence[Sequence[int]],
    length: int,
    weights: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """One text a row, cut at `length` and padded on the right with weight 0.

    Args:
      texts: token ids.
      length: T, tokens a row.
      weights: one number a token, 0 for a prompt that shall not be learned; None is 1
        for each.

    Returns:
      Numpy arrays `[N, T]`.

    Raises:
      ValueError: where there is nothing to predict, or texts and weights differ.

    >>> rows([[1, 2, 3, 4], [5, 6]], length=3).tokens.tolist()
    [[1, 2, 3], [5, 6, 0]]
    """
    _flat(texts, length, weights)
    if weights is None:
        weights = [[1.0] * len(text) for text in texts]
    return _batch([t[:length] for t in texts], [w[:length] for w in weights], length)


def batches(data: Any, size: int, seed: int, epochs: int = 1) -> Iterator[Any]:
    """Shuffled batches of whole rows, each epoch in another order given by the seed.

    Args:
      data: rows `[N, T]` from `pack` or `rows`, or another NamedTuple of arrays `[N,
        ...]`, of which `tokens` is one.
      size: B; the rows left over at an epoch's end are filled with weight 0.
      seed: of the order.
      epochs: how often each row is seen.

    >>> data = rows([[1, 2], [3, 4], [5, 6]], length=2)
    >>> [batch.tokens.shape for batch in batches(data, 2, seed=0)]
    [(2, 2), (2, 2)]
    """
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(data.tokens))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            fill = (0, size - len(chosen))
            yield type(data)(
                *(
                    np.pad(leaf[chosen], (fill, *((0, 0),) * (leaf.ndim - 1)))
                    for leaf in data
                )
            )


def _flat(texts, length, weights) -> tuple[list[int], list[float]]:
    """The stream and its weights, after the checks that `pack` and `rows` share."""
    if length < 2:
        raise ValueError(f"length {length}: a row needs at least 2 tokens")
    if weights is None:
        weights = [[1.0] * len(text) for text in texts]
    sizes = [len(t) for t in texts], [len(w) for w in weights]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"texts of {sizes[0][:8]} tokens with weights for {sizes[1][:8]}: one "
            "weight a token is expected"
        )
    stream = [token for text in texts for token in text]
    counts = [w for row in weights for w in [0.0, *row[1:]][: len(row)]]
    if not any(counts):
        raise ValueError(
            f"{len(texts)} texts of {len(stream)} tokens hold nothing to predict: all "
            "texts are shorter than 2 tokens, or all weights are 0"
        )
    return stream, counts


def _batch(tokens, weights, length: int) -> Batch:
    filled = Batch(
        np.zeros((len(tokens), length), np.int32),
        np.zeros((len(tokens), length), np.float32),
    )
    for n, (row, counts) in enumerate(zip(tokens, weights, strict=True)):
        filled.tokens[n, : len(row)] = row
        filled.weights[n, : len(row)] = counts
    return filled
