"""Bits a byte of held-out texts and told facts, method by method.

A law that gives a token probability 0 would need infinitely many bits: a share `FLOOR`
of the first model's own law is mixed into it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from joining.data import Text
from joining.report import between

from collab_jax import uncertainty
from collab_jax.uncertainty import Interval

WEIGHTS = (0.25, 0.5, 0.75)  # SmolLM2's
FLOOR = 0.01
ALONE = "SmolLM2 alone", "Gemma alone", "Gemma, spelled"


class Held(NamedTuple):
    """What every method says of the held-out texts and of the facts."""

    groups: list[str]  # of each text
    sizes: np.ndarray  # bytes of each
    bits: dict[str, np.ndarray]  # of each text, by method
    forbidden: dict[str, int]  # tokens of probability 0
    right: dict[str, np.ndarray]  # whether each fact is told from its false form

    def a_byte(self, name: str, where: Any = slice(None)) -> float:
        """Bits a byte, over some of the texts."""
        return float(self.bits[name][where].sum() / self.sizes[where].sum())

    def gap(self, first: str, second: str) -> Interval:
        """Bits a byte of the first less those of the second."""
        rows = (self.bits[name] / self.sizes.mean() for name in (first, second))
        return between(*rows)


def held(found: dict[str, Any], texts: Sequence[Text]) -> Held:
    """Reads what was measured; a law with tokens of probability 0 has the floor."""
    some = [text for text in texts if text.group != "facts"]
    own, asked = (
        {
            name: [np.array([*map(float, row.split())]) for row in rows]
            for name, rows in found["logprob"][what].items()
        }
        for what in ("held out", "facts")
    )
    bits, dead = {}, {}
    for name, rows in own.items():
        dead[name] = sum(int((~np.isfinite(row)).sum()) for row in rows)
        if dead[name]:  # the same tokens as the first member's
            rows = [
                np.logaddexp(math.log1p(-FLOOR) + row, math.log(FLOOR) + one)
                for row, one in zip(rows, own[ALONE[0]], strict=True)
            ]
        bits[name] = -np.array([row.sum() for row in rows]) / math.log(2)
    right = {}
    for name, rows in asked.items():
        both = np.array([row.sum() for row in rows]).reshape(-1, 2)
        right[name] = both[:, 0] > both[:, 1]
    sizes = np.array([len(text.wanted.encode()) for text in some])
    return Held([text.group for text in some], sizes, bits, dead, right)


def fitted(seen: Held, name: str) -> None:
    """Adds a method at the weight that is best on the other half of the texts."""
    of = [f"{name}, {w:g}" for w in WEIGHTS]
    even = np.arange(len(seen.sizes)) % 2 == 0
    bits = np.zeros(len(seen.sizes))
    for half in (even, ~even):
        rest = ~half if half.sum() < len(half) else half
        best = min(of, key=lambda way: seen.a_byte(way, rest))
        bits[half] = seen.bits[best][half]
    seen.bits[f"{name}, fitted"] = bits
    seen.forbidden[f"{name}, fitted"] = max(seen.forbidden[way] for way in of)


def table(seen: Held) -> list[dict[str, Any]]:
    """One line for each method: bits a byte of each group, and choices."""
    best = min(ALONE[:2], key=seen.a_byte)
    lines = []
    for name in seen.bits:
        line: dict[str, Any] = {"method": name, "forbidden": seen.forbidden[name]}
        for group in dict.fromkeys(seen.groups):
            at = np.array([own == group for own in seen.groups])
            line[group] = seen.a_byte(name, at)
        gain = seen.gap(best, name)
        line |= {"all": seen.a_byte(name), "gain": gain.estimate}
        line["interval"] = [round(gain.low, 3), round(gain.high, 3)]
        if name in seen.right:
            count = seen.right[name].sum()
            interval = uncertainty.wilson(int(count), len(seen.right[name]))
            line["facts"] = interval.estimate
            line["facts interval"] = [round(interval.low, 3), round(interval.high, 3)]
        lines.append(line)
    return lines
