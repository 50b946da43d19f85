"""Fitting CombLM's weight to a few recorded laws of both models.

The loss is the mean of `-log p(token)` of the combination. A batch is some places of
some text; `record` makes batches of two LMs, and a file of recorded log-probs, of a
model behind an interface, serves as well. No batch is needed twice at the same time, so
they may come from a generator.

Shapes: M places of a batch, B rows, T tokens, V vocabulary, F inputs of f.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from collab_jax.cooperate.transfer.comblm import Combiner, Fitted, combined
from collab_jax.finetune import finite
from collab_jax.law import log_probs
from collab_jax.lm import LM, Out, Params
from collab_jax.score import FORBIDDEN, mean_over, read_together


class Recorded(NamedTuple):
    """What both models said at M places, and what stood there."""

    large: jax.Array  # [M, V] log-probs
    expert: jax.Array  # [M, V]
    tokens: jax.Array  # [M] int32
    weights: jax.Array  # [M], 0 for places that do not count


class Fit(NamedTuple):
    """What must survive between two steps."""

    fitted: Fitted
    optimizer: Any
    seen: jax.Array  # [] places whose inputs are in the mean and the variance


class Fitter(NamedTuple):
    """The fitting as two pure functions."""

    init: Callable[[Fitted], Fit]
    step: Callable[[Fit, Recorded], tuple[Fit, jax.Array]]  # and the loss before it


def record(
    members: Sequence[LM],
    params: Sequence[Params],
    tokens: jax.Array,
    length: jax.Array,
    chunk: int = 128,
) -> Iterator[Recorded]:
    """Reads a text with both models and yields their laws, chunk by chunk.

    Args:
      members: the large model and the expert.
      params: of both.
      tokens: `[B, T]` int32, right-padded.
      length: `[B]` int32.
      chunk: tokens of each row in a batch, which has `M = B * chunk` places.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.zeros((4, 3))
    >>> text = jnp.array([[0, 1, 2]]), jnp.array([2])
    >>> [batch] = record([lm, lm], [params, params], *text)
    >>> batch.tokens.tolist(), batch.weights.tolist()
    ([1, 2, 2], [1.0, 0.0, 0.0])
    """

    def note(outs: list[Out], targets: jax.Array, weights: jax.Array) -> Recorded:
        large, expert = (
            log_probs(out.logits).reshape(weights.size, -1) for out in outs
        )
        return Recorded(large, expert, targets.reshape(-1), weights)

    yield from read_together(members, params, tokens, length, chunk, note)


def nats(combiner: Combiner, fitted: Fitted, batch: Recorded) -> jax.Array:
    """Weighted mean of `-log p(token)` of the combination, `[]`.

    Args:
      combiner: the form of f.
      fitted: its parameters.
      batch: M places.

    >>> from collab_jax.cooperate.transfer.comblm import mean
    >>> half = jnp.log(jnp.full((1, 2), 0.5))
    >>> batch = Recorded(half, half, jnp.array([0]), jnp.ones(1))
    >>> round(float(nats(mean(), mean().init(jax.random.key(0), 2), batch)), 4)
    0.6931
    """
    law = log_probs(combined(combiner, fitted)([batch.large, batch.expert]))
    found = jnp.take_along_axis(law, batch.tokens[:, None], axis=-1)[:, 0]
    return -mean_over(found, batch.weights)


def fitter(combiner: Combiner, optimizer: optax.GradientTransformation) -> Fitter:
    """Gradient steps on `nats`, with the inputs scaled over what was seen so far.

    A step scales its inputs by the mean and variance of its own batch, as a batch norm
    does; `Fitted` keeps those of all batches together, for use.

    Args:
      combiner: the form of f.
      optimizer: any optax transformation; Adam at 2e-3 in the paper, over batches of
        1024 places of 1000 texts of 1024 tokens, once.

    >>> from collab_jax.cooperate.transfer.comblm import constant_scalar
    >>> form = constant_scalar()
    >>> laws = jnp.log(jnp.array([[[0.9, 0.1]], [[0.1, 0.9]]]))
    >>> batch = Recorded(*laws, jnp.array([1]), jnp.ones(1))
    >>> run = fitter(form, optax.sgd(1.0))
    >>> fit, first = run.step(run.init(form.init(jax.random.key(0), 2)), batch)
    >>> fit, second = run.step(fit, batch)
    >>> bool(second < first)
    True
    """

    def init(fitted: Fitted) -> Fit:
        return Fit(fitted, optimizer.init(fitted.weights), jnp.zeros(()))

    def step(fit: Fit, batch: Recorded) -> tuple[Fit, jax.Array]:
        x = combiner.inputs(batch.large, batch.expert)
        weight = batch.weights[:, None]
        count = batch.weights.sum()
        mean = (weight * x).sum(0) / jnp.maximum(count, 1.0)
        variance = (weight * (x - mean) ** 2).sum(0) / jnp.maximum(count, 1.0)

        def loss(weights: Params) -> jax.Array:
            return nats(combiner, Fitted(weights, mean, variance), batch)

        old = fit.fitted
        value, gradient = jax.value_and_grad(loss)(old.weights)
        updates, state = optimizer.update(gradient, fit.optimizer, old.weights)
        weights = optax.apply_updates(old.weights, updates)
        # both sets of places as one: the spread within, and between their means
        seen = fit.seen + count
        part = count / jnp.maximum(seen, 1.0)
        apart = mean - old.mean
        spread = (1 - part) * old.variance + part * variance
        spread += part * (1 - part) * apart**2
        fitted = Fitted(weights, old.mean + part * apart, spread)
        return Fit(fitted, state, seen), value

    return Fitter(init, step)


def fit(
    combiner: Combiner,
    batches: Iterable[Recorded],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
) -> tuple[Fitted, list[float]]:
    """Fits f to recorded laws, one step a batch.

    Args:
      combiner: the form of f.
      batches: of places, each read once; all of one shape, so that one program runs.
      optimizer: any optax transformation.
      key: of the first weights; consumed.

    Returns:
      The fitted f, and the loss before each step.

    Raises:
      ValueError: without batches.
      FloatingPointError: where a loss is not finite, naming the step; both models may
        forbid a token that stands there.

    >>> from collab_jax.cooperate.transfer.comblm import constant_vector
    >>> laws = jnp.log(jnp.array([[[0.9, 0.1]], [[0.1, 0.9]]]))
    >>> batch = Recorded(*laws, jnp.array([1]), jnp.ones(1))
    >>> fitted, losses = fit(constant_vector(), [batch] * 5, optax.adam(0.1),
    ...     jax.random.key(0))
    >>> losses[-1] < losses[0]
    True
    """
    run = fitter(combiner, optimizer)
    step = jax.jit(run.step)
    state, losses = None, []
    for batch in batches:
        if state is None:
            state = run.init(combiner.init(key, batch.large.shape[-1]))
        state, loss = step(state, batch)
        losses.append(loss)
    if state is None:
        raise ValueError("no batches to fit to: at least one is expected")
    return state.fitted, [finite(loss, n, FORBIDDEN) for n, loss in enumerate(losses)]
