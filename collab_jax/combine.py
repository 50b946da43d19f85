"""Combinators: LMs become one LM, whose parameters are the tuple or stack of theirs.

Every combinator here obeys the laws of `collab_jax.testing.check_lm` when its members
do, so that they nest in any order and to any depth.

Shapes: B rows, T tokens of this call, N members, P tokens of a member's own prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import slots
from collab_jax.lm import LM, Out, State, padded, piece, prefill
from collab_jax.pool import Pool


def product(members: Sequence[LM], pool: Pool) -> LM:
    """Members of any architectures and one vocabulary, pooled at every token.

    `logits = pool([out_n.logits for each member n])`; parameters and features are the
    tuples of the members'.

    Args:
      members: N LMs.
      pool: what makes one law of N, e.g. `pool.mixture(0.5, 0.5)`.

    Raises:
      ValueError: without members; when first called, for unequal vocabularies or
      weights
        that do not fit.

    >>> from collab_jax import pool
    >>> from collab_jax.models import table
    >>> lm = product([table.language_model(1), table.language_model(2)], pool.mixture())
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = table.init(keys[0], 3, 1), table.init(keys[1], 3, 2)
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[0, 2]]))
    >>> out.logits.shape
    (1, 2, 3)
    """
    members = tuple(members)
    if not members:
        raise ValueError("product of no members: at least one LM is expected")

    def each(verb: str, *columns) -> list:
        rows = zip(members, *columns, strict=True)
        return [getattr(lm, verb)(*arguments) for lm, *arguments in rows]

    def joined(results) -> tuple[Out, State]:
        outs, states = zip(*results, strict=True)
        logits = pool([out.logits for out in outs])
        return Out(logits, tuple(out.features for out in outs)), states

    def same(value) -> tuple:
        return (value,) * len(members)

    def init(params, batch, capacity):
        if not isinstance(params, tuple | list) or len(params) != len(members):
            raise ValueError(
                f"product of {len(members)} members got parameters of type "
                f"{type(params).__name__}: a tuple of {len(members)} trees is expected"
            )
        return tuple(each("init", params, same(batch), same(capacity)))

    def extend(params, state, tokens):
        return joined(each("extend", params, state, same(tokens)))

    def rewind(state, count):
        return tuple(each("rewind", state, same(count)))

    def take(state, rows):
        return tuple(each("take", state, same(rows)))

    def branch(params, state, tokens, parents):
        return joined(each("branch", params, state, same(tokens), same(parents)))

    def prune(state, path, count):
        return tuple(each("prune", state, same(path), same(count)))

    return LM(init, extend, rewind, take, branch, prune)


def stacked(lm: LM, n: int, pool: Pool, axes: Any = 0) -> LM:
    """N members of one architecture as one vmapped decode over stacked parameters.

    Args:
      lm: the architecture.
      n: N, number of members.
      pool: what makes one law of N.
      axes: which parameters are stacked, as `in_axes` of `jax.vmap`: 0 for all, None
      for
        none, or a prefix of the parameters' tree; e.g. `(None, 0)` for a shared base
        and stacked adapters.

    Returns:
      An LM whose parameters have a leading axis N where `axes` is 0.

    Raises:
      ValueError: for n < 1; by vmap, when an axis is not N long.

    >>> from collab_jax import pool
    >>> from collab_jax.models import table
    >>> lm = stacked(table.language_model(1), 2, pool.linear(0.5, 0.5))
    >>> params = jnp.stack([table.init(jax.random.key(k), 3, 1) for k in range(2)])
    >>> out, _ = lm.extend(params, lm.init(params, 1, 4), jnp.array([[0, 2]]))
    >>> out.logits.shape
    (1, 2, 3)
    """
    if n < 1:
        raise ValueError(f"n = {n} members were asked for, at least one is expected")

    def members(function, in_axes):
        return jax.vmap(function, in_axes=in_axes, axis_size=n)

    def joined(out: Out) -> Out:
        logits = pool([out.logits[k] for k in range(n)])
        features = [jax.tree.map(lambda x, k=k: x[k], out.features) for k in range(n)]
        return Out(logits, tuple(features))

    def init(params, batch, capacity):
        return members(lambda p: lm.init(p, batch, capacity), (axes,))(params)

    def extend(params, state, tokens):
        out, state = members(lm.extend, (axes, 0, None))(params, state, tokens)
        return joined(out), state

    def rewind(state, count):
        return members(lm.rewind, (0, None))(state, count)

    def take(state, rows):
        return members(lm.take, (0, None))(state, rows)

    def branch(params, state, tokens, parents):
        in_axes = (axes, 0, None, None)
        out, state = members(lm.branch, in_axes)(params, state, tokens, parents)
        return joined(out), state

    def prune(state, path, count):
        return members(lm.prune, (0, None, None))(state, path, count)

    return LM(init, extend, rewind, take, branch, prune)


class PrefixedState(NamedTuple):
    """State of `prefixed`."""

    inner: State  # the member's, its own prompt but for the last token consumed
    last: jax.Array  # [B] the last token of the member's own prompt
    consumed: jax.Array  # [B] tokens of the shared text consumed


def prefixed(lm: LM, chunk: int | None = None) -> LM:
    """A member with a prompt of its own, in front of the text that all members share.

    The shared text begins with one start token, which this member reads as the last
    token of its own prompt. So every member may have its own chat template, context or
    source text, of its own length. Context-aware decoding (arXiv 2305.14739) is
    `stacked(prefixed(lm), 2, linear(1 + a, -a), axes=(None, 0, 0))`.

    Args:
      lm: any LM.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      An LM whose parameters are `(params, tokens[B, P], length[B])`: the member's, and
      its prompt, right-padded, at least one token long.

    >>> from collab_jax.models import table
    >>> lm = prefixed(table.language_model(order=2))
    >>> params = table.init(jax.random.key(0), vocab=3, order=2)
    >>> own = params, jnp.array([[1, 2, 0]]), jnp.array([2])
    >>> out, _ = lm.extend(own, lm.init(own, 1, 4), jnp.array([[0]]))
    >>> bool((out.logits[0, 0] == params[2 + 1 * 4]).all())  # after 1, 2
    True
    """

    def init(params, batch, capacity):
        inner, tokens, length = params
        if tokens.shape[0] != batch:
            raise ValueError(
                f"prefixed: prompts of {tokens.shape[0]} rows for a batch of {batch}; "
                "one prompt a row is expected"
            )
        width = tokens.shape[1] - 1
        state = lm.init(inner, batch, padded(width, piece(chunk, batch)) + capacity)
        state = prefill(lm, inner, state, tokens[:, :width], length - 1, chunk)
        last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
        return PrefixedState(state, last, jnp.zeros(batch, jnp.int32))

    def spelled(state, tokens, position):
        return jnp.where(position == 0, state.last[:, None], tokens)

    def extend(params, state, tokens):
        position = slots.positions(state.consumed, tokens.shape[1])
        tokens = spelled(state, tokens, position)
        out, inner = lm.extend(params[0], state.inner, tokens)
        consumed = state.consumed + tokens.shape[1]
        return out, PrefixedState(inner, state.last, consumed)

    def rewind(state, count):
        inner = lm.rewind(state.inner, count)
        return PrefixedState(inner, state.last, state.consumed - count)

    def take(state, rows):
        inner = lm.take(state.inner, rows)
        return PrefixedState(inner, state.last[rows], state.consumed[rows])

    def branch(params, state, tokens, parents):
        position = state.consumed[:, None] + slots.depths(parents)
        tokens = spelled(state, tokens, position)
        out, inner = lm.branch(params[0], state.inner, tokens, parents)
        return out, state._replace(inner=inner)

    def prune(state, path, count):
        inner = lm.prune(state.inner, path, count)
        return PrefixedState(inner, state.last, state.consumed + count)

    return LM(init, extend, rewind, take, branch, prune)
