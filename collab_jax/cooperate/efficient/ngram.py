"""Prompt lookup: what followed the last words when they stood in the text before.

No model is asked. The end of every row is compared with the whole row at once, on the
device, and the draft is a copy of what comes behind a match.

Shapes: B rows, L slots of the text, K longest draft.
"""

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.draft import Draft, Proposer, check_size


def check_order(name: str, value: object, least: int = 1) -> int:
    """Refuses a context that is too short.

    Args:
      name: what the number is called.
      value: a number of tokens.
      least: the smallest that makes sense.

    Raises:
      ValueError: for anything but an integer of at least `least`.

    >>> check_order("longest", 4)
    4
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r}: at least {least} tokens are expected")
    return value


def agreement(tokens: jax.Array, length: jax.Array, longest: int) -> jax.Array:
    """How many tokens before each slot are the last tokens of the text.

    `a_j = max {n <= longest : x_j-n .. x_j-1 = x_l-n .. x_l-1}` for a text of l tokens:
    what stands in slot j followed these n tokens once.

    Args:
      tokens: `[B, L]`.
      length: `[B]`, at least 1.
      longest: tokens compared at most.

    Returns:
      `[B, L]` int32, 0 to `longest`; 0 at or behind the length.

    >>> text = jnp.array([[5, 6, 7, 5, 6, 0]])
    >>> agreement(text, jnp.array([5]), 3).tolist()
    [[0, 0, 2, 0, 0, 0]]
    """
    slots = tokens.shape[1]
    index = jnp.arange(slots)
    same = index < length[:, None]
    count = jnp.zeros(tokens.shape, jnp.int32)
    for i in range(min(longest, slots - 1)):
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - i, 0)[:, None], 1)
        before = jnp.pad(tokens, ((0, 0), (i + 1, 0)))[:, :slots]
        same &= (before == last) & (index > i)
        count += same
    return count


def ngram(length: int, longest: int = 8, shortest: int = 1) -> Proposer:
    """Copies what followed the latest of the longest matches.

    With j the latest slot of the largest `a_j` and `d = l - j` its distance from the
    end of the text, `x_l+i = x_j + i mod d`: a copy that reaches the end goes on with
    what it has just copied, so that a text in a loop is drafted at full length.

    Args:
      length: K, tokens of a draft.
      longest: tokens of the longest match that is told from a longer one.
      shortest: matches of fewer tokens draft nothing.

    Returns:
      A proposer of one-hot chains; its parameters are `()`.

    Raises:
      ValueError: for a length or a match below 1, or a shortest above the longest.

    Source: github.com/apoorvumang/prompt-lookup-decoding; the copy that overlaps itself
    is that of Lempel and Ziv, 1977.

    >>> proposer = ngram(4)
    >>> text, end = jnp.array([[7, 1, 2, 3, 1, 2]]), jnp.array([6])
    >>> state = proposer.init((), text, end, 4)
    >>> draft, state = proposer.propose((), state, text, end, None)
    >>> draft.tokens.tolist(), draft.count.tolist()
    ([[3, 1, 2, 3]], [4])
    """
    size = check_size("length", length)
    check_order("longest", longest)
    check_order("shortest", shortest)
    if shortest > longest:
        raise ValueError(
            f"shortest = {shortest} above longest = {longest}: nothing would be drafted"
        )

    def draft(tokens, end):
        found = agreement(tokens, end, longest)
        start = tokens.shape[1] - 1 - jnp.argmax(jnp.flip(found, 1), axis=1)
        distance = jnp.maximum(end - start, 1)[:, None]
        place = start[:, None] + jnp.arange(size) % distance
        count = jnp.where(found.max(1) >= shortest, size, 0)
        return Draft(_copy(tokens, place), count.astype(jnp.int32))

    return reading(draft, size)


def prompt_lookup(length: int, longest: int = 2) -> Proposer:
    """Copies what followed the earliest of the longest matches, as transformers does.

    With j the earliest slot of the largest `a_j`, `x_l+i = x_j+i` up to the end of the
    text: `min(K, l - j)` tokens.

    Args:
      length: K, tokens of the longest draft; `prompt_lookup_num_tokens`.
      longest: tokens of the longest match; `max_matching_ngram_size`.

    Returns:
      A proposer of one-hot chains; its parameters are `()`.

    Raises:
      ValueError: for a length or a match below 1.

    Source: `PromptLookupCandidateGenerator` in transformers 5.

    >>> proposer = prompt_lookup(4)
    >>> text, end = jnp.array([[7, 1, 2, 3, 1, 2]]), jnp.array([6])
    >>> draft, _ = proposer.propose((), (), text, end, None)
    >>> draft.tokens[0, :3].tolist(), draft.count.tolist()
    ([3, 1, 2], [3])
    """
    size = check_size("length", length)
    check_order("longest", longest)

    def draft(tokens, end):
        found = agreement(tokens, end, longest)
        start = jnp.argmax(found, axis=1).astype(end.dtype)
        count = jnp.where(found.max(1) > 0, jnp.minimum(size, end - start), 0)
        place = start[:, None] + jnp.arange(size)
        return Draft(_copy(tokens, place), count.astype(jnp.int32))

    return reading(draft, size)


def reading(draft, size: int) -> Proposer:
    """A proposer that only reads the text: it keeps nothing, and needs no parameters.

    Args:
      draft: (tokens `[B, L]`, length `[B]`) -> a chain.
      size: K.

    >>> nothing = reading(lambda tokens, end: Draft(tokens[:, :2], 0 * end), 2)
    >>> draft, _ = nothing.propose((), (), jnp.ones((1, 3), int), jnp.array([3]), None)
    >>> draft.count.tolist()
    [0]
    """

    def propose(params, state, tokens, length, key):
        del params, key
        return draft(tokens, length), state

    return Proposer(
        lambda params, prompt, prompt_length, room: (),
        propose,
        lambda params, state, verified: state,
        size,
        size,
    )


def _copy(tokens: jax.Array, place: jax.Array) -> jax.Array:
    place = jnp.minimum(place, tokens.shape[1] - 1)
    return jnp.take_along_axis(tokens, place, axis=1).astype(jnp.int32)
