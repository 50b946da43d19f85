"""Pools whose knobs depend on the laws they join.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence

import jax

from collab_jax.law import log_probs
from collab_jax.pool import Pool, check_members


def gated(gate: Callable[..., jax.Array], pool: Callable[[jax.Array], Pool]) -> Pool:
    """A pool whose knob is found anew at every place: `pool(gate(laws))(members)`.

    The gate reads the law at a place alone, so that the composite obeys the laws of an
    LM whatever the gate does.

    Args:
      gate: from the log-probs of the members, `[B, T, V]` each, to a knob: `[B, T, 1]`
        for one at every place, `[B, T, V]` for one at every token of it.
      pool: from the knob to a pool, such as `lambda a: linear(1 + a, -a)`.

    >>> import jax.numpy as jnp
    >>> from collab_jax.pool import mixture
    >>> sure = lambda p, q: jnp.exp(p.max(-1, keepdims=True))  # the first, if it is
    >>> pool = gated(sure, lambda w: mixture(w, 1 - w))
    >>> members = jnp.log(jnp.array([[[[0.9, 0.1]]], [[[0.5, 0.5]]]]))
    >>> jax.nn.softmax(pool(members))[0, 0].tolist()  # 0.9 * 0.9 + 0.1 * 0.5
    [0.86, 0.14]
    """

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        check_members(members, None)
        return pool(gate(*[log_probs(member) for member in members]))(members)

    return pooled
