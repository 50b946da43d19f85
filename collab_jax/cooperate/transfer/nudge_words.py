"""Nudging by whole words: the small model finishes the word that it begins.

The pool `nudge.nudging` decides anew at every token. Here a nudge lasts to the end of
the word, as in the paper. Which tokens begin a word is known from their spelling.

Shapes: B rows, N tokens of this call, S slots, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax import slots
from collab_jax.combine import product
from collab_jax.cooperate.efficient.cascade import check_share
from collab_jax.law import best, log_probs
from collab_jax.lm import LM, Out, Params, State


class NudgedState(NamedTuple):
    """State of `nudging_by_words`."""

    inner: State
    small: jax.Array  # [B, S] bool, whether the law behind this token is the small's
    length: jax.Array  # [B] int32


def word_starts(pieces: Sequence[bytes]) -> np.ndarray:
    """Which tokens begin a new word: those that begin with white space, or are nothing.

    Args:
      pieces: the bytes of each of the V tokens, none for special ones.

    Returns:
      `[V]` bool.

    >>> word_starts([b"nud", b"ge", b" a", b"", b"\\n"]).tolist()
    [False, False, True, True, True]
    """
    return np.array([not piece or piece[:1].isspace() for piece in pieces])


def nudging_by_words(base: LM, small: LM, starts: np.ndarray, gamma) -> LM:
    """Nudging: where a large base is not sure, a small aligned model writes a word.

    The small model's law where `max p_0 < gamma`, and also behind a token that was the
    small model's to write, as long as what it would say next does not begin a new word;
    else the base's.

    Whose law stood at a place depends on the text before it, so that both models' laws
    are also needed while a prompt is read. With prompts of their own
    (`combine.prefixed`), as a chat model wants one, the shared text is what was
    written, and its first token is nobody's.

    Args:
      base: the large model.
      small: the small aligned one, over the same tokens.
      starts: `[V]` bool, of `word_starts`. All True is the pool `nudge.nudging`.
      gamma: probability in [0, 1] below which the base is nudged; 0.3 to 0.4 in the
        paper, 0 is the base.

    Returns:
      An LM whose parameters are (the base's, the small model's).

    Raises:
      ValueError: for a gamma out of range; when first called, for `starts` of another
        size than the vocabulary.

    Source: arXiv 2410.09300; there the models need not share a vocabulary.

    >>> from collab_jax import decode
    >>> from collab_jax.models import table
    >>> one, starts = table.language_model(1), np.array([True, False, False])
    >>> base = jnp.log(jnp.array([[0.4, 0.3, 0.3]] + [[0.8, 0.1, 0.1]] * 3))
    >>> small = [[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [1.0, 0.0, 0.0]]
    >>> lm = nudging_by_words(one, one, starts, 0.5)
    >>> params = base, jnp.log(jnp.array(small))
    >>> decode.run(decode.greedy(lm, 4), params, *decode.pad([[0]]),
    ...     jax.random.key(0)).tokens.tolist()  # 1 2 is a word of the small model
    [[0, 1, 2, 0, 1]]
    """
    check_share(gamma)
    begins = jnp.asarray(starts)
    # both read the same text; their laws are told apart below
    both = product([base, small], lambda members: jnp.stack(members, axis=2))

    def told(out: Out, state: NudgedState, parents: jax.Array) -> tuple[Out, jax.Array]:
        """The laws, and whether each is the small model's, `[B, N]`."""
        laws = log_probs(out.logits)
        large, little = laws[:, :, 0], laws[:, :, 1]
        if begins.shape != large.shape[2:]:
            raise ValueError(
                f"starts of shape {begins.shape} for a vocabulary of "
                f"{large.shape[2]} tokens: one truth value a token is expected"
            )
        unsure = jnp.exp(large.max(-1)) < gamma  # a NaN stays the base's
        goes_on = ~begins[best(little)]
        rows = jnp.arange(len(parents))
        before = (state.length > 0) & state.small[rows, state.length - 1]

        def node(i: jax.Array, found: jax.Array) -> jax.Array:
            above = parents[:, i]
            spoke = jnp.where(above < 0, before, found[rows, above])
            return found.at[:, i].set(unsure[:, i] | (goes_on[:, i] & spoke))

        chosen = jax.lax.fori_loop(0, parents.shape[1], node, unsure)
        return Out(jnp.where(chosen[..., None], little, large), out.features), chosen

    def init(params: Params, batch: int, capacity: int) -> NudgedState:
        return NudgedState(
            both.init(params, batch, capacity),
            jnp.zeros((batch, capacity), bool),
            jnp.zeros(batch, jnp.int32),
        )

    def extend(
        params: Params, state: NudgedState, tokens: jax.Array
    ) -> tuple[Out, NudgedState]:
        out, inner = both.extend(params, state.inner, tokens)
        chain = jnp.broadcast_to(jnp.arange(tokens.shape[1]) - 1, tokens.shape)
        out, small = told(out, state, chain)
        buffer = slots.write(state.small, small, state.length)
        return out, NudgedState(inner, buffer, state.length + tokens.shape[1])

    def branch(
        params: Params, state: NudgedState, tokens: jax.Array, parents: jax.Array
    ) -> tuple[Out, NudgedState]:
        out, inner = both.branch(params, state.inner, tokens, parents)
        out, small = told(out, state, parents)
        buffer = slots.write(state.small, small, state.length)
        return out, NudgedState(inner, buffer, state.length)

    def rewind(state: NudgedState, count: jax.Array) -> NudgedState:
        inner = both.rewind(state.inner, count)
        return NudgedState(inner, state.small, state.length - count)

    def take(state: NudgedState, rows: jax.Array) -> NudgedState:
        return NudgedState(
            both.take(state.inner, rows), state.small[rows], state.length[rows]
        )

    def prune(state: NudgedState, path: jax.Array, count: jax.Array) -> NudgedState:
        buffer = slots.compact(state.small, state.length, path)
        inner = both.prune(state.inner, path, count)
        return NudgedState(inner, buffer, state.length + count)

    return LM(init, extend, rewind, take, branch, prune)
