"""CombLM: a large model adapted by a small expert, joined by a learned weight.

`p[v] = f[v] p_expert[v] + (1 - f[v]) p_large[v]`, normalised. The seven forms of f
differ in what it sees (nothing, both entropies, both laws) and in whether it is one
number or one for every token. None needs more of the large model than its
probabilities. `combined` makes a pool of (large, expert); `fitting` learns f.

Shapes: M places, B rows, T tokens, V vocabulary, F inputs of f.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.transfer.gate import gated
from collab_jax.law import entropy
from collab_jax.lm import Params
from collab_jax.pool import Pool, mixture


class Fitted(NamedTuple):
    """A learned f: what training changes, and how its inputs are scaled."""

    weights: Params
    mean: jax.Array  # [F] of the inputs over the data
    variance: jax.Array  # [F]


class Combiner(NamedTuple):
    """A form of f as pure functions."""

    init: Callable[[jax.Array, int], Fitted]  # (key, V) -> Fitted; the key is consumed
    # (log_p of the large model, of the expert), [..., V] each -> [..., F]
    inputs: Callable[[jax.Array, jax.Array], jax.Array]
    # (weights, scaled inputs [..., F]) -> the expert's share in [0, 1], [..., 1 or V]
    share: Callable[[Params, jax.Array], jax.Array]


def combined(combiner: Combiner, fitted: Fitted) -> Pool:
    """The pool of (large, expert) that f gives.

    Args:
      combiner: the form of f.
      fitted: its parameters; they may be tracers.

    >>> laws = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    >>> form = mean()
    >>> pool = combined(form, form.init(jax.random.key(0), 2))
    >>> jax.nn.softmax(pool(laws)).tolist()
    [0.7, 0.3]
    """

    def share(large: jax.Array, expert: jax.Array) -> jax.Array:
        x = combiner.inputs(large, expert)
        return combiner.share(fitted.weights, scaled(x, fitted.mean, fitted.variance))

    return gated(share, lambda f: mixture(1 - f, f))


def scaled(x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Inputs of mean 0 and variance 1: `(x - mean) / sqrt(variance + 1e-5)`.

    Args:
      x: `[..., F]`.
      mean: `[F]`.
      variance: `[F]`.

    >>> scaled(jnp.array([[3.0]]), jnp.array([1.0]), jnp.array([4.0])).tolist()
    [[1.0]]
    """
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def mean() -> Combiner:
    """The mean of both laws, f = 1/2; nothing is learned.

    Source: arXiv 2305.16876, "mean".

    >>> form = mean()
    >>> float(form.share((), jnp.zeros(0))[0])
    0.5
    """
    return Combiner(
        lambda key, vocab: _unscaled((), 0),
        _nothing,
        lambda weights, x: jnp.full((*x.shape[:-1], 1), 0.5),
    )


def constant_scalar() -> Combiner:
    """One learned number, `f = sigmoid(w)`.

    Source: arXiv 2305.16876, "constant-scalar".

    >>> form = constant_scalar()
    >>> float(form.share(form.init(jax.random.key(0), 5).weights, jnp.zeros(0))[0])
    0.5
    """
    return _constant(lambda vocab: 1)


def constant_vector() -> Combiner:
    """One learned number for every token, `f[v] = sigmoid(w[v])`.

    Source: arXiv 2305.16876, "constant-vector"; it is trained at a rate of 1e-2.

    >>> form = constant_vector()
    >>> form.share(form.init(jax.random.key(0), 5).weights, jnp.zeros((2, 0))).shape
    (2, 5)
    """
    return _constant(lambda vocab: vocab)


def entropy_scalar(width: int = 512, layers: int = 2) -> Combiner:
    """One number, of both entropies: `f = sigmoid(MLP([H(p_large), H(p_expert)]))`.

    Args:
      width: of the hidden layers.
      layers: how many; ReLU behind each.

    Raises:
      ValueError: for sizes below 1.

    Source: arXiv 2305.16876, "entropy-scalar"; its code has a third hidden layer.

    >>> form = entropy_scalar(4)
    >>> law = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> form.inputs(law, law).round(4).tolist()
    [[0.6931, 0.6931]]
    """
    return _network(width, layers, _entropies, lambda vocab: 2, lambda vocab: 1)


def entropy_vector(width: int = 512, layers: int = 2) -> Combiner:
    """A number for every token, of both entropies: `f = sigmoid(MLP([H, H]))`.

    Args:
      width: of the hidden layers.
      layers: how many; ReLU behind each.

    Raises:
      ValueError: for sizes below 1.

    Source: arXiv 2305.16876, "entropy-vector".

    >>> form = entropy_vector(4)
    >>> fitted = form.init(jax.random.key(0), 5)
    >>> form.share(fitted.weights, jnp.zeros((3, 2))).shape
    (3, 5)
    """
    return _network(width, layers, _entropies, lambda vocab: 2, lambda vocab: vocab)


def full_scalar(width: int = 512, layers: int = 2) -> Combiner:
    """One number, of both laws: `f = sigmoid(MLP([p_large, p_expert]))`.

    Args:
      width: of the hidden layers.
      layers: how many; ReLU behind each.

    Raises:
      ValueError: for sizes below 1.

    Source: arXiv 2305.16876, "full-scalar".

    >>> form = full_scalar(4)
    >>> fitted = form.init(jax.random.key(0), 5)
    >>> form.share(fitted.weights, jnp.zeros((3, 10))).shape
    (3, 1)
    """
    return _network(width, layers, _probs, lambda vocab: 2 * vocab, lambda vocab: 1)


def full_vector(width: int = 512, layers: int = 2) -> Combiner:
    """A number for every token, of both laws: `f = sigmoid(MLP([p_large, p_expert]))`.

    Args:
      width: of the hidden layers.
      layers: how many; ReLU behind each.

    Raises:
      ValueError: for sizes below 1.

    Source: arXiv 2305.16876, "full-vector".

    >>> form = full_vector(4)
    >>> fitted = form.init(jax.random.key(0), 5)
    >>> form.share(fitted.weights, jnp.zeros((3, 10))).shape
    (3, 5)
    """
    return _network(width, layers, _probs, lambda vocab: 2 * vocab, lambda vocab: vocab)


def _unscaled(weights: Params, inputs: int) -> Fitted:
    return Fitted(weights, jnp.zeros(inputs), jnp.ones(inputs))


def _nothing(large: jax.Array, expert: jax.Array) -> jax.Array:
    return (large + expert)[..., :0]


def _entropies(large: jax.Array, expert: jax.Array) -> jax.Array:
    return jnp.stack([entropy(large), entropy(expert)], axis=-1)


def _probs(large: jax.Array, expert: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.exp(large), jnp.exp(expert)], axis=-1)


def _constant(size: Callable[[int], int]) -> Combiner:
    def share(weights: Params, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(
            jax.nn.sigmoid(weights), (*x.shape[:-1], *weights.shape)
        )

    return Combiner(
        lambda key, vocab: _unscaled(jnp.zeros(size(vocab)), 0), _nothing, share
    )


def _network(
    width: int,
    layers: int,
    inputs: Callable[[jax.Array, jax.Array], jax.Array],
    size_in: Callable[[int], int],
    size_out: Callable[[int], int],
) -> Combiner:
    for name, value in (("width", width), ("layers", layers)):
        if value < 1:
            raise ValueError(f"{name} = {value}, at least 1 is expected")

    def init(key: jax.Array, vocab: int) -> Fitted:
        sizes = [size_in(vocab), *[width] * layers, size_out(vocab)]
        weights: list[dict[str, Any]] = []
        for n, (wide, out) in enumerate(itertools.pairwise(sizes)):
            keys = jax.random.split(jax.random.fold_in(key, n))
            reach = wide**-0.5
            weights.append(
                {
                    "kernel": jax.random.uniform(
                        keys[0], (wide, out), minval=-reach, maxval=reach
                    ),
                    "bias": jax.random.uniform(
                        keys[1], (out,), minval=-reach, maxval=reach
                    ),
                }
            )
        return _unscaled(weights, sizes[0])

    def share(weights: Params, x: jax.Array) -> jax.Array:
        for n, layer in enumerate(weights):
            x = x if n == 0 else jax.nn.relu(x)
            x = x @ layer["kernel"] + layer["bias"]
        return jax.nn.sigmoid(x)

    return Combiner(init, inputs, share)
