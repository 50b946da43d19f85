"""Averages that grow model by model, with any evaluator."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import tree


class Record(NamedTuple):
    """How a greedy soup came about."""

    order: tuple[int, ...]  # the models as they were tried, the best alone first
    scores: tuple[float, ...]  # of each model alone, as the models were given
    trials: tuple[float, ...]  # of the soup with the model, in the order of trial
    kept: tuple[bool, ...]  # whether it stayed, in the order of trial


def greedy_soup(
    models: Sequence[Any],
    evaluate: Callable[[Any], float],
    scores: Sequence[float] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Any, Record]:
    """Averages the models that do not make the average worse on held-out data.

    Models are tried from the best to the worst; one stays if the mean with it scores no
    less than the mean without. Beside the models, two more are in memory: the sum of
    those that stayed, in float32 (float64), and the mean that is evaluated.

    Args:
      models: N trees, or functions that load one (each is called twice).
      evaluate: params -> score, higher is better: an accuracy, or minus a loss.
      scores: of the models alone, where they are known.
      progress: called after every evaluation with how many are done, how many there
        will be, and the score.

    Returns:
      The mean, with the types of the first model; and how it came about.

    Raises:
      ValueError: without models, for models that differ, for a wrong number of scores,
        or for a score that is NaN.

    Source: model soups, arXiv 2203.05482.

    >>> models = [{"a": jnp.array([x])} for x in (1.0, 2.0, 9.0)]
    >>> mixed, record = greedy_soup(models, lambda p: -abs(float(p["a"][0]) - 1.6))
    >>> mixed["a"].tolist(), record.order, record.kept
    ([1.5], (1, 0, 2), (True, True, False))
    """
    if not models:
        raise ValueError("no model was given, at least one is expected")
    count, shapes, done = len(models), None, 0
    evaluations = count - 1 + (count if scores is None else 0)

    def load(n: int) -> Any:
        nonlocal shapes
        model = models[n]() if callable(models[n]) else models[n]
        found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
        shapes = shapes or found
        if gap := tree.difference(shapes, found):
            raise ValueError(
                f"model {n} has {gap[2]} at {gap[0]}, the first that was read has "
                f"{gap[1]}: equal trees are expected"
            )
        return model

    def rate(params: Any, what: str) -> float:
        nonlocal done
        score, done = float(evaluate(params)), done + 1
        if score != score:
            raise ValueError(f"the score of {what} is NaN: a number is expected")
        if progress is not None:
            progress(done, evaluations, score)
        return score

    if scores is None:
        scores = [rate(load(n), f"model {n}") for n in range(count)]
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} models: one each is needed")
    order = sorted(range(count), key=lambda n: -scores[n])
    first = load(order[0])
    summed = jax.tree.map(_wide, first)
    size, best, trials, kept = 1, scores[order[0]], [scores[order[0]]], [True]
    for n in order[1:]:
        model = load(n)
        trial = _mean_with(summed, model, size + 1)
        trials.append(rate(trial, f"the soup with model {n}"))
        kept.append(trials[-1] >= best)
        del trial  # before the next sum is made
        if kept[-1]:
            summed, size, best = _plus(summed, model), size + 1, trials[-1]
    params = _divided(summed, first, size)
    return params, Record(tuple(order), tuple(scores), tuple(trials), tuple(kept))


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.jit
def _plus(summed: Any, model: Any) -> Any:
    """Counters and other integers stay those of the first."""

    def plus(total, x):
        return total + x if jnp.issubdtype(total.dtype, jnp.inexact) else total

    return jax.tree.map(plus, summed, model)


@jax.jit
def _divided(summed: Any, like: Any, size) -> Any:
    def divided(total, x):
        whole = jnp.issubdtype(total.dtype, jnp.inexact)
        return (total / size).astype(x.dtype) if whole else total

    return jax.tree.map(divided, summed, like)


@jax.jit
def _mean_with(summed: Any, model: Any, size) -> Any:
    return _divided(_plus(summed, model), model, size)


def diwa_restricted(
    models: Sequence[Any], evaluate: Callable[[Any], float], **options: Any
) -> tuple[Any, Record]:
    """Diverse weight averaging, restricted: runs that do not hurt are averaged.

    Args:
      models: N runs, as in `greedy_soup`.
      evaluate: params -> score on held-out data of the *training* domains.
      **options: of `greedy_soup`.

    Source: arXiv 2205.09739, algorithm 1.

    >>> models = [{"a": jnp.array([x])} for x in (1.0, 2.0)]
    >>> diwa_restricted(models, lambda p: -abs(float(p["a"][0]) - 1.6))[1].kept
    (True, True)
    """
    return greedy_soup(models, evaluate, **options)
