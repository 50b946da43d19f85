"""Gumbel-coupled verification: the very tokens that plain sampling would have drawn.

The token at a position is `argmax_v log p(v) + g(v)`, and the noise g depends on the
row key and the position alone. A draft that is drawn with the same noise is often the
same token; where it is, it stays. So the text does not depend on the draft at all: it
is that of `decode.sample` with the same keys, and only the speed differs.

Shapes: B rows, K tokens of a chain, V vocabulary.
"""

import jax
import jax.numpy as jnp

from collab_jax import law, slots
from collab_jax.cooperate.efficient.draft import Draft
from collab_jax.cooperate.efficient.verify import (
    Verifier,
    chain,
    check_draft,
    offered,
)
from collab_jax.lm import Out


def plain_tokens(key: jax.Array, length: jax.Array, logits: jax.Array) -> jax.Array:
    """What plain sampling draws at every position, `[B, T]`.

    Args:
      key: `[B]` row keys; not consumed.
      length: `[B]`, the position of the first token.
      logits: `[B, T, V]`.

    >>> key = law.row_keys(jax.random.key(0), 1)
    >>> z = jnp.zeros((1, 2, 5))
    >>> tokens = plain_tokens(key, jnp.array([3]), z)
    >>> [law.draw(z[:, i], key, jnp.array([3 + i]))[0] == tokens[0, i] for i in (0, 1)]
    [Array(True, dtype=bool), Array(True, dtype=bool)]
    """
    batch, width, vocab = logits.shape
    position = slots.positions(length, width).reshape(-1)
    tokens = law.draw(logits.reshape(-1, vocab), jnp.repeat(key, width), position)
    return tokens.reshape(batch, width)


def coupled_law(p: jax.Array, q: jax.Array, x: jax.Array) -> jax.Array:
    """The target's token given the draft's, when both are drawn with the same noise.

    With `r = q / p`, `E(s) = sum_w max(q(w), s p(w))` and `F(s) = integral_0^s 1 / E^2`

        P(v | x) = p(v) max(F(r(x)) - F(r(v)), 0) for v != x,   P(x | x) = 1 / E(r(x)).

    Between two neighbours of the sorted r, E is linear and the integral of 1 / E^2 is
    `(s_2 - s_1) / (E(s_1) E(s_2))`. Costs V^2.

    Args:
      p: `[..., V]` probabilities of the target.
      q: `[..., V]` probabilities of the draft.
      x: `[...]`, drawn from q.

    Returns:
      `[..., V]` probabilities.

    Source: the coupling of arXiv 2408.07978; the closed form by integration over the
    two arrival times.

    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.8, 0.2])
    >>> [coupled_law(p, q, jnp.array(x)).round(4).tolist() for x in (0, 1)]
    [[0.625, 0.375], [0.0, 1.0]]
    """
    possible = p > 0
    r = jnp.where(possible, q / jnp.where(possible, p, 1.0), 0.0)
    level = jnp.maximum(q[..., None, :], r[..., :, None] * p[..., None, :]).sum(-1)
    order = jnp.argsort(r, axis=-1)
    s = jnp.take_along_axis(r, order, -1)
    e = jnp.take_along_axis(level, order, -1)  # E at s; E(0) = 1
    before_s = jnp.concatenate([jnp.zeros_like(s[..., :1]), s[..., :-1]], -1)
    before_e = jnp.concatenate([jnp.ones_like(e[..., :1]), e[..., :-1]], -1)
    f = jnp.cumsum((s - before_s) / (e * before_e), axis=-1)
    endless = f[..., -1:] + 1.0 / e[..., -1:]  # F at infinity, where p is 0
    f = jnp.take_along_axis(f, jnp.argsort(order, axis=-1), -1)
    f = jnp.where(possible, f, endless)
    same = jnp.where(possible, 1.0 / level, 0.0)
    at_x = jnp.take_along_axis(f, x[..., None], -1)
    other = p * jnp.maximum(at_x - f, 0.0)
    return jnp.where(jnp.arange(p.shape[-1]) == x[..., None], same, other)


def gumbel() -> Verifier:
    """Keeps drafted tokens as long as plain sampling would have drawn the same.

    The text is that of `decode.sample(target)` with the same keys, whatever the draft,
    up to ties of `logits + noise` within rounding; a run may be resumed anywhere. The
    price is acceptance: at least `(1 - d) / (1 + d)` at total variation d, where
    `maximal` has `1 - d`.

    Source: arXiv 2408.07978.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5]] * 2], [[[0.8, 0.2]] * 2]]))
    >>> draft = Draft(jnp.array([[0]]), jnp.array([1]), q[:, :1])
    >>> gumbel().outcomes(p, draft)[0].tolist()
    [[0.0, 0.375], [0.3125, 0.3125]]
    """

    def verify(key, length, out: Out, draft: Draft):
        check_draft(out.logits, draft, chain=True)
        tokens = plain_tokens(key, length, out.logits)
        same = (tokens[:, :-1] == draft.tokens) & offered(draft)
        accepted = jnp.cumprod(same, axis=1).sum(-1, dtype=jnp.int32)
        own = jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]
        return chain(draft, out, accepted, own)

    def outcomes(logits, draft):
        check_draft(logits, draft, chain=True)
        p = jnp.exp(law.log_probs(logits))
        if draft.law is None:
            given = p[:, :-1]
        else:
            q = jnp.exp(law.log_probs(draft.law))
            given = coupled_law(p[:, :-1], q, draft.tokens)
        here = offered(draft)[:, :, None]
        hit = jax.nn.one_hot(draft.tokens, p.shape[-1]) * here  # [B, K, V]
        passed = jnp.cumprod((given * hit).sum(-1), axis=1)
        reach = jnp.pad(passed, ((0, 0), (1, 0)), constant_values=1.0)
        missed = jnp.where(here, given * (1.0 - hit), p[:, :-1])
        return reach[:, :, None] * jnp.concatenate([missed, p[:, -1:]], axis=1)

    return Verifier(verify, outcomes, coupled=True)
