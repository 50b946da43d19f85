"""Verifiers of chains: which drafted tokens stay, and what comes behind them.

A verifier is two laws, given the target's laws p_1 .. p_K+1, the draft's q_1 .. q_K and
the drafted x_1 .. x_K: how likely at least i tokens survive, and what the next token
follows when exactly a of them did. `from_laws` draws from these two, and `outcomes` are
the same two multiplied out, so what is tested is what runs. A verifier is lossless if

    sum_x q(x) outcomes(p, q, x)[a, v], continued by the target, is the target's law.

Randomness: one number decides how many tokens survive, one draw gives the next. Both
belong to the round (`round_key`) and not to the position alone. Block verification
looks at all drafted tokens before it stops at one of them, so whatever was drawn for
the positions behind that one is no longer independent of the text, and must not be
drawn again.

Shapes: B rows, K tokens of a chain, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law, warp
from collab_jax.cooperate.efficient.draft import Draft, Verified
from collab_jax.lm import Out


class Verifier(NamedTuple):
    """A coupling of the target's law and the draft's."""

    # (key [B], length [B], out, draft) -> Verified, its count one more than accepted;
    # out is the target's at the pending token and at every node, [B, 1 + N, ...]
    verify: Callable[[jax.Array, jax.Array, Out, Draft], Verified]
    # (logits [B, 1 + N, V], draft) -> [B, 1 + N, V] probabilities, given the drafted
    # tokens: entry [b, i, v] that row b keeps the draft up to node i - 1 (in a chain: i
    # tokens; 0 is the pending token alone) and that v comes next
    outcomes: Callable[[jax.Array, Draft], jax.Array]
    # whether drafts are to be drawn with the noise of plain sampling
    coupled: bool = False


def round_key(key: jax.Array, length: jax.Array, stream: int) -> jax.Array:
    """Row keys `[B]` for one stream of one round: new ones every round.

    Args:
      key: `[B]` row keys; not consumed.
      length: `[B]`, of the text when the round begins; it grows every round.
      stream: `law.DRAFT`, `law.ACCEPT` or `law.RESIDUAL`.

    >>> key = law.row_keys(jax.random.key(0), 2)
    >>> round_key(key, jnp.array([5, 5]), law.ACCEPT).shape
    (2,)
    """

    def one_row(key, length):
        return jax.random.fold_in(jax.random.fold_in(key, length), stream)

    return jax.vmap(one_row)(key, length)


def count_accepted(survival: jax.Array, u: jax.Array) -> jax.Array:
    """Inverts the law of the number of accepted tokens: `#{i : u < P(accepted >= i)}`.

    The comparison is strict: u can be 0, and a token of probability 0 has to fall.

    Args:
      survival: `[B, K]`, falling along K.
      u: `[B]`, uniform in [0, 1).

    Returns:
      `[B]` int32.

    >>> count_accepted(jnp.array([[0.9, 0.2], [0.9, 0.0]]), jnp.array([0.1, 0.0]))
    Array([2, 1], dtype=int32)
    """
    return (u[:, None] < survival).sum(-1, dtype=jnp.int32)


def remainder(p: jax.Array, q: jax.Array, weight=1.0) -> jax.Array:
    """What the draft has too little of: `max(weight * p - q, 0)`, not normalised.

    Where nothing is left (p = q, up to rounding) it is p.

    Args:
      p: `[..., V]` probabilities of the target.
      q: `[..., V]` probabilities of the draft.
      weight: `[..., 1]` in [0, 1].

    >>> remainder(jnp.array([0.5, 0.5]), jnp.array([0.75, 0.25])).tolist()
    [0.0, 0.25]
    """
    rest = jnp.maximum(weight * p - q, 0.0)
    return jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)


def offered(draft: Draft) -> jax.Array:
    """Which tokens of a draft are meant, `[B, N]`: those before `count`.

    >>> offered(Draft(jnp.array([[4, 5, 6]]), jnp.array([2])))[0].tolist()
    [True, True, False]
    """
    return jnp.arange(draft.tokens.shape[1]) < draft.count[:, None]


def from_laws(
    survival: Callable[[jax.Array, Draft], jax.Array],
    resume: Callable[[jax.Array, Draft, jax.Array], jax.Array],
) -> Verifier:
    """The verifier that draws from two laws, and whose `outcomes` are their product.

    Args:
      survival: (logits `[B, K + 1, V]`, draft) -> `[B, K]`, the probability that at
        least 1, 2, .. K tokens are accepted; 0 behind the draft's count.
      resume: (logits, draft, a `[B]`) -> `[B, V]` logits of the token behind exactly a
        accepted ones.

    Returns:
      A verifier of chains.

    >>> always = from_laws(lambda p, draft: jnp.ones(draft.tokens.shape),
    ...     lambda p, draft, a: p[jnp.arange(len(a)), a])
    >>> draft = Draft(jnp.array([[1, 0]]), jnp.array([2]))
    >>> always.outcomes(jnp.zeros((1, 3, 2)), draft)[0].tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]
    """

    def verify(key, length, out, draft):
        check_draft(out.logits, draft, chain=True)
        u = jax.vmap(_uniform)(round_key(key, length, law.ACCEPT))
        accepted = count_accepted(survival(out.logits, draft), u)
        follow = resume(out.logits, draft, accepted)
        again = round_key(key, length, law.RESIDUAL)
        return chain(draft, out, accepted, law.draw(follow, again, length + accepted))

    def outcomes(logits, draft):
        check_draft(logits, draft, chain=True)
        batch, depth, _ = logits.shape
        reach = jnp.pad(survival(logits, draft), ((0, 0), (1, 0)), constant_values=1.0)
        stop = reach - jnp.pad(reach[:, 1:], ((0, 0), (0, 1)))  # [B, K + 1]
        follow = [
            resume(logits, draft, jnp.full(batch, a, jnp.int32)) for a in range(depth)
        ]
        return stop[:, :, None] * jnp.exp(law.log_probs(jnp.stack(follow, axis=1)))

    return Verifier(verify, outcomes)


def _uniform(key: jax.Array) -> jax.Array:
    """Uniform in [0, 1) with 46 bits, as far as a float32 has room for them."""
    coarse, fine = jax.random.uniform(key, (2,))
    return jnp.minimum(coarse + fine * 2.0**-23, 1 - 2.0**-24)


def check_draft(logits: jax.Array, draft: Draft, chain: bool = False) -> None:
    """Refuses a draft over another vocabulary, or a tree where a chain is verified.

    Args:
      logits: `[B, 1 + N, V]` of the target.
      draft: its law has the same vocabulary.
      chain: whether trees are refused.

    Raises:
      ValueError: naming both sides.

    >>> check_draft(jnp.zeros((1, 3, 5)), Draft(jnp.array([[1, 0]]), jnp.array([2])))
    """
    if chain and draft.parents is not None:
        raise ValueError(
            "a tree was drafted, a chain is verified: give a verifier from "
            "cooperate.efficient.tree, or a proposer of chains"
        )
    vocab = logits.shape[-1]
    if draft.law is not None and draft.law.shape[-1] != vocab:
        raise ValueError(
            f"a draft over {draft.law.shape[-1]} tokens for a target over {vocab}: one "
            "vocabulary is expected; bridge two tokenizers with translate(lm, bridge)"
        )


def chain(draft: Draft, out: Out, accepted: jax.Array, token: jax.Array) -> Verified:
    """A verified chain: `accepted` of its tokens, then `token`.

    Args:
      draft: a chain.
      out: the target's.
      accepted: `[B]`.
      token: `[B]`, the verifier's own.

    >>> draft = Draft(jnp.array([[4, 5]]), jnp.array([2]))
    >>> chain(draft, Out(()), jnp.array([1]), jnp.array([9])).tokens.tolist()
    [[4, 9, 0]]
    """
    index = jnp.arange(draft.tokens.shape[1] + 1)
    tokens = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(index < accepted[:, None], tokens, 0)
    tokens = jnp.where(index == accepted[:, None], token[:, None], tokens)
    path = jnp.broadcast_to(index[:-1], draft.tokens.shape).astype(jnp.int32)
    return Verified(tokens, accepted + 1, accepted, path, draft, out)


def _chosen(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probs `[B, K]` of the tokens in the laws `[B, K, V]`."""
    log_p = law.log_probs(logits[:, : tokens.shape[1]])
    return jnp.take_along_axis(log_p, tokens[:, :, None], axis=-1)[:, :, 0]


def _log_ratio(logits: jax.Array, draft: Draft) -> jax.Array:
    """`log p_i(x_i) / q_i(x_i)`, `[B, K]`; -inf for what was not, nor can be."""
    log_p = _chosen(logits, draft.tokens)
    log_q = jnp.zeros(()) if draft.law is None else _chosen(draft.law, draft.tokens)
    impossible = jnp.isneginf(log_p) | jnp.isneginf(log_q) | ~offered(draft)
    return jnp.where(impossible, -jnp.inf, log_p - log_q)


def _resume(logits, draft, accepted, weight=1.0) -> jax.Array:
    """Logits of the remainder of p against q behind the accepted tokens, `[B, V]`."""
    rows = jnp.arange(accepted.shape[0])
    p = jnp.exp(law.log_probs(logits[rows, accepted]))
    place = jnp.minimum(accepted, draft.tokens.shape[1] - 1)
    if draft.law is None:
        q = jax.nn.one_hot(draft.tokens[rows, place], p.shape[-1], dtype=p.dtype)
    else:
        q = jnp.exp(law.log_probs(draft.law[rows, place]))
    whole = (accepted >= draft.count)[:, None]  # nothing was drafted here
    return jnp.log(jnp.where(whole, p, remainder(p, q, weight)))


def maximal() -> Verifier:
    """Speculative sampling: a maximal coupling, token by token.

    x_i is accepted with probability `min(1, p_i(x_i) / q_i(x_i))` if all before it are;
    the next token follows `max(p - q, 0)`, normalised, at the first that is not, and
    p_K+1 behind all of them.

    Source: arXiv 2211.17192; arXiv 2302.01318.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5]] * 2], [[[0.8, 0.2]] * 2]]))
    >>> draft = Draft(jnp.array([[0]]), jnp.array([1]), q[:, :1])
    >>> maximal().outcomes(p, draft)[0].tolist()
    [[0.0, 0.375], [0.3125, 0.3125]]
    """

    def survival(logits, draft):
        return jnp.exp(jnp.cumsum(jnp.minimum(_log_ratio(logits, draft), 0.0), axis=1))

    return from_laws(survival, _resume)


def block() -> Verifier:
    """Block verification: the drafted tokens are judged together.

    With `w_0 = 1, w_i = min(1, w_i-1 p_i(x_i) / q_i(x_i))` the weights of the block,
    `S_i = sum_v max(w_i p_i+1(v) - q_i+1(v), 0)` and `h_i = S_i / (S_i + 1 - w_i)`, but
    `h_K = w_K`, the tokens up to the last i that passes with probability h_i stay; the
    next follows `max(w_i p_i+1 - q_i+1, 0)`, or p_K+1 behind all. No lossless verifier
    of chains accepts more in expectation, and `maximal` never does. With one-hot drafts
    the two are the same.

    Source: arXiv 2403.10444.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5]] * 3], [[[0.8, 0.2]] * 3]]))
    >>> draft = Draft(jnp.array([[0, 1]]), jnp.array([2]), q[:, :2])
    >>> [f().outcomes(p, draft).sum(-1)[0].tolist() for f in (block, maximal)]
    [[0.0, 0.0, 1.0], [0.375, 0.0, 0.625]]
    """

    def weights(logits, draft):
        """`w_0 .. w_K`, `[B, K + 1]`; 0 behind the count."""
        ratio = _log_ratio(logits, draft)
        log_w = [jnp.zeros(ratio.shape[0])]
        for i in range(ratio.shape[1]):
            log_w.append(jnp.minimum(log_w[-1] + ratio[:, i], 0.0))
        return jnp.exp(jnp.stack(log_w, axis=1))

    def survival(logits, draft):
        w = weights(logits, draft)
        width = draft.tokens.shape[1]
        p = jnp.exp(law.log_probs(logits[:, 1:width]))  # behind 1 .. K - 1 tokens
        if draft.law is None:
            on_next = jnp.exp(_chosen(logits, draft.tokens))[:, 1:]
            surplus = w[:, 1:-1] * (1.0 - on_next)
        else:
            q = jnp.exp(law.log_probs(draft.law[:, 1:]))
            surplus = jnp.maximum(w[:, 1:-1, None] * p - q, 0.0).sum(-1)
        total = surplus + 1.0 - w[:, 1:-1]
        sure = total == 0
        h = jnp.where(sure, 1.0, surplus / jnp.where(sure, 1.0, total))
        h = jnp.concatenate([h, w[:, -1:]], axis=1)  # [B, K], for i = 1 .. K
        place = jnp.arange(1, width + 1)
        last = place == draft.count[:, None]
        h = jnp.where(last, w[:, 1:], jnp.where(place < draft.count[:, None], h, 0.0))
        return 1.0 - jnp.flip(jnp.cumprod(jnp.flip(1.0 - h, 1), axis=1), 1)

    def resume(logits, draft, accepted):
        w = weights(logits, draft)[jnp.arange(accepted.shape[0]), accepted]
        return _resume(logits, draft, accepted, w[:, None])

    return from_laws(survival, resume)


def typical(epsilon=0.09, delta=0.3) -> Verifier:
    """Medusa's typical acceptance. LOSSY: the text does not follow the target's law.

    x_i is accepted if `p_i(x_i) > min(epsilon, delta * exp(-H(p_i)))` and all before it
    are; the next token is the target's best. The draft's law is not read.

    Args:
      epsilon: probability that is always enough.
      delta: share of `exp(-entropy)` that is enough where the law is broad.

    Source: arXiv 2401.10774, section 2.3.1.

    >>> p = jnp.log(jnp.array([[[0.5, 0.4, 0.1]] * 2]))
    >>> draft = Draft(jnp.array([[1]]), jnp.array([1]))
    >>> typical(0.3).outcomes(p, draft)[0].round(2).tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """

    def survival(logits, draft):
        entropy = law.entropy(logits[:, :-1])
        enough = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
        kept = (jnp.exp(_chosen(logits, draft.tokens)) > enough) & offered(draft)
        return jnp.cumprod(kept.astype(jnp.float32), axis=1)

    def resume(logits, draft, accepted):
        del draft
        return warp.greedy()(logits[jnp.arange(accepted.shape[0]), accepted])

    return from_laws(survival, resume)
