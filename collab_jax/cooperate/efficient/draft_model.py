"""A proposer made of any LM: a smaller model, or any composite of LMs.

Drafting K tokens takes K calls, of which the last token is not consumed. Should it be
accepted, the LM lacks it at the next round: the row *lags* by one token, and the first
call of that round is two tokens wide. A target that needs the draft's law behind the
last token asks for `whole`, which is one more call, and no lag.

Shapes: B rows, K longest draft, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient.draft import Draft, Proposer, check_size
from collab_jax.cooperate.efficient.stopping import Stopping
from collab_jax.lm import LM, Out, State, read_prompt


class DraftState(NamedTuple):
    """State of `draft_lm`."""

    inner: State  # of the LM; has consumed length - 1 - lag tokens
    lag: jax.Array  # [B] int32, 0 or 1
    consumed: jax.Array  # [B] int32, tokens consumed in this round but for the lag
    rule: Any  # of the stopping rule


def draft_lm(
    lm: LM,
    length: int,
    *,
    greedy: bool = False,
    stopping: Stopping | None = None,
    whole: bool = False,
    chunk: int | None = None,
) -> Proposer:
    """Proposes what an LM samples: `x_i ~ q(. | x_<i)`, i = 1 .. K.

    Temperature and the like are warps of the LM, and the draft's law is the warped one.
    A greedy draft, `x_i = argmax q(. | x_<i)`, has no law, and its LM is not warped: so
    a stopping rule sees how sure the LM is.

    Args:
      lm: any LM over the target's vocabulary.
      length: K, the longest draft.
      greedy: whether the likeliest token is proposed, in place of a sample.
      stopping: when to stop earlier, row by row; the calls end when all rows stopped.
      whole: whether `Draft.out` holds the outputs at the pending token and at all K
        tokens, for targets that read them; costs one more call.
      chunk: prompt tokens consumed by one call; None as `lm.piece` says.

    Returns:
      A proposer of chains. Its parameters are the LM's; with a stopping rule, the pair
      of the LM's and the rule's.

    Raises:
      ValueError: for a length below 1.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.log(jnp.eye(4, 3))
    >>> proposer = draft_lm(lm, 3)
    >>> tokens, length = jnp.array([[0, 2, 0, 0]]), jnp.array([2])
    >>> state = proposer.init(params, tokens, length, 4)
    >>> key = law.row_keys(jax.random.key(0), 1)
    >>> draft, state = proposer.propose(params, state, tokens, length, key)
    >>> draft.tokens.tolist(), draft.count.tolist(), draft.law.shape
    ([[2, 2, 2]], [3], (1, 3, 3))
    >>> proposer = draft_lm(lm, 3, greedy=True)
    >>> proposer.propose(params, state, tokens, length, key)[0].law is None
    True
    """
    size = check_size("length", length)

    def split(params):
        if stopping is None:
            return params, ()
        if not isinstance(params, tuple | list) or len(params) != 2:
            raise ValueError(
                f"a draft model with a stopping rule got a {type(params).__name__}: "
                "the pair (parameters of the LM, parameters of the rule) is expected"
            )
        return params

    def init(params, prompt, prompt_length, room):
        params, own = split(params)
        batch = prompt.shape[0]
        state = read_prompt(lm, params, prompt, prompt_length, room, chunk)
        zeros = jnp.zeros(batch, jnp.int32)
        rule = () if stopping is None else stopping.init(own, batch)
        return DraftState(state, zeros, zeros, rule)

    def begin(params, state, tokens, length):
        """Consumes the pending token, behind the one that lags: (Out [B, ...], LM)."""
        rows = jnp.arange(length.shape[0])
        if whole:
            out, inner = lm.extend(params, state.inner, tokens[rows, length - 1, None])
            return jax.tree.map(lambda x: x[:, 0], out), inner
        place = (length - 1 - state.lag)[:, None] + jnp.arange(2)
        place = jnp.minimum(place, tokens.shape[1] - 1)
        window = jnp.take_along_axis(tokens, place, axis=1)
        out, inner = lm.extend(params, state.inner, window)
        inner = lm.rewind(inner, 1 - state.lag)
        return jax.tree.map(lambda x: x[rows, state.lag], out), inner

    def propose(params, state, tokens, length, key):
        params, own = split(params)
        batch = length.shape[0]

        def keep(out):
            return out if whole else () if greedy else Out(out.logits)

        def known(out):
            """Rows that have a law: what is drawn from NaN or nothing is no draft."""
            return jnp.isfinite(out.logits.max(-1))

        def draw(i, out, going, rule):
            """One more token: (token, rows that go on, the rule's state)."""
            if greedy:
                token = law.best(out.logits)
            else:
                token = law.draw(out.logits, key, length + i)
            if stopping is not None:
                rule, halt = stopping.step(own, rule, i, out, token)
                going &= ~halt
            return token, going, rule

        def write(buffers, i, out):
            return jax.tree.map(lambda b, x: b.at[:, i].set(x), buffers, keep(out))

        def more(carry):
            i, _, _, _, going, *_ = carry
            return (i < size) & going.any()

        def step(carry):
            i, inner, drafted, count, going, outs, rule = carry
            last = jax.lax.dynamic_index_in_dim(drafted, i - 1, axis=1)
            out, inner = lm.extend(params, inner, last)
            out = jax.tree.map(lambda x: x[:, 0], out)
            going &= known(out)
            count += going
            token, going, rule = draw(i, out, going, rule)
            drafted, outs = drafted.at[:, i].set(token), write(outs, i, out)
            return i + 1, inner, drafted, count, going, outs, rule

        out, inner = begin(params, state, tokens, length)
        going = known(out)
        count = going.astype(jnp.int32)
        token, going, rule = draw(jnp.int32(0), out, going, state.rule)
        slots = size + whole
        outs = jax.tree.map(
            lambda x: jnp.zeros((batch, slots, *x.shape[1:]), x.dtype), keep(out)
        )
        drafted = jnp.zeros((batch, size), jnp.int32).at[:, 0].set(token)
        carry = jnp.int32(1), inner, drafted, count, going, write(outs, 0, out), rule
        carry = jax.lax.while_loop(more, step, carry)
        i, inner, drafted, count, _, outs, rule = carry
        if whole:
            last = jax.lax.dynamic_index_in_dim(drafted, i - 1, axis=1)
            out, inner = lm.extend(params, inner, last)
            outs = write(outs, i, jax.tree.map(lambda x: x[:, 0], out))
        drawn_from = None if greedy else outs.logits[:, :size]
        draft = Draft(drafted, count, drawn_from, None, outs if whole else None)
        consumed = jnp.full(batch, i + whole, jnp.int32)
        return draft, DraftState(inner, state.lag, consumed, rule)

    def observe(params, state, verified):
        params, own = split(params)
        kept = jnp.minimum(verified.count, state.consumed)
        inner = lm.rewind(state.inner, state.consumed - kept)
        rule = state.rule
        if stopping is not None:
            rule = stopping.observe(own, rule, verified)
        return DraftState(inner, verified.count - kept, state.consumed, rule)

    return Proposer(init, propose, observe, size, size)
