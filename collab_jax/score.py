"""Scores of given text: log-probs, entropies, ranks and margins, without its sampling.

Logits are read chunk by chunk, so that `[B, T, V]` never exists at once.

Shapes: B rows, T tokens, V vocabulary, M places of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.lm import LM, Out, Params, padded

# what to do where two models, of which one combines the laws, give no finite loss
FORBIDDEN = "give weight 0 to tokens that both models forbid; "


class Scores(NamedTuple):
    """What an LM thinks of each token; position 0 and the padding are 0."""

    logprob: jax.Array  # [B, T] log p(tokens[t] | tokens[:t]), nats
    entropy: jax.Array  # [B, T] entropy of p(. | tokens[:t]), nats
    rank: jax.Array  # [B, T] int32, how many tokens are likelier
    margin: jax.Array  # [B, T] log p(tokens[t]) less that of the best other token


def score(
    lm: LM, params: Params, tokens: jax.Array, length: jax.Array, chunk: int = 128
) -> Scores:
    """Scores every token of the rows given those before it.

    `logprob[b, t] = log p(tokens[b, t] | tokens[b, :t])`.

    Args:
      lm: any LM.
      params: its parameters.
      tokens: `[B, T]` int32, right-padded with any token.
      length: `[B]` int32.
      chunk: tokens consumed by one call; `[B, chunk, V]` logits exist at a time.

    Returns:
      Scores; compile with `jax.jit(score, static_argnums=(0, 4))`.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.zeros((4, 3))
    >>> score(lm, params, jnp.array([[0, 1, 2]]), jnp.array([3])).logprob.tolist()
    [[0.0, -1.0986, -1.0986]]
    """
    batch, width = tokens.shape
    total = padded(width, chunk)
    chunk = min(chunk, total)
    tokens = jnp.pad(tokens, ((0, 0), (0, total - width)), mode="edge")
    state = lm.init(params, batch, total)

    def read(state, i):
        piece = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        # the tokens that these positions predict; the last predicts nothing
        ahead = jnp.minimum(i * chunk + 1 + jnp.arange(chunk), total - 1)
        target = tokens[:, ahead]
        out, state = lm.extend(params, state, piece)
        log_p = law.log_probs(out.logits)
        chosen = jnp.take_along_axis(log_p, target[..., None], axis=-1)
        is_target = jnp.arange(log_p.shape[-1]) == target[..., None]
        best_other = jnp.where(is_target, -jnp.inf, log_p).max(-1)
        chosen_value = chosen[..., 0]
        return state, (
            chosen_value,
            law.entropy(out.logits),
            (log_p > chosen).sum(-1, dtype=jnp.int32),
            jnp.where(jnp.isneginf(chosen_value), -jnp.inf, chosen_value - best_other),
        )

    _, pieces = jax.lax.scan(read, state, jnp.arange(total // chunk))

    def laid_out(piece):  # [chunks, B, chunk] -> [B, T], moved behind position 0
        flat = jnp.moveaxis(piece, 0, 1).reshape(batch, total)
        flat = jnp.pad(flat[:, : width - 1], ((0, 0), (1, 0)))
        known = jnp.arange(width) < length[:, None]
        return jnp.where(known, flat, 0)

    return Scores(*(laid_out(piece) for piece in pieces))


def perplexity(scores: Scores, length: jax.Array) -> jax.Array:
    """`exp(-mean_t log p(tokens[t] | tokens[:t]))` over t >= 1, `[B]`.

    A row of fewer than two tokens has nothing to predict and perplexity 1.

    Args:
      scores: of `score`.
      length: `[B]`, tokens in each row.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.zeros((4, 3))
    >>> length = jnp.array([3])
    >>> scores = score(lm, params, jnp.array([[0, 1, 2]]), length)
    >>> perplexity(scores, length).tolist()
    [3.0]
    """
    return jnp.exp(-scores.logprob.sum(-1) / jnp.maximum(length - 1, 1))


def read_together(
    members: Sequence[LM],
    params: Sequence[Params],
    tokens: jax.Array,
    length: jax.Array,
    chunk: int,
    note: Callable[[list[Out], jax.Array, jax.Array], Any],
) -> Iterator[Any]:
    """What is to be kept of the outputs of several LMs, chunk by chunk.

    Args:
      members: N LMs, which read the same tokens.
      params: of each.
      tokens: `[B, T]` int32, right-padded.
      length: `[B]` int32.
      chunk: tokens of each row that are read at a time, `M = B * chunk` places.
      note: of the N outputs, the tokens that stand behind their places `[B, chunk]`,
        and weights `[M]`, 0 where none does; its results are yielded.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.zeros((4, 3))
    >>> text = jnp.array([[0, 1, 2]]), jnp.array([2])
    >>> found = read_together([lm], [params], *text, 128, lambda _, *told: told)
    >>> [(targets.tolist(), weights.tolist()) for targets, weights in found]
    [([[1, 2, 2]], [1.0, 0.0, 0.0])]
    """
    batch, width = tokens.shape
    total = padded(width, chunk)
    chunk = min(chunk, total)
    tokens = jnp.pad(tokens, ((0, 0), (0, total + 1 - width)), mode="edge")

    @jax.jit
    def read(params: Sequence[Params], states: Any, start: Any) -> tuple[Any, Any]:
        piece = jax.lax.dynamic_slice_in_dim(tokens, start, chunk + 1, axis=1)
        outs, after = [], []
        for lm, own, state in zip(members, params, states, strict=True):
            out, state = lm.extend(own, state, piece[:, :-1])
            outs.append(out)
            after.append(state)
        known = start + 1 + jnp.arange(chunk) < length[:, None]
        weights = known.reshape(-1).astype(jnp.float32)
        return note(outs, piece[:, 1:], weights), after

    states = [
        lm.init(own, batch, total) for lm, own in zip(members, params, strict=True)
    ]
    for start in range(0, total, chunk):
        found, states = read(params, states, start)
        yield found


def mean_over(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of places; a place of weight 0 may be infinite.

    Args:
      values: `[M]`.
      weights: `[M]`; their sum counts as 1 where it is less.

    >>> mean_over(jnp.array([2.0, 4.0, jnp.inf]), jnp.array([1.0, 1.0, 0.0])).item()
    3.0
    """
    total = jnp.where(weights > 0, weights * values, 0.0).sum()
    return total / jnp.maximum(weights.sum(), 1.0)
