"""Warps: a next-token law becomes another, and an LM becomes the LM of warped laws.

A warp is a function of logits `[B, T, V]`, or a `Warp` that also reads the tokens
before each position. `warp(lm, *warps)` applies them in the order given; the customary
order is penalties, temperature, top-k, top-p. Numbers may be tracers.

Thresholds are found by bisecting the bit pattern of the floats, not by sorting; tokens
tied with the threshold are all kept.

Shapes: B rows, T tokens of this call, S slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law, order, slots
from collab_jax.lm import LM, Out, State


class History(NamedTuple):
    """The tokens that each position of this call may read, itself included."""

    tokens: jax.Array  # [B, S] int32
    visible: jax.Array  # [B, T, S] bool

    def counts(self, vocab: int) -> jax.Array:
        """How often each token stands before (or at) each position, `[B, T, V]`."""
        batch, count, size = self.visible.shape
        row = jnp.arange(batch)[:, None, None]
        at = jnp.arange(count)[None, :, None]
        token = jnp.broadcast_to(self.tokens[:, None, :], (batch, count, size))
        zeros = jnp.zeros((batch, count, vocab), jnp.int32)
        return zeros.at[row, at, token].add(self.visible.astype(jnp.int32))


class Warp(NamedTuple):
    """A warp that reads the history; a plain function of logits needs no wrapping."""

    apply: Callable[[jax.Array, History], jax.Array]  # (logits [B, T, V], history)


class WarpState(NamedTuple):
    """State of a warped LM whose warps read the history."""

    inner: State
    tokens: jax.Array  # [B, S] int32
    length: jax.Array  # [B] int32


def _check(name: str, value, low: float, high: float = float("inf"), open_low=True):
    """Refuses a number that is known now and out of range."""
    if isinstance(value, jax.core.Tracer):
        return
    number = float(value)
    if not (low < number if open_low else low <= number) or number > high:
        bracket = "(" if open_low else "["
        raise ValueError(
            f"{name} = {value} was given, a number in {bracket}{low:g}, {high:g}] is "
            "expected"
        )


def _on_allowed(function):
    """Leaves -inf as it is: scaling it would give the scale a slope of NaN."""

    def apply(logits):
        absent = jnp.isneginf(logits)
        return jnp.where(absent, -jnp.inf, function(jnp.where(absent, 0.0, logits)))

    return apply


def temperature(t):
    """Divides the logits: `p[v]` proportional to `p[v] ** (1 / t)`.

    Args:
      t: temperature > 0; for temperature 0 use `greedy()`.

    >>> temperature(0.5)(jnp.array([[[1.0, 2.0]]])).tolist()
    [[[2.0, 4.0]]]
    """
    _check("temperature", t, 0)
    return _on_allowed(lambda logits: logits / t)


def top_k(k):
    """Keeps the k likeliest tokens, and whatever is tied with the k-th.

    Args:
      k: number of tokens >= 1.

    Source: arXiv 1805.04833.

    >>> top_k(2)(jnp.array([[[1.0, 3.0, 2.0]]])).tolist()
    [[[-inf, 3.0, 2.0]]]
    """
    _check("top_k", k, 1, open_low=False)

    def apply(logits):
        return jnp.where(order.among_largest(logits, k), logits, -jnp.inf)

    return apply


def top_p(p):
    """Keeps the smallest set of likeliest tokens whose probability reaches p.

    Args:
      p: probability in (0, 1]; 1 keeps every token.

    Source: nucleus sampling, arXiv 1904.09751.

    >>> import numpy as np
    >>> top_p(0.6)(jnp.log(jnp.array([[[0.5, 0.3, 0.2]]])))[0, 0].round(2).tolist()
    [-0.69, -1.2, -inf]
    """
    _check("top_p", p, 0, 1)

    def apply(logits):
        probs = jnp.exp(law.log_probs(jax.lax.stop_gradient(logits)))
        values = order.ordered(probs)
        least = order.threshold(
            values,
            lambda kept: jnp.where(kept, probs, 0).sum(-1, keepdims=True) >= p,
        )
        return jnp.where((values < least) & (p < 1), -jnp.inf, logits)

    return apply


def min_p(p):
    """Keeps the tokens with at least p times the probability of the likeliest.

    Args:
      p: share in [0, 1].

    Source: arXiv 2407.01082.

    >>> min_p(0.5)(jnp.log(jnp.array([[[0.6, 0.3, 0.1]]])))[0, 0].round(2).tolist()
    [-0.51, -1.2, -inf]
    """
    _check("min_p", p, 0, 1, open_low=False)

    def apply(logits):
        least = jnp.log(jnp.asarray(p, jnp.float32)) + logits.max(-1, keepdims=True)
        return jnp.where(logits < least, -jnp.inf, logits)

    return apply


def greedy():
    """Keeps the likeliest token alone, with probability 1; the first of equals.

    >>> greedy()(jnp.array([[[1.0, 3.0, 3.0]]])).tolist()
    [[[-inf, 0.0, -inf]]]
    """

    def apply(logits):
        best = law.best(logits)[..., None]
        top = jnp.max(logits, axis=-1, keepdims=True)
        sure = jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
        return jnp.where(jnp.isfinite(top), sure, top)  # a NaN or a dead law stays so

    return apply


def forbid(ids: Sequence[int]):
    """Gives these tokens probability 0.

    Args:
      ids: token ids.

    >>> forbid([1])(jnp.zeros((1, 1, 3))).tolist()
    [[[0.0, -inf, 0.0]]]
    """
    ids = jnp.asarray(ids, jnp.int32)
    return lambda logits: logits.at[..., ids].set(-jnp.inf)


def repetition_penalty(r) -> Warp:
    """Makes every token that has occurred less likely: z / r if z > 0, else z * r.

    Args:
      r: penalty > 0; 1 changes nothing.

    Source: arXiv 1909.05858 (CTRL), in the form of transformers.

    >>> history = History(jnp.array([[0, 1]]), jnp.array([[[True, False]]]))
    >>> repetition_penalty(2.0).apply(jnp.array([[[3.0, 3.0]]]), history).tolist()
    [[[1.5, 3.0]]]
    """
    _check("repetition_penalty", r, 0)

    def apply(logits, history):
        seen = history.counts(logits.shape[-1]) > 0
        scale = _on_allowed(lambda z: jnp.where(z > 0, z / r, z * r))
        return jnp.where(seen, scale(logits), logits)

    return Warp(apply)


def frequency_penalty(frequency, presence=0.0) -> Warp:
    """Lowers logits by the token's count n: `z - frequency * n - presence * [n > 0]`.

    Args:
      frequency: nats for every occurrence.
      presence: nats for having occurred at all.

    >>> history = History(jnp.array([[0, 0]]), jnp.array([[[True, True]]]))
    >>> frequency_penalty(0.5, 1.0).apply(jnp.zeros((1, 1, 2)), history).tolist()
    [[[-2.0, 0.0]]]
    """

    def apply(logits, history):
        count = history.counts(logits.shape[-1])
        return logits - frequency * count - presence * (count > 0)

    return Warp(apply)


def warp(lm: LM, *warps) -> LM:
    """The LM whose laws are those of `lm`, warped.

    Args:
      lm: any LM.
      *warps: functions of logits, or `Warp`s; the first is applied first.

    Returns:
      An LM with the same parameters. If a warp reads the history, the state carries the
      tokens consumed; in a branch each node reads the tokens on its own path.

    >>> from collab_jax.models import table
    >>> lm = warp(table.language_model(order=1), temperature(0.7), top_k(2))
    >>> params = table.init(jax.random.key(0), vocab=5, order=1)
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[3]]))
    >>> int(jnp.isfinite(out.logits).sum())
    2
    """
    if not warps:
        return lm
    if any(isinstance(w, Warp) for w in warps):
        return _with_history(lm, warps)

    def warped(result):
        out, state = result
        logits = out.logits
        for function in warps:
            logits = function(logits)
        return Out(logits, out.features), state

    def extend(params, state, tokens):
        return warped(lm.extend(params, state, tokens))

    def branch(params, state, tokens, parents):
        return warped(lm.branch(params, state, tokens, parents))

    return lm._replace(extend=extend, branch=branch)


def _with_history(lm: LM, warps) -> LM:
    def warped(out, history):
        logits = out.logits
        for w in warps:
            logits = w.apply(logits, history) if isinstance(w, Warp) else w(logits)
        return Out(logits, out.features)

    def read(state, tokens, parents=None):
        buffer = slots.write(state.tokens, tokens, state.length)
        size = buffer.shape[1]
        seen = slots.visible(state.length, tokens.shape[1], size, parents)
        return History(buffer, seen)

    def init(params, batch, capacity):
        tokens = jnp.zeros((batch, capacity), jnp.int32)
        return WarpState(
            lm.init(params, batch, capacity), tokens, jnp.zeros(batch, jnp.int32)
        )

    def extend(params, state, tokens):
        history = read(state, tokens)
        out, inner = lm.extend(params, state.inner, tokens)
        length = state.length + tokens.shape[1]
        return warped(out, history), WarpState(inner, history.tokens, length)

    def rewind(state, count):
        inner = lm.rewind(state.inner, count)
        return WarpState(inner, state.tokens, state.length - count)

    def take(state, rows):
        inner = lm.take(state.inner, rows)
        return WarpState(inner, state.tokens[rows], state.length[rows])

    def branch(params, state, tokens, parents):
        history = read(state, tokens, parents)
        out, inner = lm.branch(params, state.inner, tokens, parents)
        return warped(out, history), WarpState(inner, history.tokens, state.length)

    def prune(state, path, count):
        buffer = slots.compact(state.tokens, state.length, path)
        inner = lm.prune(state.inner, path, count)
        return WarpState(inner, buffer, state.length + count)

    return LM(init, extend, rewind, take, branch, prune)
