"""Losses of a model, of its tuned forms and of proxy-tuned ones, row by row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.lm import LM
from collab_jax.packing import Batch

ALPHAS = (-1.0, 0.0, 0.5, 1.0, 1.5)
ROWS = 12  # that are read at once, at most
SMALL, WHOLE = "small, tuned", "whole, tuned"
OTHER = "proxy 1, offset of another task"


def losses(logprob: jax.Array, batch: Batch) -> list[float]:
    """Nats an answer token of each row."""
    weights = np.asarray(batch.weights, np.float64)
    logprob = np.asarray(logprob, np.float64)[: len(weights)]
    nats = -(logprob * weights).sum(-1)
    return (nats / weights.sum(-1)).round(5).tolist()


class Meter(NamedTuple):
    """What is compiled once for all tasks and seeds."""

    lms: tuple[LM, LM]  # whole and small
    params: tuple[Any, Any]  # before tuning
    read: Any  # `score.score`
    sweep: Any  # of the composite, over alpha
    rows: int  # that are read at once

    def alone(self, which: int, params: Any, test: Batch) -> list[float]:
        """Of the whole model or the small one."""
        found = []
        for some in pieces(test, self.rows):
            tokens, length = read_of(some, self.rows)
            lm = self.lms[which]
            logprob = self.read(lm, params, tokens, length, 32).logprob
            found += losses(logprob, some)
        return found

    def proxies(self, expert: Any, test: Batch) -> dict[str, list[float]]:
        """Of the composite at every alpha."""
        params = self.params[0], expert, self.params[1]
        found: dict[str, list[float]] = {proxy(alpha): [] for alpha in ALPHAS}
        for some in pieces(test, self.rows):
            given = read_of(some, self.rows)
            swept_ = self.sweep(jnp.array(ALPHAS), (), params, *given)
            for alpha, logprob in zip(ALPHAS, swept_, strict=True):
                found[proxy(alpha)] += losses(logprob, some)
        return found


def measure(
    meter: Meter,
    test: Batch,
    expert: Any,
    whole: Any,
    other: Any,
    rows: dict[str, list[float]],
    save: Callable[[], None],
) -> None:
    """Nats of every row for what is missing.

    Args:
      meter: how.
      test: rows.
      expert: the small model, tuned on the task.
      whole: the whole model, tuned on it.
      other: the small model, tuned on another task.
      rows: what is known, by name.
      save: called after each.
    """
    ways: dict[str, Callable[[], dict[str, list[float]]]] = {
        "base": lambda: {"base": meter.alone(0, meter.params[0], test)},
        "small": lambda: {"small": meter.alone(1, meter.params[1], test)},
        SMALL: lambda: {SMALL: meter.alone(1, expert, test)},
        WHOLE: lambda: {WHOLE: meter.alone(0, whole, test)},
        proxy(1): lambda: meter.proxies(expert, test),
        OTHER: lambda: {OTHER: meter.proxies(other, test)[proxy(1)]},
    }
    for name, way in ways.items():
        if name not in rows:
            rows |= way()
            save()


def proxy(alpha: float) -> str:
    """The name of the composite."""
    return f"proxy {alpha:g}"


def pieces(test: Batch, rows: int) -> list[Batch]:
    """Some rows at a time, for memory."""
    count = len(test.tokens)
    return [Batch(*(x[i : i + rows] for x in test)) for i in range(0, count, rows)]


def read_of(some: Batch, rows: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and lengths, filled up to so many rows: one program for all tasks."""
    size = some.tokens.shape[1]
    filled = np.resize(some.tokens, (rows, size))
    return jnp.asarray(filled), jnp.full(rows, size)
