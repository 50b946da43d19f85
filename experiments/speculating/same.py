"""Whether two greedy texts are the same, and if not, whether by a tie."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from collab_jax.lm import LM

TIE = 1e-4  # two candidates closer than this may come in either order


def packed(rows: Sequence[Sequence[int]]) -> list[str]:
    """Token ids for a file that people look at: a line for each row."""
    return [" ".join(map(str, row)) for row in rows]


def unpacked(rows: Sequence[str]) -> list[list[int]]:
    """What `packed` made lines of."""
    return [[int(token) for token in row.split()] for row in rows]


def part(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first step at which two rows differ."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other))
    )


def margins(
    lm: LM, params: Any, width: int = 64
) -> Callable[[Sequence[int], Sequence[int]], float]:
    """A function of a prompt and what follows: how far the two best next tokens lie
    apart, in the law of an LM.

    Args:
      lm: the target; warped by nothing that leaves one token alone.
      params: its parameters.
      width: texts are padded to a multiple of it, for few programs.
    """

    @jax.jit
    def read(params, tokens, last):
        state = lm.init(params, 1, tokens.shape[1])
        out, _ = lm.extend(params, state, tokens)
        return out.logits[0, last]

    def margin(prompt: Sequence[int], new: Sequence[int]) -> float:
        ids = np.array([[*prompt, *new]])
        tokens = np.pad(ids, ((0, 0), (0, -ids.shape[1] % width)))
        best = np.sort(np.asarray(read(params, tokens, ids.shape[1] - 1)))[-2:]
        return float(best[1] - best[0])

    return margin


def name_of(rows: Sequence[tuple[str, int]]) -> str:
    """Rows of a batch as a key of a report."""
    return ", ".join(f"{group} {row}" for group, row in rows)


def differences(
    rows: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    margin: Callable[[Sequence[int], Sequence[int]], float],
) -> list[dict[str, Any]]:
    """Where rows differ: the step, the margin there, and whether it is a tie."""
    apart = []
    for row, prompt, one, other in zip(rows, prompts, found, expected, strict=True):
        step = part(one, other)
        if step is not None:
            gap = margin(prompt, other[:step])
            apart.append({"row": row, "step": step, "margin": gap, "tie": gap < TIE})
    return apart
