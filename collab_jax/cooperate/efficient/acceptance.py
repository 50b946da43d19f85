"""SpecDec++: a head foretells whether a drafted token will be accepted.

Drafting one token more is worth its cost only while all tokens so far are likely to be
accepted. The best policy is then a threshold: stop as soon as the probability that one
of them is rejected is above h. It may read the tokens drafted so far, the last one
included, and that one stays.

The head reads the draft's hidden state that the token was drawn from, the token's
log-probability and the entropy of its law. (The paper's head reads the state *behind*
the token, which is known one call later; so its product lags by one token.)

`acceptance_training` teaches the head.

Shapes: B rows, W width of the draft's hidden states, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from collab_jax import law
from collab_jax.cooperate.efficient.stopping import Stopping
from collab_jax.lm import Out
from collab_jax.models import heads
from collab_jax.models.heads import Head


def head(width: int, blocks: int = 3) -> Head:
    """The head: residual blocks and one number, the log-odds of acceptance.

    Args:
      width: W of the draft.
      blocks: residual blocks, each with weights of its own.

    Source: arXiv 2405.19715.

    >>> made = head(8, blocks=1)
    >>> made.apply(made.init(jax.random.key(0)), jnp.zeros((2, 10))).shape
    (2, 1)
    """
    return heads.residual(width + 2, 1, blocks)


def inputs(hidden: jax.Array, logits: jax.Array, token: jax.Array) -> jax.Array:
    """What the head reads: the hidden state, `log q(x)`, and the entropy of q.

    Args:
      hidden: `[..., W]`, behind which the token was drawn.
      logits: `[..., V]` of the law that it was drawn from.
      token: `[...]`.

    Returns:
      `[..., W + 2]` float32.

    >>> inputs(jnp.ones((1, 3)), jnp.zeros((1, 4)), jnp.array([2])).round(3).tolist()
    [[1.0, 1.0, 1.0, -1.386..., 1.386...]]
    """
    log_q = jnp.take_along_axis(law.log_probs(logits), token[..., None], axis=-1)
    entropy = law.entropy(logits)[..., None]
    parts = (hidden.astype(jnp.float32), jnp.maximum(log_q, -30.0), entropy)
    return jnp.concatenate(parts, axis=-1)


def foretold(
    head: Head, read: Callable[[Out], jax.Array] = lambda out: out.features.hidden
) -> Callable[..., jax.Array]:
    """The log-probability of acceptance by a head, an `Estimate` of `budget`.

    Args:
      head: of `head`.
      read: the hidden states `[B, W]` in the draft's outputs; given for composites,
        whose features are tuples.

    Returns:
      A function of (the head's parameters, outputs of the draft, token `[B]`).

    >>> from collab_jax.lm import Features
    >>> made = head(2, 0)
    >>> params = jax.tree.map(jnp.zeros_like, made.init(jax.random.key(0)))
    >>> out = Out(jnp.zeros((1, 3)), Features(jnp.ones((1, 2))))
    >>> jnp.exp(foretold(made)(params, out, jnp.array([1]))).tolist()
    [0.5]
    """

    def estimate(params, out, token):
        log_odds = head.apply(params, inputs(read(out), out.logits, token))
        return jax.nn.log_sigmoid(log_odds[:, 0])

    return estimate


def acceptance_head(
    head: Head,
    threshold,
    read: Callable[[Out], jax.Array] = lambda out: out.features.hidden,
) -> Stopping:
    """Stops when `1 - prod_i P(x_i accepted) > h`; the last token stays.

    Its parameters are the head's: those of `draft_lm(lm, K, stopping=...)` are the pair
    (parameters of the draft, parameters of the head).

    Args:
      head: of `head`, trained by `acceptance_tuner`.
      threshold: h, a probability; 0 stops behind the first token, 1 never.
      read: the hidden states `[B, W]` in the draft's outputs; given for composites,
        whose features are tuples.

    Source: SpecDec++, arXiv 2405.19715, whose h is 0.3.

    >>> from collab_jax.lm import Features
    >>> rule = acceptance_head(head(2, 0), 0.4)
    >>> params = {"out": {"kernel": jnp.array([[1.0], [0], [0], [0]]),
    ...     "bias": jnp.zeros(1)}}
    >>> out = Out(jnp.zeros((2, 3)), Features(jnp.array([[3.0, 0.0], [0.0, 0.0]])))
    >>> token, state = jnp.array([0, 0]), rule.init(params, 2)
    >>> for i in range(3):
    ...     state, stop = rule.step(params, state, i, out, token)
    ...     print(stop.tolist(), (1 - jnp.exp(state)).round(2).tolist())
    [False, True] [0.05..., 0.5]
    [False, True] [0.09..., 0.75]
    [False, True] [0.14..., 0.87...]
    """

    def init(params, batch):
        del params
        return jnp.zeros(batch, jnp.float32)

    estimate = foretold(head, read)

    def step(params, state, i, out, token):
        before = jnp.where(i == 0, 0.0, state)  # a new draft: nothing is at risk yet
        survival = before + estimate(params, out, token)
        return survival, -jnp.expm1(survival) > threshold

    return Stopping(init, step, lambda params, state, _: state)
