"""Suffix decoding: what usually followed, for as long as it is likely to.

The end of the text is looked up in the text itself, at every length of match. Each
length has its votes: the occurrences of that many last tokens. Token by token the draft
goes the way of the most votes, and the share of the votes that went this way is its
estimated probability. Long and unanimous matches draft far, short or divided ones
little.

Shapes: B rows, L slots of the text, K longest draft, M lengths of match, R occurrences.
"""

import math

import jax
import jax.numpy as jnp

from collab_jax.cooperate.efficient.draft import Draft, Proposer, check_size
from collab_jax.cooperate.efficient.ngram import agreement, check_order, reading

# Shares are integers in units of 2^-15: sums and ties are the same on every machine.
ONE = 1 << 15


def suffix(
    length: int,
    depth: int = 24,
    *,
    max_spec_factor: float = math.inf,
    max_spec_offset: float = 0.0,
    min_token_prob: float = 0.1,
    occurrences: int = 16,
) -> Proposer:
    """Drafts the path of the best score among all lengths of match.

    Let `S_0(m)` be the occurrences of the last m tokens, i.e. the slots j with `a_j >=
    m` (see `ngram.agreement`), and

        x_i = argmax_v #{j in S_i : x_j = v},   S_i+1 = {j + 1 : j in S_i, x_j = x_i},
        D_i = |S_i+1| / |S_i| * D_i-1,   D_-1 = 1.

    The path of m has at most `max_spec_factor * m + max_spec_offset` tokens, and ends
    before the first whose `D_i` is below `min_token_prob`; its score is the sum of D.
    Of equal scores the longest match is taken, of equal votes the side with the longest
    match, then the latest.

    Two things differ from the source. There is no memory of other requests: a row knows
    its own text. And what was just drafted is a part of the text, so that a loop is
    drafted at full length.

    Args:
      length: K, the longest draft.
      depth: M, tokens of the longest match that is told from a longer one.
      max_spec_factor: tokens drafted per token matched; no limit unless given. A call
        of the target is K + 1 tokens wide anyway, so that a shorter draft saves
        nothing here; vLLM, where it does, has 1.0.
      max_spec_offset: tokens drafted in addition.
      min_token_prob: least estimated probability of a drafted token.
      occurrences: R, votes in all; those of the longest matches, then the latest.

    Returns:
      A proposer of one-hot chains; its parameters are `()`.

    Raises:
      ValueError: for a length, depth or number of occurrences below 1, a draft that
        would always be empty, or a probability outside of [0, 1].

    Source: arXiv 2411.04975; names as in vLLM.

    >>> proposer = suffix(4, max_spec_factor=2.0)
    >>> text, end = jnp.array([[1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 1, 2]]), 14
    >>> draft, _ = proposer.propose((), (), text, jnp.array([end]), None)
    >>> draft.tokens.tolist(), draft.count.tolist()
    ([[3, 8, 1, 2]], [4])
    """
    size = check_size("length", length)
    check_order("depth", depth)
    check_order("occurrences", occurrences)
    if not 0 <= min_token_prob <= 1:
        raise ValueError(
            f"min_token_prob = {min_token_prob}: a probability in [0, 1] is expected"
        )
    limits = [
        math.floor(min(size, m * max_spec_factor + max_spec_offset + 1e-6))
        for m in range(1, depth + 1)
    ]
    if max(limits) < 1:
        raise ValueError(
            f"max_spec_factor = {max_spec_factor} and max_spec_offset = "
            f"{max_spec_offset}: not even a match of {depth} tokens drafts anything; "
            "raise one of them"
        )
    limit = jnp.asarray(limits)  # [M]
    least = math.ceil(min_token_prob * ONE)

    def draft(tokens, end):
        batch, slots = tokens.shape
        rows = jnp.arange(batch)[:, None, None]
        found = agreement(tokens, end, depth)
        rank = found * slots + jnp.arange(slots)
        # XLA:CPU sorts integers but selects among floats, five times as fast
        exact = jnp.float32 if (depth + 1) * slots < 1 << 24 else jnp.int32
        rank, _ = jax.lax.top_k(rank.astype(exact), min(occurrences, slots))
        rank = rank.astype(jnp.int32)
        agree, at = rank // slots, rank % slots  # [B, R]
        alive = agree[:, None, :] >= jnp.arange(1, depth + 1)[:, None]  # [B, M, R]
        at = jnp.broadcast_to(at[:, None, :], alive.shape)

        def step(carry, i):
            at, alive, going, share, score, drafted = carry
            text = tokens[rows, jnp.minimum(at, slots - 1)]
            behind = jnp.clip(at - end[:, None, None], 0, size - 1)
            copied = jnp.take_along_axis(drafted, behind, axis=2)
            text = jnp.where(at < end[:, None, None], text, copied)
            equal = text[:, :, :, None] == text[:, :, None, :]
            votes = (equal & alive[:, :, None, :]).sum(-1, dtype=jnp.int32)
            votes = jnp.where(alive, votes, 0)
            first = jnp.argmax(votes, axis=-1, keepdims=True)
            token = jnp.take_along_axis(text, first, axis=-1)
            all_votes = jnp.maximum(alive.sum(-1, dtype=jnp.int32), 1)
            share = share * votes.max(-1) // all_votes
            going &= (share >= least) & (share > 0) & (i < limit)
            score += jnp.where(going, share, 0)
            drafted = drafted.at[:, :, i].set(token[:, :, 0])
            alive &= text == token
            return (at + 1, alive, going, share, score, drafted), going

        going = alive.any(-1)
        share = jnp.full(going.shape, ONE, jnp.int32)
        drafted = jnp.zeros((*going.shape, size), tokens.dtype)
        carry = at, alive, going, share, jnp.zeros_like(share), drafted
        carry, going = jax.lax.scan(step, carry, jnp.arange(size))
        *_, score, drafted = carry
        best = depth - 1 - jnp.argmax(jnp.flip(score, 1), axis=1)
        best = best[:, None]
        count = jnp.take_along_axis(going.sum(0, dtype=jnp.int32), best, axis=1)[:, 0]
        drafted = jnp.take_along_axis(drafted, best[:, :, None], axis=1)[:, 0]
        return Draft(drafted.astype(jnp.int32), count)

    return reading(draft, size)
