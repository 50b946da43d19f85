"""Co-LLM: a switch between two models is learned from text, without labels.

Which model writes a token is a hidden variable z, whose law is that of `gates.learned`,
`p(z = 1 | x) = sigmoid(w . h(x))` with h the hidden state of the first model. The loss
is the mean of `-log sum_z p(z | x) p_z(token | x)`. Here both models stay as they are;
in the paper the first one is trained along with the switch.

Shapes: M places of a batch, B rows, T tokens, W width of the hidden states.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from collab_jax.ensemble.gates import hidden
from collab_jax.finetune import finite
from collab_jax.law import log_probs
from collab_jax.lm import LM, Out, Params
from collab_jax.score import FORBIDDEN, mean_over, read_together


class Recorded(NamedTuple):
    """What both models said at M places of the token that stood there."""

    hidden: jax.Array  # [M, W] of the first model
    first: jax.Array  # [M] its log-prob of the token
    other: jax.Array  # [M] that of the other
    best: jax.Array  # [M, 2] bool, whether the token is the likeliest for each
    weights: jax.Array  # [M], 0 for places that do not count


def record(
    members: Sequence[LM],
    params: Sequence[Params],
    tokens: jax.Array,
    length: jax.Array,
    chunk: int = 128,
    key: Callable[[Any], jax.Array] = hidden,
) -> Iterator[Recorded]:
    """Reads texts with both models, chunk by chunk.

    Args:
      members: the first model and the other, of one vocabulary.
      params: of both.
      tokens: `[B, T]` int32, right-padded.
      length: `[B]` int32.
      chunk: tokens of each row in a batch, which has `M = B * chunk` places.
      key: from the first model's features to h, as for `gates.learned`.

    Raises:
      ValueError: for another number of members than two.

    >>> from collab_jax.lm import language_model
    >>> from collab_jax.models.config import from_hf
    >>> from collab_jax.models.transformer import init, transformer
    >>> config = from_hf({"model_type": "llama", "vocab_size": 5, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> lm = language_model(transformer(config))
    >>> params = init(jax.random.key(0), config)
    >>> text = jnp.array([[0, 1, 2]]), jnp.array([2])
    >>> [batch] = record([lm, lm], [params, params], *text)
    >>> batch.hidden.shape, batch.weights.tolist()
    ((3, 4), [1.0, 0.0, 0.0])
    """
    if len(members) != 2:
        raise ValueError(f"{len(members)} members: a switch is between two models")

    def note(outs: list[Out], targets: jax.Array, weights: jax.Array) -> Recorded:
        laws = [log_probs(out.logits) for out in outs]
        said = [
            jnp.take_along_axis(law, targets[..., None], axis=-1).reshape(-1)
            for law in laws
        ]
        best = [(law.argmax(-1) == targets).reshape(-1) for law in laws]
        states = key(outs[0].features)
        flat = states.reshape(-1, states.shape[-1]).astype(jnp.float32)
        return Recorded(flat, said[0], said[1], jnp.stack(best, -1), weights)

    yield from read_together(members, params, tokens, length, chunk, note)


def nats(weights: jax.Array, batch: Recorded) -> jax.Array:
    """The marginal loss, mean of `-log sum_z p(z) p_z(token)`, `[]`.

    Args:
      weights: `[W]` of the switch.
      batch: M places.

    Source: arXiv 2403.03870, equation 2; as its authors' trainer computes it.

    >>> half = jnp.log(jnp.array([0.5]))
    >>> batch = Recorded(jnp.ones((1, 2)), half, half, jnp.ones((1, 2)), jnp.ones(1))
    >>> round(float(nats(jnp.zeros(2), batch)), 4)
    0.6931
    """
    logit = batch.hidden @ weights
    both = jnp.stack(
        [
            jax.nn.log_sigmoid(-logit) + batch.first,
            jax.nn.log_sigmoid(logit) + batch.other,
        ]
    )
    return -mean_over(jax.nn.logsumexp(both, axis=0), batch.weights)


def cross_entropy(weights: jax.Array, batch: Recorded) -> jax.Array:
    """Loss of the labels "the token is the other's best, and not the first's", `[]`.

    The paper finds its first weights so, and goes on with `nats`.

    Args:
      weights: `[W]` of the switch.
      batch: M places.

    Source: arXiv 2403.03870, its weak supervision; method "a" of its code.

    >>> best = jnp.array([[False, True], [True, True]])
    >>> batch = Recorded(jnp.array([[1.0], [-1.0]]), *jnp.zeros((2, 2)), best,
    ...     jnp.ones(2))
    >>> float(cross_entropy(jnp.array([9.0]), batch)) < 0.001
    True
    """
    label = batch.best[:, 1] & ~batch.best[:, 0]
    logit = batch.hidden @ weights
    right = jnp.where(label, logit, -logit)
    return -mean_over(jax.nn.log_sigmoid(right), batch.weights)


def fit(
    batches: Iterable[Recorded],
    optimizer: optax.GradientTransformation,
    start: jax.Array,
    loss: Callable[[jax.Array, Recorded], jax.Array] = nats,
) -> tuple[jax.Array, list[float]]:
    """Fits the weights of a switch, one step a batch.

    Args:
      batches: of places, all of one shape, so that one program runs.
      optimizer: any optax transformation.
      start: `[W]`; the paper begins with the mean of the output embeddings.
      loss: `cross_entropy` first, then `nats`.

    Returns:
      The weights `[W]`, and the loss before each step.

    Raises:
      ValueError: without batches.
      FloatingPointError: where a loss is not finite, naming the step.

    Source: arXiv 2403.03870.

    >>> batch = Recorded(jnp.array([[1.0], [-1.0]]), jnp.array([-3.0, 0.0]),
    ...     jnp.array([0.0, -3.0]), jnp.ones((2, 2), bool), jnp.ones(2))
    >>> weights, losses = fit([batch] * 9, optax.adam(0.3), jnp.zeros(1))
    >>> bool(weights[0] > 1), losses[-1] < losses[0]
    (True, True)
    """

    @jax.jit
    def step(weights, state, batch):
        value, slope = jax.value_and_grad(loss)(weights, batch)
        updates, state = optimizer.update(slope, state, weights)
        return optax.apply_updates(weights, updates), state, value

    weights, state = start, optimizer.init(start)
    losses = []
    for batch in batches:
        weights, state, value = step(weights, state, batch)
        losses.append(value)
    if not losses:
        raise ValueError("no batches to fit to: at least one is expected")
    return weights, [finite(loss, n, FORBIDDEN) for n, loss in enumerate(losses)]
