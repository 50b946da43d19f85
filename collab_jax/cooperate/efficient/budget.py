"""A budget of drafted tokens for the whole batch, spent where drafts are surest.

Rows of one batch share what a round may draft: a row whose draft is likely to stand
goes on, and one whose draft is probably lost stops. A stopping rule that reads the
other rows too keeps every row's *law*, as their tokens are drawn with other keys; but
it does not keep the *run*: which tokens a row gets depends on who shares its batch.

Shapes: B rows, K longest draft.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient.draft import check_size
from collab_jax.cooperate.efficient.stopping import Stopping
from collab_jax.lm import Out

# (params, out [B, ...], token [B]) -> [B], the log-probability that the token, just
# drafted from out, will be accepted
Estimate = Callable[[Any, Out, jax.Array], jax.Array]


class BudgetState(NamedTuple):
    """State of `budget`."""

    survival: jax.Array  # [B] log-probability that all tokens drafted are accepted
    going: jax.Array  # [B] bool, rows that have not stopped
    live: jax.Array  # [B] bool, rows that were not done when last heard of
    spent: jax.Array  # [] int32, tokens drafted in this round by rows that are live


def confidence(params: Any, out: Out, token: jax.Array) -> jax.Array:
    """An estimate without parameters: the draft's own log-probability of the token.

    Args:
      params: not read.
      out: of the draft, `[B, V]` logits.
      token: `[B]`.

    >>> out = Out(jnp.log(jnp.array([[0.75, 0.25]])))
    >>> jnp.exp(confidence((), out, jnp.array([0]))).round(2).tolist()
    [0.75]
    """
    del params
    log_q = law.log_probs(out.logits)
    return jnp.take_along_axis(log_q, token[:, None], axis=-1)[:, 0]


def budget(total: int, length: int, estimate: Estimate = confidence) -> Stopping:
    """Drafts at most `total` tokens a round over all rows, the likeliest to be kept.

    The i-th token of a row is worth drafting with the probability that all before it
    are accepted, `s_b,i = prod_j<i P(x_b,j)`. Those not drafted yet are foreseen to go
    on at the row's mean rate, and a row goes on while its next token is among the best
    that are left to spend, over all rows and lengths. Every row drafts one token, also
    if the rows are more than `total`; rows that are done spend nothing.

    The law of every row is kept, as a rule may read what was drafted so far; the run is
    not: it depends on the batch.

    The target's call has one shape, whatever was drafted. So this saves calls of the
    draft (they end with the longest row), and the work of targets that skip what was
    not drafted.

    Args:
      total: tokens a round.
      length: K, of the proposer.
      estimate: how likely a token is to be accepted; its parameters are the rule's.

    Raises:
      ValueError: for sizes below 1.

    Source: adaptive verification in vLLM, which chooses among drafted tokens by their
    own confidence; that is not lossless for sampled drafts, and here not done.

    >>> rule = budget(total=3, length=4)
    >>> out = Out(jnp.log(jnp.array([[0.9, 0.1], [0.6, 0.4]])))
    >>> state, token = rule.init((), 2), jnp.array([0, 0])
    >>> state, stop = rule.step((), state, jnp.array(0), out, token)
    >>> stop.tolist(), int(state.spent)
    ([False, True], 2)
    """
    check_size("total", total)
    check_size("length", length)

    def init(params, batch):
        del params
        yes = jnp.ones(batch, bool)
        return BudgetState(jnp.zeros(batch), yes, yes, jnp.int32(0))

    def step(params, state, i, out, token):
        first = jnp.asarray(i) == 0  # of a new draft
        going = jnp.where(first, state.live, state.going)
        spent = jnp.where(first, 0, state.spent) + going.sum(dtype=jnp.int32)
        before = jnp.where(first, 0.0, state.survival)
        survival = before + estimate(params, out, token)
        rate = survival / (i + 1)
        ahead = jnp.arange(length)  # worth of the next token, and of those behind it
        worth = survival[:, None] + rate[:, None] * ahead
        open_ = going[:, None] & (ahead < length - 1 - i)
        worth = jnp.where(open_, worth, -jnp.inf)
        order = jnp.argsort(-worth.reshape(-1), stable=True)
        rank = jnp.argsort(order).reshape(worth.shape)[:, 0]  # of the next token
        going &= open_[:, 0] & (rank < total - spent)
        return BudgetState(survival, going, state.live, spent), ~going

    def observe(params, state, verified):
        del params
        return state._replace(live=verified.count > 0)

    return Stopping(init, step, observe)
