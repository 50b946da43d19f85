"""PackLLM: members weigh as much as they read the prompt well, row by row.

The weights are for `collab_jax.ensemble.weighted`, which fuses logits by default.

Shapes: B rows, T tokens of the prompt, N members, G trial weights, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from collab_jax.law import log_probs
from collab_jax.lm import LM, Params, padded
from collab_jax.score import score


def prompt_loss(
    lm: LM, params: Params, tokens: jax.Array, length: jax.Array, chunk: int = 128
) -> jax.Array:
    """The mean loss of a model over its prompts, `-mean_{t >= 1} log p(x_t | x_<t)`.

    In nats a token of its own: where tokenizers differ, the prompt is cut differently
    for each member, and one with longer tokens has the greater loss for as good a
    reading. Divide `loss * (length - 1)` by the bytes of the text to be rid of this.

    Args:
      lm: any LM.
      params: its parameters.
      tokens: `[B, T]` int32, right-padded.
      length: `[B]` int32.
      chunk: tokens consumed by one call.

    Returns:
      `[B]`; 0 for a row of fewer than two tokens.

    Source: arXiv 2404.11531.

    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), jnp.zeros((4, 3))
    >>> text = jnp.array([[0, 1, 2], [1, 0, 0]])
    >>> prompt_loss(lm, params, text, jnp.array([3, 1])).round(4).tolist()
    [1.0986, 0.0]
    """
    logprob = score(lm, params, tokens, length, chunk).logprob
    return -logprob.sum(-1) / jnp.maximum(length - 1, 1)


def by_perplexity(losses: jax.Array, tau: float | jax.Array = 1.0) -> jax.Array:
    """PackLLM-sim: `w[b, n] = softmax_n(-losses[b, n] / tau)`.

    Args:
      losses: `[B, N]`, of `prompt_loss`.
      tau: temperature; near 0 the best member alone, large for equal weights.

    Raises:
      ValueError: for a tau that is not positive.

    Source: arXiv 2404.11531; tau = 1 in its authors' code.

    >>> by_perplexity(jnp.log(jnp.array([[2.0, 6.0]]))).tolist()
    [[0.75, 0.25]]
    """
    if not isinstance(tau, jax.core.Tracer) and not float(tau) > 0:
        raise ValueError(f"tau = {tau}: a positive temperature is expected")
    return jax.nn.softmax(-losses / tau, axis=-1)


def by_search(
    members: Sequence[LM],
    params: Sequence[Params],
    tokens: jax.Array,
    length: jax.Array,
    steps: int = 20,
    chunk: int = 32,
) -> jax.Array:
    """PackLLM-opt: weights of fused logits that make the prompt likely, greedily.

    The members are taken in the order of their loss. Each is joined to those before it
    with the share that is best for the prompt,

        w <- lam w + (1 - lam) e_n,   lam = argmin_{0, 1/steps .. 1} loss(sum_m w_m z_m)

    where the first of several is taken.

    Args:
      members: N LMs over one vocabulary, such as those of `translate`, or of
        `lift.borrow` with a map by edit distance.
      params: of each.
      tokens: `[B, T]` int32 in this vocabulary, right-padded.
      length: `[B]` int32; a row of fewer than two tokens tells nothing, and its weights
        are equal.
      steps: of the grid of lam.
      chunk: tokens read by one call; the members' logits `[N, B, chunk, V]` exist at a
        time. The prompt is read N times, not once for every trial.

    Returns:
      `[B, N]`, of sum 1.

    Raises:
      ValueError: without members, for parameters that do not fit them, or no steps.

    Source: arXiv 2404.11531.

    >>> from collab_jax.models import table
    >>> lms = [table.language_model(0)] * 2
    >>> params = jnp.log(jnp.array([[0.9, 0.1]])), jnp.log(jnp.array([[0.3, 0.7]]))
    >>> text = jnp.array([[0, 0, 0, 0], [0, 1, 1, 1]])
    >>> by_search(lms, params, text, jnp.array([4, 4])).round(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    count = len(members)
    if not count or len(params) != count:
        raise ValueError(f"{len(params)} trees of parameters for {count} members")
    if steps < 1:
        raise ValueError(f"steps = {steps}: a grid of at least one step is expected")

    def losses(weights):
        return _losses(members, params, tokens, length, weights, chunk)

    rows = jnp.arange(tokens.shape[0])
    alone = jnp.eye(count)
    order = jnp.argsort(losses(jnp.tile(alone, (len(rows), 1, 1))), stable=True)
    lam = (jnp.arange(steps + 1) / steps)[:, None]  # [G, 1]
    weights = alone[order[:, 0]]
    for step in range(1, count):
        trial = lam * weights[:, None] + (1 - lam) * alone[order[:, step]][:, None]
        weights = trial[rows, jnp.argmin(losses(trial), axis=-1)]
    return jnp.where(length[:, None] < 2, 1 / count, weights)


def _losses(members, params, tokens, length, weights, chunk: int) -> jax.Array:
    """Summed loss of the prompts under each trial `weights[B, G, N]`, `[B, G]`."""
    batch, width = tokens.shape
    total = padded(width, chunk)
    chunk = min(chunk, total)
    tokens = jnp.pad(tokens, ((0, 0), (0, total - width)), mode="edge")
    pairs = [*zip(members, params, strict=True)]

    def read(states, i):
        piece = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        at = i * chunk + 1 + jnp.arange(chunk)  # what these positions predict
        target = tokens[:, jnp.minimum(at, total - 1), None]
        outs, states = zip(
            *(m.extend(p, s, piece) for (m, p), s in zip(pairs, states, strict=True)),
            strict=True,
        )

        def nats(weights):  # [B, N]
            fused = jnp.zeros_like(outs[0].logits)
            for n, out in enumerate(outs):
                w = weights[:, n, None, None]
                fused += jnp.where(w == 0, 0.0, w * out.logits)  # not 0 * -inf
            log_p = jnp.take_along_axis(log_probs(fused), target, axis=-1)[..., 0]
            return -jnp.where(at < length[:, None], log_p, 0.0).sum(-1)

        return states, jax.lax.map(nats, jnp.moveaxis(weights, 1, 0))

    start = tuple(m.init(p, batch, total) for m, p in pairs)
    _, found = jax.lax.scan(read, start, jnp.arange(total // chunk))
    return found.sum(0).T
