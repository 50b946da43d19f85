"""Plain fine-tuning by next-token prediction, of all parameters or of an adapter.

The loss of a batch is `sum_bt w_bt * -log p(x_bt | x_b,<t) / sum_bt w_bt`. Logits are
made for a few positions at a time and made again for the gradient, so that the whole
`[B, T, V]` never exists.

The data are `Batch`es of rows, made by `collab_jax.packing`.

Shapes: N rows of data, B rows of a batch, T tokens of a row, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from collab_jax import tree
from collab_jax.lm import Backbone, Params
from collab_jax.models import lora
from collab_jax.packing import Batch, batches


class Tuned(NamedTuple):
    """What training changes; all that must survive between two steps."""

    params: Params  # the model's, or the adapter's
    optimizer: Any  # the state of the optax transformation


class Info(NamedTuple):
    """What a step saw."""

    loss: jax.Array  # [], nats a token, before the step
    norm: jax.Array  # [], global norm of the gradient


class Finetuner(NamedTuple):
    """Training as two pure functions; jit and donate `step` as you like."""

    init: Callable[[Params], Tuned]
    # (base, tuned, batch) -> (tuned, info); base is the frozen model under an adapter,
    # and () where the model itself is trained; a batch is what the loss reads
    step: Callable[[Params, Tuned, Any], tuple[Tuned, Info]]


def loss(
    backbone: Backbone,
    params: Params,
    batch: Batch,
    chunk: int = 128,
    remat: bool = False,
) -> jax.Array:
    """Weighted mean of `-log p(token | tokens before it)`, in nats.

    Args:
      backbone: the model; it is run without a cache.
      params: its parameters.
      batch: tokens `[B, T]` and weights `[B, T]`.
      chunk: positions whose logits `[B, chunk, V]` exist at one time.
      remat: keep only the products with weight matrices for the gradient and compute
        norms, attention weights and activations again: less memory, more time.

    Returns:
      A float32 scalar; 0 where all weights are 0.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> params = transformer.init(jax.random.key(0), config)
    >>> batch = Batch(jnp.array([[1, 2, 3]]), jnp.array([[0.0, 0.0, 1.0]]))
    >>> loss(transformer.transformer(config), params, batch).shape
    ()
    """
    tokens, weights = jnp.asarray(batch.tokens), jnp.asarray(batch.weights)

    def run(params: Params, tokens: jax.Array) -> jax.Array:
        x = backbone.embed(params, tokens)
        return backbone.features(params, None, x)[0].hidden

    if remat:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        run = jax.checkpoint(run, policy=policy)
    hidden = run(params, tokens[:, :-1])
    return mean_nats(
        backbone.unembed, params, hidden, tokens[:, 1:], weights[:, 1:], chunk
    )


def mean_nats(
    logits: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = 128,
) -> jax.Array:
    """Weighted mean of `-log p(target)` over positions, whose logits exist in chunks.

    Args:
      logits: (params, hidden `[B, t, W]`) -> `[B, t, ..., V]`, where the dots are none,
        or several predictions at each position.
      params: of `logits`.
      hidden: `[B, T, W]`.
      targets: `[B, T, ...]` int32.
      weights: `[B, T, ...]`; a target of weight 0 is not read.
      chunk: positions whose logits exist at one time.

    Returns:
      `[...]` float32, nats; 0 where all weights are 0.

    >>> read = lambda params, hidden: hidden @ params
    >>> hidden, ones = jnp.ones((1, 3, 2)), jnp.ones((1, 3))
    >>> mean_nats(read, jnp.zeros((2, 4)), hidden, jnp.array([[0, 1, 3]]), ones)
    Array(1.386..., dtype=float32)
    """
    weights = weights.astype(jnp.float32)

    @jax.checkpoint
    def part(params, hidden, targets, weights):
        nats = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, hidden), targets
        )
        # a token of weight 0 may be forbidden: 0 * inf would be NaN
        return jnp.where(weights == 0, 0.0, weights * nats).sum((0, 1))

    total = over_positions(
        functools.partial(part, params), (hidden, targets, weights), chunk
    )
    whole = weights.sum((0, 1))
    return jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1.0), 0.0)


def over_positions(
    part: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], chunk: int
) -> jax.Array:
    """Sum of a function over pieces of the positions, one piece after the other.

    Pieces without any weight cost nothing: the logits of prompts and padding are never
    made.

    Args:
      part: of pieces `[B, chunk, ...]` of the arrays; the last piece is filled with 0.
        It is 0 where all weights are.
      arrays: `[B, T, ...]` each; the last are the weights.
      chunk: positions in a piece.

    >>> x, weights = jnp.array([[1.0, 2.0, 3.0]]), jnp.ones((1, 3))
    >>> float(over_positions(lambda x, w: (w * (x + 1)).sum(), (x, weights), 2))
    9.0
    """
    count = arrays[0].shape[1]
    chunk = min(chunk, count)

    def pieces(leaf: jax.Array) -> jax.Array:  # [B, T, ..] -> [pieces, B, chunk, ..]
        width = [(0, 0), (0, -count % chunk)] + [(0, 0)] * (leaf.ndim - 2)
        leaf = jnp.pad(leaf, width)
        leaf = leaf.reshape(leaf.shape[0], -1, chunk, *leaf.shape[2:])
        return jnp.moveaxis(leaf, 1, 0)

    def body(carry, xs):
        return carry, jax.lax.cond((xs[-1] != 0).any(), part, nothing, *xs)

    xs = tuple(map(pieces, arrays))
    like = jax.eval_shape(part, *(x[0] for x in xs))

    def nothing(*_):
        return jnp.zeros(like.shape, like.dtype)

    _, sums = jax.lax.scan(body, (), xs)
    return sums.sum(0)


def finetuner(
    backbone: Backbone,
    optimizer: optax.GradientTransformation,
    lora_scale: float | None = None,
    chunk: int = 128,
    remat: bool = False,
) -> Finetuner:
    """Gradient steps on `loss`: of the model, or of a LoRA adapter over a frozen model.

    Args:
      backbone: the model.
      optimizer: any optax transformation, its learning rate and clipping included.
      lora_scale: alpha / R where an adapter is trained; None trains the model itself.
      chunk: see `loss`.
      remat: see `loss`.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> base = transformer.init(jax.random.key(0), config)
    >>> adapter = lora.init(jax.random.key(1), base, rank=2)
    >>> tuner = finetuner(transformer.transformer(config), optax.adamw(0.1), 1.0)
    >>> batch = Batch(jnp.array([[1, 2, 3]]), jnp.ones((1, 3)))
    >>> tuned, first = tuner.step(base, tuner.init(adapter), batch)
    >>> tuned, second = tuner.step(base, tuned, batch)
    >>> bool(second.loss < first.loss)
    True
    """

    def objective(params: Params, base: Params, batch: Batch) -> jax.Array:
        if lora_scale is None:
            return loss(backbone, params, batch, chunk, remat)
        whole = lora.apply(base, params, lora_scale)
        return loss(backbone, whole, batch, chunk, remat)

    return descent(objective, optimizer)


def descent(
    objective: Callable[[Params, Params, Any], jax.Array],
    optimizer: optax.GradientTransformation,
) -> Finetuner:
    """Gradient steps on any loss of trained parameters, frozen ones and a batch.

    Args:
      objective: (params, base, batch) -> a scalar; base is what stays as it is.
      optimizer: any optax transformation.

    >>> square = lambda params, base, batch: ((params - base) ** 2).sum()
    >>> tuner = descent(square, optax.sgd(0.25))
    >>> tuned, info = tuner.step(1.0, tuner.init(jnp.array(3.0)), None)
    >>> float(tuned.params), float(info.loss), float(info.norm)
    (2.0, 4.0, 4.0)
    """

    def init(params: Params) -> Tuned:
        tree.refuse_packed(params, "trained")
        return Tuned(params, optimizer.init(params))

    def step(base: Params, tuned: Tuned, batch: Batch) -> tuple[Tuned, Info]:
        value, gradient = jax.value_and_grad(objective)(tuned.params, base, batch)
        updates, state = optimizer.update(gradient, tuned.optimizer, tuned.params)
        params = optax.apply_updates(tuned.params, updates)
        return Tuned(params, state), Info(value, optax.tree.norm(gradient))

    return Finetuner(init, step)


def fit(
    tuner: Finetuner,
    params: Params,
    data: Any,
    *,
    base: Params = (),
    batch_size: int = 4,
    epochs: int = 1,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Params, list[float]]:
    """Trains over the data and returns the new parameters and the loss of every step.

    Args:
      tuner: from `finetuner`.
      params: where to start, left as they are: of the model, or of the adapter.
      data: rows `[N, T]` from `pack` or `rows`, or whatever else the tuner reads.
      base: the frozen model where an adapter is trained.
      batch_size: B.
      epochs: how often each row is seen.
      steps: an upper limit to the number of steps.
      seed: of the order of the rows.
      progress: whether a bar is shown.

    Returns:
      The trained parameters, and the loss before each step.

    Raises:
      FloatingPointError: where the loss is not a number, naming the step.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> params = transformer.init(jax.random.key(0), config)
    >>> tuner = finetuner(transformer.transformer(config), optax.adamw(0.01))
    >>> from collab_jax.packing import pack
    >>> data = pack([[1, 2, 3] * 6], length=4)
    >>> _, history = fit(tuner, params, data, batch_size=2, epochs=4, progress=False)
    >>> history[-1] < history[0]
    True
    """
    total = epochs * -(-len(data.tokens) // batch_size)
    total = total if steps is None else min(total, steps)
    # the step may overwrite its own copy, never what the caller holds
    tuned = tuner.init(jax.tree.map(jnp.copy, params))
    step = jax.jit(tuner.step, donate_argnums=1)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    history: list[Any] = []
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("fine-tuning", total=total)
        stream = batches(data, batch_size, seed, epochs)
        for _, batch in zip(range(total), stream, strict=False):
            tuned, info = step(base, tuned, batch)
            history.append(info.loss)
            if len(history) > 1:  # the step before, so that this one runs on meanwhile
                history[-2] = finite(history[-2], len(history) - 2)
                bar.update(task, description=f"fine-tuning, loss {history[-2]:.3f}")
            bar.advance(task)
        if history:
            history[-1] = finite(history[-1], len(history) - 1)
    return tuned.params, history


def finite(value: jax.Array, step: int, also: str = "") -> float:
    """A loss as a number, or an error.

    Args:
      value: the loss, `[]`.
      step: its number, which the error names.
      also: what else may be the cure, in front of the usual ones.

    Raises:
      FloatingPointError: where it is not finite.

    >>> finite(jnp.float32(0.5), 3)
    0.5
    """
    if not np.isfinite(number := float(value)):
        raise FloatingPointError(
            f"the loss of step {step} is {number}: {also}a smaller learning rate or "
            "clipped gradients (optax.clip_by_global_norm) usually help"
        )
    return number
