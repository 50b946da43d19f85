"""Lookahead decoding: the target guesses far ahead in parallel, and guesses are kept.

Jacobi iteration fills a window of future tokens with guesses and improves all of them
in one call, each from the guesses before it. A guess is rarely right where it stands,
but what the target says behind it is good text: the n-grams that run through the last
iterations go to a pool, and those that begin with the pending token are tried.

Window and tried n-grams are one tree. Its trunk is the oldest iteration; behind the
w-th token of the trunk grows a chain, what the later iterations said for the places
behind it. So every guess is read in the context that it was made in, and its position
is its depth.

Shapes: B rows, W tokens of the window, N tokens of an n-gram, G n-grams a token, V
vocabulary, P longest prompt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient.draft import Proposer, check_size
from collab_jax.cooperate.efficient.ngram import check_order
from collab_jax.cooperate.efficient.recycle import known_first


class Guesses(NamedTuple):
    """What `lookahead` keeps."""

    # [B, N - 1, W] int32, the last iterations, the oldest first; entry [b, l, w] was
    # guessed for the place w + l behind the pending token
    window: jax.Array
    # [B, V, G, N - 1] int32, what followed each token, the latest first; -1 is none
    pool: jax.Array


def lookahead(
    vocab: int, window: int = 7, order: int = 5, guesses: int = 7
) -> Proposer:
    """A tree of Jacobi guesses, and of n-grams that earlier guesses left behind.

    With `y_w` the target's best token behind the w-th chain of the window x, a round
    adds the n-grams `x[0, w], .., x[N - 2, w], y_w` to the pool. The next window is

        x'[l, w] = x[l + 1, w + n - 1] for l < N - 2,   x'[N - 2, w] = y_w+n-1

    where the row became n tokens longer, with the last column repeated. The pool begins
    with the n-grams of the prompt, the window with its tokens.

    Args:
      vocab: V, of the target.
      window: W, guesses of an iteration.
      order: N, tokens of an n-gram, at least 2.
      guesses: G, n-grams kept for every token. A row of `4 * vocab * guesses * (order -
        1)` bytes.

    Returns:
      A proposer of one-hot trees of `(W + G) * (N - 1)` nodes; its parameters are `()`.
      A run that is resumed from its text alone begins with new guesses.

    Raises:
      ValueError: for a number that is too small; when first called, for another
        vocabulary than the target's.

    Source: arXiv 2402.02057.

    >>> proposer = lookahead(10, window=2, order=3, guesses=1)
    >>> text, end = jnp.array([[4, 5, 6, 4]]), jnp.array([4])
    >>> state = proposer.init((), text, end, 2)
    >>> draft, state = proposer.propose((), state, text, end, None)
    >>> draft.tokens.tolist(), draft.parents.tolist()
    ([[5, 6, 4, 5, 5, 6]], [[-1, 0, -1, 2, 2, 3]])
    """
    check_size("vocab", vocab)
    check_size("window", window)
    check_size("guesses", guesses)
    levels = check_order("order", order, least=2) - 1
    inside, tried = window * levels, guesses * levels

    def init(params, prompt, prompt_length, room):
        del params, room
        batch, width = prompt.shape
        place = jnp.arange(levels)[:, None] + jnp.arange(window)
        place = place % prompt_length[:, None, None]  # [B, N - 1, W]
        begin = jnp.take_along_axis(prompt, place.reshape(batch, -1), axis=1)
        pool = jnp.full((batch, vocab, guesses, levels), -1, jnp.int32)
        if width > levels:
            at = jnp.arange(width - levels)
            grams = prompt[:, at[:, None] + jnp.arange(order)]  # [B, P - N + 1, N]
            inner = at + levels < prompt_length[:, None]
            pool = insert(pool, grams, inner)
        return Guesses(begin.reshape(place.shape).astype(jnp.int32), pool)

    def propose(params, state, tokens, length, key):
        del params, key
        batch = length.shape[0]
        rows = jnp.arange(batch)
        found = state.pool[rows, tokens[rows, length - 1]]  # [B, G, N - 1]
        above = jnp.asarray([*range(-1, window - 1), *range(inside - window)])
        above = jnp.where(above < 0, -1, above + tried).astype(jnp.int32)
        drafted = jnp.concatenate(
            [found.reshape(batch, -1), state.window.reshape(batch, -1)], axis=1
        )
        above = jnp.broadcast_to(above, (batch, inside))
        above = jnp.concatenate([merged(found).reshape(batch, -1), above], axis=1)
        return known_first(drafted, above, drafted >= 0), state

    def observe(params, state, verified):
        del params
        logits = verified.out.logits
        if logits.shape[-1] != vocab:
            raise ValueError(
                f"lookahead over {vocab} tokens for a target over {logits.shape[-1]}: "
                "give lookahead the target's number of tokens"
            )
        live = verified.count > 0
        tips = jnp.maximum(verified.draft.count[:, None] - window, 0)
        tips = tips + jnp.arange(window) + 1  # behind the pending token
        said = law.best(jnp.take_along_axis(logits, tips[:, :, None], axis=1))  # [B, W]
        grown = jnp.concatenate([state.window, said[:, None]], axis=1)  # [B, N, W]
        wanted = jnp.broadcast_to(live[:, None], said.shape)
        pool = insert(state.pool, jnp.swapaxes(grown, 1, 2), wanted)
        column = jnp.maximum(verified.count - 1, 0)[:, None] + jnp.arange(window)
        column = jnp.minimum(column, window - 1)[:, None, :]
        moved = jnp.take_along_axis(grown[:, 1:], column, axis=2)
        return Guesses(jnp.where(live[:, None, None], moved, state.window), pool)

    return Proposer(init, propose, observe, inside + tried, window + levels - 1)


def merged(chains: jax.Array) -> jax.Array:
    """The parents of the tokens of chains, where equal beginnings are one path.

    A token that an earlier chain has after the same beginning is a leaf: what follows
    hangs on the earlier one, so that no verifier has to choose between equals.

    Args:
      chains: `[B, G, D]`; token d of chain g is node `g * D + d`.

    Returns:
      `[B, G, D]` int32; -1 for the first tokens.

    >>> merged(jnp.array([[[5, 6], [5, 7]]])).tolist()
    [[[-1, 0], [-1, 0]]]
    """
    depth = chains.shape[2]
    same = chains[:, :, None, :] == chains[:, None, :, :]
    same = jnp.cumprod(same.astype(jnp.int32), axis=-1)  # [B, G, G, D]
    first = jnp.argmax(same, axis=2) * depth + jnp.arange(depth)
    return jnp.pad(
        first[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1
    ).astype(jnp.int32)


def insert(pool: jax.Array, grams: jax.Array, wanted: jax.Array) -> jax.Array:
    """Puts n-grams to the front of the lists of their first tokens, in order.

    Args:
      pool: `[B, V, G, N - 1]` int32.
      grams: `[B, T, N]` int32.
      wanted: `[B, T]` bool.

    >>> pool = jnp.full((1, 3, 2, 1), -1)
    >>> grams = jnp.array([[[0, 1], [0, 2], [0, 1]]])
    >>> insert(pool, grams, jnp.array([[True, True, True]]))[0, 0].tolist()
    [[1], [2]]
    """
    rows, vocab = jnp.arange(pool.shape[0]), pool.shape[1]

    def step(pool, x):
        gram, wanted = x
        key, new = gram[:, 0], gram[:, 1:]
        old = pool[rows, key]  # [B, G, N - 1]
        again = (old == new[:, None]).all(-1)
        # how many behind the front move by one: up to the same n-gram, or to the end
        last = jnp.where(again.any(1), jnp.argmax(again, axis=1), old.shape[1] - 1)
        place = jnp.arange(old.shape[1])
        moved = jnp.concatenate([new[:, None], old[:, :-1]], axis=1)
        kept = jnp.where((place <= last[:, None])[:, :, None], moved, old)
        key = jnp.where(wanted, key, vocab)
        return pool.at[rows, key].set(kept, mode="drop"), None

    xs = jnp.swapaxes(grams, 0, 1).astype(pool.dtype), wanted.T
    return jax.lax.scan(step, pool, xs)[0]
