"""Decoding towards a reward: the likeliest tokens are judged before one is drawn.

The base names K candidates, a model of rewards reads the text with each of them behind
it, and the candidates' log-probs move by what it says; all other tokens are forbidden.
The candidates are siblings in a tree below one cache of rewards, so the text is read
once and stored once, not K times.

The rewards' model is any LM over the base's vocabulary whose "logits" are numbers to be
read: `models.reward.reward_model` of a backbone and a head, or an LM that tells how
likely something is (`future.followed`).

A reward that is itself a law of tokens needs no candidates: that is the pool `genarm`.

Shapes: B rows, N tokens of this call, K candidates, O outputs of the rewards' model, V
vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.transfer.hanging import hanging
from collab_jax.law import log_probs
from collab_jax.lm import LM, Out, State
from collab_jax.pool import Pool, linear

Judge = Callable[[jax.Array], jax.Array]  # outputs [..., O] -> numbers [...]


class Guided(NamedTuple):
    """State of `rescored`."""

    inner: State  # of the base
    rewards: State  # of the rewards' model, as many rows


def rescored(
    lm: LM,
    rewards: LM,
    score: Callable[[jax.Array, jax.Array], jax.Array],
    k: int,
    width: int = 1,
) -> LM:
    """An LM whose K likeliest tokens get new scores, and whose other tokens are gone.

    `z[c] = score(log p(c | x), y(x, c))` for the K candidates c, else -inf, with y what
    the rewards' model says of the text x and c. The scores are what the law is made of,
    and what a `beam.search` with `measure=lambda z: z` adds up.

    Args:
      lm: the base.
      rewards: any LM over the same tokens; its outputs are read as numbers.
      score: from log-probs `[B, N, K]` and outputs `[B, N, K, O]` to scores `[B, N,
        K]`; -inf forbids. A token that the base forbids stays forbidden.
      k: K.
      width: tokens of a call whose candidates are read in one call of the rewards'
        model, `width (1 + K)` nodes. Under speculation give the length of a draft and
        one. Wider calls read their candidates piece by piece.

    Returns:
      An LM whose parameters are (the base's, those of the rewards' model).

    Raises:
      ValueError: for k or a width below 1; when first called, for k above V.

    >>> from collab_jax.models import table
    >>> base, judge = jnp.array([[2.0, 1.0, 0.0]] * 4), jnp.array([[0], [5], [9], [0]])
    >>> lm = rescored(table.language_model(1), table.language_model(1),
    ...     lambda z, y: z + y[..., 0], 2)
    >>> params = base, jnp.pad(judge, ((0, 0), (0, 2)))
    >>> out, _ = lm.extend(params, lm.init(params, 1, 1), jnp.array([[0]]))
    >>> jax.nn.softmax(out.logits)[0, 0].round(3).tolist()  # 2 + 0 against 1 + 5
    [0.018, 0.982, 0.0]
    """
    if k < 1:
        raise ValueError(f"k = {k}: at least one candidate is expected")
    below = hanging(rewards, (-1,) * k, width)

    def candidates(out: Out) -> tuple[jax.Array, jax.Array]:
        vocab = out.logits.shape[-1]
        if k > vocab:
            raise ValueError(f"k = {k} candidates of a vocabulary of {vocab} tokens")
        return jax.lax.top_k(log_probs(out.logits), k)

    def judged(out: Out, value: jax.Array, token: jax.Array, found: jax.Array) -> Out:
        gone = jnp.isneginf(value)
        new = score(jnp.where(gone, 0.0, value), found)
        rows = jnp.arange(token.shape[0])[:, None, None]
        places = jnp.arange(token.shape[1])[:, None]
        nothing = jnp.full(out.logits.shape, -jnp.inf)
        z = nothing.at[rows, places, token].set(jnp.where(gone, -jnp.inf, new))
        broken = jnp.isnan(out.logits).any(-1, keepdims=True)
        return Out(jnp.where(broken, jnp.nan, z), out.features)

    def init(params: Any, batch: int, capacity: int) -> Guided:
        if not isinstance(params, tuple | list) or len(params) != 2:
            raise ValueError(
                f"parameters of type {type(params).__name__}: the pair (the base's, "
                "those of the rewards' model) is expected"
            )
        base, own = params
        room = capacity + below.room
        return Guided(lm.init(base, batch, capacity), rewards.init(own, batch, room))

    def extend(params: Any, state: Guided, tokens: jax.Array) -> tuple[Out, Guided]:
        out, inner = lm.extend(params[0], state.inner, tokens)
        value, token = candidates(out)
        found, own = below.extend(params[1], state.rewards, tokens, token, _all)
        return judged(out, value, token, found), Guided(inner, own)

    def branch(
        params: Any, state: Guided, tokens: jax.Array, parents: jax.Array
    ) -> tuple[Out, Guided]:
        out, inner = lm.branch(params[0], state.inner, tokens, parents)
        value, token = candidates(out)
        found, own = below.branch(
            params[1], state.rewards, tokens, parents, token, _all
        )
        return judged(out, value, token, found), Guided(inner, own)

    def rewind(state: Guided, count: jax.Array) -> Guided:
        return Guided(
            lm.rewind(state.inner, count), rewards.rewind(state.rewards, count)
        )

    def take(state: Guided, rows: jax.Array) -> Guided:
        return Guided(lm.take(state.inner, rows), rewards.take(state.rewards, rows))

    def prune(state: Guided, path: jax.Array, count: jax.Array) -> Guided:
        return Guided(
            lm.prune(state.inner, path, count),
            rewards.prune(state.rewards, path, count),
        )

    return LM(init, extend, rewind, take, branch, prune)


def _all(outputs: jax.Array) -> jax.Array:
    return outputs


def output(index: int = 0) -> Judge:
    """One of the outputs, as it is.

    Args:
      index: which.

    >>> output(1)(jnp.array([0.5, 3.0])).item()
    3.0
    """
    return lambda y: y[..., index]


def toward(index: int = 0) -> Judge:
    """A reward that is sought: `clip(y, 0, 1)`.

    Args:
      index: which of the outputs.

    Source: arXiv 2310.09520.

    >>> toward()(jnp.array([[0.5], [3.0]])).tolist()
    [0.5, 1.0]
    """
    return lambda y: jnp.clip(y[..., index], 0.0, 1.0)


def away(index: int = 0) -> Judge:
    """A reward that is avoided, such as a toxicity: `1 - clip(y, 0, 1)`.

    Args:
      index: which of the outputs.

    Source: arXiv 2310.09520, its code's inverse.

    >>> away()(jnp.array([[0.5], [3.0]])).tolist()
    [0.5, 0.0]
    """
    return lambda y: 1.0 - jnp.clip(y[..., index], 0.0, 1.0)


def rad(
    lm: LM,
    rewards: LM,
    beta=30.0,
    k: int = 20,
    *,
    judge: Judge = toward(),
    width: int = 1,
) -> LM:
    """Reward-augmented decoding: `z[c] = log p(c | x) + beta r(x, c)`, top K only.

    Args:
      lm: the base.
      rewards: a model of rewards, trained by `reward_training.cumulative`.
      beta: strength; 10 to 100 and more in the paper, 0 is top-K sampling.
      k: candidates; 20 in the paper.
      judge: `toward` or `away` of one output, a number in [0, 1].
      width: see `rescored`.

    Returns:
      An LM whose parameters are (the base's, those of the rewards' model).

    Raises:
      ValueError: as in `rescored`.

    Source: arXiv 2310.09520.

    >>> from collab_jax.models import table
    >>> base = jnp.array([[2.0, 1.0, 0.0]] * 4)
    >>> reward = jnp.array([[0.0, 0, 0], [1.0, 0, 0], [9.0, 0, 0], [0.0, 0, 0]])
    >>> lm = rad(table.language_model(1), table.language_model(1), 3.0, 2)
    >>> params = base, reward
    >>> out, _ = lm.extend(params, lm.init(params, 1, 1), jnp.array([[0]]))
    >>> jax.nn.softmax(out.logits)[0, 0].round(3).tolist()  # 2 + 0 against 1 + 3
    [0.119, 0.881, 0.0]
    """
    return rescored(lm, rewards, lambda z, y: z + beta * judge(y), k, width)


def args(
    lm: LM,
    rewards: LM,
    weight=1.5,
    k: int = 10,
    *,
    judge: Judge = output(),
    width: int = 1,
) -> LM:
    """ARGS, alignment as a search: `z[c] = log p(c | x) + w r(x, c)`, top K only.

    ARGS-greedy is `decode.greedy` of it; ARGS-stochastic is `decode.sample` of it under
    `warp.temperature`. The reward is that of a whole answer, and is not clipped.

    Args:
      lm: the base.
      rewards: a model of rewards, trained by `preference_training.ranking`.
      weight: w; 0 is the base over its K likeliest tokens.
      k: candidates.
      judge: from the outputs to a number.
      width: see `rescored`.

    Returns:
      An LM whose parameters are (the base's, those of the rewards' model).

    Raises:
      ValueError: as in `rescored`.

    Source: arXiv 2402.01694, equations 1 to 3.

    >>> from collab_jax.models import table
    >>> base = jnp.array([[2.0, 1.0, 0.0]] * 4)
    >>> reward = jnp.array([[0.0, 0, 0], [2.0, 0, 0], [9.0, 0, 0], [0.0, 0, 0]])
    >>> lm = args(table.language_model(1), table.language_model(1), 1.0, 2)
    >>> params = base, reward
    >>> out, _ = lm.extend(params, lm.init(params, 1, 1), jnp.array([[0]]))
    >>> jax.nn.softmax(out.logits)[0, 0].round(3).tolist()  # 2 + 0 against 1 + 2
    [0.269, 0.731, 0.0]
    """
    return rescored(lm, rewards, lambda z, y: z + weight * judge(y), k, width)


def controlled(
    lm: LM,
    values: LM,
    strength,
    k: int,
    *,
    judge: Judge = output(),
    width: int = 1,
) -> LM:
    """Controlled decoding, token by token: tokens of high value become likelier.

    `z[c] = log p(c | x) + s V(x, c)`, top K only. V(x, c) is the reward that is to be
    expected once the text goes on with c: over all tokens, this law has the highest
    value for its divergence from the base. The form is that of `args` with another
    model behind it. FUDGE is `strength = 1` with the judge `lambda y:
    jax.nn.log_sigmoid(y[..., 0])`, the log-probability of an attribute.

    A model with one output a token of the vocabulary, V(x, c) for every c at once,
    needs no candidates: that is `product([lm, values], pool.linear(1, s))`.

    Args:
      lm: the base.
      values: a model of values, trained by `reward_training.fudge` or `q_learning`.
      strength: s, 1 / the weight of the divergence; 0 is the base.
      k: candidates; V for the method's own form.
      judge: from the outputs to a number.
      width: see `rescored`.

    Returns:
      An LM whose parameters are (the base's, those of the model of values).

    Raises:
      ValueError: as in `rescored`.

    Source: arXiv 2310.17022, theorem 2.1; FUDGE, arXiv 2104.05218.

    >>> from collab_jax.models import table
    >>> base = jnp.array([[2.0, 1.0, 0.0]] * 4)
    >>> value = jnp.array([[0.0, 0, 0], [1.0, 0, 0], [2.0, 0, 0], [0.0, 0, 0]])
    >>> lm = controlled(table.language_model(1), table.language_model(1), 1.0, 3)
    >>> params = base, value
    >>> out, _ = lm.extend(params, lm.init(params, 1, 1), jnp.array([[0]]))
    >>> jax.nn.softmax(out.logits)[0, 0].round(3).tolist()
    [0.333, 0.333, 0.333]
    """
    return rescored(lm, values, lambda z, y: z + strength * judge(y), k, width)


def genarm(*weights) -> Pool:
    """GenARM of (base, reward, reward, ..): rewards that are laws of the next token.

    `log p = log p_0 + sum_i w_i log r_i`, up to a constant, where r_i is an
    autoregressive model of rewards: an LM whose log-likelihood of an answer is its
    reward. One forward pass of it judges every token, so that no candidates are named.
    Several dimensions of preference are weighted as the user likes; a small reward
    guides a large base.

    Args:
      *weights: one for each reward, 1 / the weight of the divergence from the base.

    Raises:
      ValueError: without weights; when first called, for other numbers of members.

    Source: arXiv 2410.08193; several rewards, its section on multi-objective guidance.

    >>> base, reward = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
    >>> jax.nn.softmax(genarm(0.5)([base, reward])).round(4).tolist()  # 2 to 1
    [0.6667, 0.3333]
    """
    if not weights:
        raise ValueError("genarm without weights: one for each reward is expected")
    return linear(1, *weights)
