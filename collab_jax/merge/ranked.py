"""The k-th largest number of a whole model, exactly: digit by digit, by surveys.

Each survey counts how often each value of a digit occurs among the numbers whose higher
digits are those that were found; counts add up over leaves, so the model may stream
through memory, and over devices.

Shapes: X arrays of a stack whose numbers are ranked, R ranks of each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.merge import magnitude
from collab_jax.merge.magnitude import Digit
from collab_jax.merge.stack import Stack, Survey


def digits(bits: int) -> tuple[Digit, ...]:
    """How numbers of so many bits are cut, the highest first.

    Two digits are two passes over the model. A TPU takes 60 cycles to add an entry to
    one of many bins, in the schedules of its compiler, and a fiftieth of one to compare
    it: with digits of two bits there are sixteen passes, as fast as the memory. (File
    to file, a merge on such a host therefore reads its models sixteen times.)

    Args:
      bits: 31 or 32.

    >>> sum(digit.width for digit in digits(31))
    31
    """
    if jax.default_backend() != "tpu":
        return Digit(16, bits - 16), Digit(0, 16)
    few = magnitude.FEW_BITS
    ends = range(bits - 1 - (bits - 1) % few, -1, -few)
    return tuple(Digit(end, min(few, bits - end)) for end in ends)


def surveys(
    values: Callable[[Stack], Sequence[jax.Array]],
    ranks: Callable[[Any, int], Sequence[Any]],
    cut: Sequence[Digit],
) -> tuple[Survey, ...]:
    """As many surveys as digits, see the module.

    They must be the first of their transform; the fact of the last holds the numbers.

    Args:
      values: of a stack, X arrays of unsigned integers.
      ranks: of the histogram of an array's first digit and the number of entries of the
        model, R ranks; 1 is the largest.
      cut: from `digits`.

    Returns:
      The surveys. The fact of each is, for X arrays and R ranks, the digits so far as
      one uint32, and the rank among the numbers that begin so.

    >>> stack = Stack(jnp.zeros(3, jnp.uint32), (), (), jax.random.key(0))
    >>> facts = ()
    >>> for survey in surveys(lambda stack: [stack.base], lambda *_: [1], digits(31)):
    ...     summary = survey.ask(stack._replace(base=jnp.uint32([5, 7, 2])), "a", facts)
    ...     facts = (*facts, survey.settle(summary, facts, 3))
    >>> int(facts[-1][0][0][0])  # the largest
    7
    """

    def ask(n: int) -> Callable:
        def count(stack: Stack, name: str, facts: Any) -> Any:
            arrays = values(stack)
            if n == 0:
                return [[magnitude.histogram(x, cut[0])] for x in arrays]
            return [
                [magnitude.histogram(x, cut[n], jnp.uint32(found)) for found, _ in own]
                for x, own in zip(arrays, facts[n - 1], strict=True)
            ]

        return count

    def settle(n: int) -> Callable:
        def first(totals: Any, facts: Any, size: int) -> Any:
            return [
                [_next(0, counts, rank, 0) for rank in ranks(counts, size)]
                for (counts,) in totals
            ]

        def other(totals: Any, facts: Any, size: int) -> Any:
            return [
                [
                    _next(found, counts, rank, cut[n].width)
                    for counts, (found, rank) in zip(each, own, strict=True)
                ]
                for each, own in zip(totals, facts[n - 1], strict=True)
            ]

        return other if n else first

    return tuple(Survey(ask(n), settle(n)) for n in range(len(cut)))


def _next(found: Any, counts: Any, rank: Any, width: int) -> tuple[Any, Any]:
    """The digits so far with one more, and the rank that is left."""
    place, rank = magnitude.at_rank(counts, rank)
    if isinstance(place, jax.Array):
        found = jnp.asarray(found).astype(jnp.uint32)
        return (found << width) | place.astype(jnp.uint32), rank
    return np.uint32((int(found) << width) | int(place)), rank
