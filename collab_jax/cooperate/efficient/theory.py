"""What speculation is worth: tokens per call, speed-up, and the best draft length.

A draft of K tokens, each accepted with probability a if all before it are, costs K
calls of the draft and one call of the target that is K + 1 tokens wide. Times are in
units of a call of the target on one token: c for a call of the draft, v(K) for the wide
call. Where memory is the limit v is 1; on a CPU it grows with K.

These are numbers on the host, not arrays.
"""

from collections.abc import Callable, Sequence

import numpy as np

Rates = float | Sequence[float] | np.ndarray


def _rates(acceptance: Rates, length: int) -> np.ndarray:
    """Acceptance of tokens 1 .. K; the last one known holds for those behind it."""
    rates = np.atleast_1d(np.asarray(acceptance, np.float64))
    if rates.size == 0 or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(
            f"acceptance = {acceptance}: probabilities in [0, 1] are expected, one for "
            "all tokens or one for each position"
        )
    if length < 0:
        raise ValueError(f"length = {length}: 0 or more drafted tokens are expected")
    return np.append(rates[:length], np.full(max(0, length - len(rates)), rates[-1]))


def _free(length: int) -> float:
    """A wide call costs what a narrow one does."""
    del length
    return 1.0


def expected_tokens(acceptance: Rates, length: int) -> float:
    """Expected tokens per call of the target: `1 + a_1 + a_1 a_2 + .. + a_1 .. a_K`.

    With one rate a this is `(1 - a^(K+1)) / (1 - a)`.

    Args:
      acceptance: a, or a_i for each position: the probability that a token is accepted
        if all before it are (`info.taken / info.tried`). Of drafts from q and token
        verification, `a = 1 - d(p, q)`.
      length: K, tokens drafted.

    Raises:
      ValueError: for a rate outside of [0, 1], or a negative length.

    Source: arXiv 2211.17192, equation 1.

    >>> expected_tokens(0.8, 4)
    3.3616
    """
    return float(1.0 + np.cumprod(_rates(acceptance, length)).sum())


def speedup(
    acceptance: Rates,
    length: int,
    cost: float,
    verification: Callable[[int], float] = _free,
) -> float:
    """How many times faster than one token a call: `E[tokens] / (K c + v(K))`.

    Args:
      acceptance: a, or a_i for each position.
      length: K, tokens drafted; 0 is plain decoding.
      cost: c, time of a call of the draft over that of the target.
      verification: v, from K to the time of the target on K + 1 tokens over that on
        one.

    Source: arXiv 2211.17192, theorem 3.8.

    >>> round(speedup(0.8, 6, 0.1), 2)
    2.47
    """
    return expected_tokens(acceptance, length) / (length * cost + verification(length))


def operations(acceptance: Rates, length: int, cost: float) -> float:
    """How many times the arithmetic of plain decoding: `(K c + K + 1) / E[tokens]`.

    Args:
      acceptance: a, or a_i for each position.
      length: K, tokens drafted.
      cost: c, operations of the draft over those of the target, for one token.

    Source: arXiv 2211.17192, theorem 3.11.

    >>> round(operations(0.8, 4, 0.1), 2)
    1.61
    """
    return (length * cost + length + 1) / expected_tokens(acceptance, length)


def draft_length(
    acceptance: Rates,
    cost: float,
    verification: Callable[[int], float] = _free,
    longest: int = 16,
) -> int:
    """The draft length of the best expected speed-up; 0 where plain decoding is best.

    Args:
      acceptance: a, or a_i for each position.
      cost: c, time of a call of the draft over that of the target.
      verification: v, from K to the time of the target on K + 1 tokens over that on
        one.
      longest: the longest draft considered.

    >>> draft_length(0.8, 0.1), draft_length(0.8, 0.1, lambda k: 1 + 0.25 * k)
    (6, 3)
    >>> draft_length(0.1, 0.5)
    0
    """
    lengths = range(longest + 1)
    return max(lengths, key=lambda k: speedup(acceptance, k, cost, verification))
