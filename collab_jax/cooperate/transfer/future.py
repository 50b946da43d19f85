"""What is likely to follow: texts that are put behind every place, and asked for.

`followed` makes of an LM a model of rewards: how likely would this text follow here? It
judges candidates in the method of Tu et al. (a constraint that the text is to satisfy),
and spans in DIVER (the source that the text is about).

The LM that judges reads the shared text. Where it is not to see the prompt, as in both
methods, the base has the prompt for its own (`combine.prefixed`), and the shared text
is one start token and what was written.

Shapes: B rows, N tokens of this call, n texts, Q tokens of a text, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax.cooperate.transfer.hanging import hanging
from collab_jax.cooperate.transfer.reward import rescored
from collab_jax.law import log_probs
from collab_jax.lm import LM, Out, Params, State

# from log-probs [..., Q - 1] and which of them count [..., Q - 1] to [...]
Reduce = Callable[[jax.Array, jax.Array], jax.Array]


class FollowedState(NamedTuple):
    """State of `followed`."""

    inner: State
    texts: jax.Array  # [B, n, Q] int32
    length: jax.Array  # [B, n] int32


def average(log_p: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean log-prob of a text's tokens.

    Args:
      log_p: `[..., Q]`.
      counted: `[..., Q]` bool.

    >>> average(jnp.array([-1.0, -3.0, -9.0]), jnp.array([True, True, False])).item()
    -2.0
    """
    return total(log_p, counted) / jnp.maximum(counted.sum(-1), 1)


def total(log_p: jax.Array, counted: jax.Array) -> jax.Array:
    """The log-prob of the whole text.

    Args:
      log_p: `[..., Q]`.
      counted: `[..., Q]` bool.

    >>> total(jnp.array([-1.0, -3.0, -9.0]), jnp.array([True, True, False])).item()
    -4.0
    """
    return jnp.where(counted, log_p, 0.0).sum(-1)


def final(log_p: jax.Array, counted: jax.Array) -> jax.Array:
    """The log-prob of the last token alone: of the answer to a question.

    Args:
      log_p: `[..., Q]`.
      counted: `[..., Q]` bool.

    >>> final(jnp.array([-1.0, -3.0, -9.0]), jnp.array([True, True, False])).item()
    -3.0
    """
    last = counted & ~jnp.pad(
        counted[..., 1:], [(0, 0)] * (counted.ndim - 1) + [(0, 1)]
    )
    return total(log_p, last)


def followed(
    lm: LM, texts: int, size: int, reduce: Reduce = average, width: int = 1
) -> LM:
    """A model of rewards that tells how likely given texts follow behind every token.

    `y[b, t, i] = reduce_j log p(c_ij | x_<=t, c_i,<j)`, for n texts c of each row. The
    first token of a text is read and not asked for: a separator.

    The texts hang below every token as chains, so that nothing is kept of them.

    Args:
      lm: any LM.
      texts: n.
      size: Q, tokens of the longest text, its first included.
      reduce: `average`, `total` or `final`.
      width: tokens of a call whose texts are read in one call of the LM, at `width (1 +
        n (Q - 1))` nodes.

    Returns:
      An LM whose parameters are (the LM's, texts `[B, n, Q]` right-padded, lengths `[B,
      n]` of at least 2), and whose "logits" are n numbers.

    Raises:
      ValueError: for no texts, or a size below 2; when first called, for texts of
        another shape or another number of rows.

    >>> from collab_jax.models import table
    >>> lm = followed(table.language_model(1), 1, 3)
    >>> own = jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]))
    >>> params = own, jnp.array([[[0, 1, 1]]]), jnp.array([[3]])
    >>> out, _ = lm.extend(params, lm.init(params, 1, 1), jnp.array([[1]]))
    >>> round(float(jnp.exp(2 * out.logits[0, 0, 0])), 4)  # 0.5 * 0.9
    0.45
    """
    if texts < 1 or size < 2:
        raise ValueError(
            f"{texts} texts of {size} tokens: at least one is expected, of a token to "
            "begin with and one that is asked for"
        )
    asked = size - 1
    chains = [i - 1 if i % asked else -1 for i in range(texts * asked)]
    below = hanging(lm, chains, width)

    def read(state: FollowedState) -> Callable[[jax.Array], jax.Array]:
        targets = state.texts[:, None, :, 1:]  # [B, 1, n, Q - 1]
        counted = jnp.arange(1, size) < state.length[:, None, :, None]

        def reduced(logits: jax.Array) -> jax.Array:  # [B, G, n (Q - 1), V]
            shape = (*logits.shape[:2], texts, asked)
            law = log_probs(logits).reshape(*shape, -1)
            index = jnp.broadcast_to(targets, shape)[..., None]
            found = jnp.take_along_axis(law, index, axis=-1)[..., 0]
            return reduce(found, jnp.broadcast_to(counted, shape))

        return reduced

    def hung(state: FollowedState, nodes: int) -> jax.Array:
        flat = state.texts[:, :, :-1].reshape(len(state.texts), 1, -1)
        return jnp.broadcast_to(flat, (len(flat), nodes, flat.shape[2]))

    def init(params: Params, batch: int, capacity: int) -> FollowedState:
        own, given, length = params
        if given.shape != (batch, texts, size) or length.shape != (batch, texts):
            raise ValueError(
                f"texts of shape {given.shape} and lengths of shape {length.shape}: "
                f"{(batch, texts, size)} and {(batch, texts)} are expected"
            )
        return FollowedState(lm.init(own, batch, capacity + below.room), given, length)

    def extend(
        params: Params, state: FollowedState, tokens: jax.Array
    ) -> tuple[Out, FollowedState]:
        found, inner = below.extend(
            params[0],
            state.inner,
            tokens,
            hung(state, tokens.shape[1]),
            read(state),
        )
        return Out(found), state._replace(inner=inner)

    def branch(
        params: Params, state: FollowedState, tokens: jax.Array, parents: jax.Array
    ) -> tuple[Out, FollowedState]:
        found, inner = below.branch(
            params[0],
            state.inner,
            tokens,
            parents,
            hung(state, tokens.shape[1]),
            read(state),
        )
        return Out(found), state._replace(inner=inner)

    def rewind(state: FollowedState, count: jax.Array) -> FollowedState:
        return state._replace(inner=lm.rewind(state.inner, count))

    def take(state: FollowedState, rows: jax.Array) -> FollowedState:
        inner = lm.take(state.inner, rows)
        return FollowedState(inner, state.texts[rows], state.length[rows])

    def prune(state: FollowedState, path: jax.Array, count: jax.Array) -> FollowedState:
        return state._replace(inner=lm.prune(state.inner, path, count))

    return LM(init, extend, rewind, take, branch, prune)


def anticipating(
    lm: LM,
    judge: LM,
    texts: int,
    size: int,
    strength,
    k: int = 50,
    *,
    reduce: Reduce = average,
    width: int = 1,
) -> LM:
    """Future constraint satisfaction: candidates after which a constraint is likelier.

    `z[c] = log p(c | x) + s R(x, c)`, top K only, with `R = mean_j log q(C_j | x, c,
    C_<j)` the likelihood that the text goes on with the constraint C, in words and
    behind a separator, averaged over the row's constraints. A negative strength keeps
    away from what C says. With `reduce=final` a question whose last token is "yes" asks
    whether the text satisfies it.

    Candidates are ranked anew at every token, the first included. The method's own
    search is `beam.search(.., measure=lambda z: z)`; the least R of the candidates,
    which its code subtracts, makes no difference to a law.

    Args:
      lm: the base.
      judge: the LM that R is read from, often the same; it reads the shared text alone.
      texts: n, constraints of each row.
      size: Q, tokens of the longest with its separator.
      strength: s; 0 is the base over its K likeliest tokens.
      k: K; 50 in the code.
      reduce: from the log-probs of a constraint's tokens to a number.
      width: tokens of a call that are read in one call of the judge, at `width (1 + K)
        (1 + n (Q - 1))` nodes.

    Returns:
      An LM whose parameters are (the base's, the parameters of `followed`).

    Raises:
      ValueError: as in `rescored` and `followed`.

    Source: arXiv 2312.06149.

    >>> from collab_jax.models import table
    >>> one = table.language_model(1)
    >>> base = jnp.log(jnp.array([[0.4, 0.4, 0.2]] * 4))
    >>> own = jnp.log(jnp.array([[0.2, 0.2, 0.6], [0.8, 0.1, 0.1]] + [[0.1] * 3] * 2))
    >>> lm = anticipating(one, one, 1, 2, 1.0, 2)
    >>> params = base, (own, jnp.array([[[2, 0]]]), jnp.array([[2]]))
    >>> out, _ = lm.extend(params, lm.init(params, 1, 1), jnp.array([[0]]))
    >>> jax.nn.softmax(out.logits)[0, 0].tolist()  # a separator forgets what was before
    [0.5, 0.5, 0.0]
    """
    asked = followed(judge, texts, size, reduce, width * (1 + k))
    return rescored(lm, asked, lambda z, y: z + strength * y.mean(-1), k, width)
