"""DistillSpec: a draft model learns the law of its target, on text that it writes.

At total variation d(p, q), a drafted token is accepted with probability 1 - d. So the
draft is trained towards the target's whole law at every position, not to its tokens;
and on text of its own (`on_policy`), as it meets that text when it drafts.

Shapes: N rows of data, B rows of a batch, T tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from collab_jax import law
from collab_jax.decoder import Decoder, Sequences, pad, run
from collab_jax.finetune import Finetuner, descent, over_positions
from collab_jax.lm import Backbone, Params
from collab_jax.packing import Batch

# (log_p, log_q) [..., V] of the target and the draft, normalised -> [...]
Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`KL(p || q) = sum_v p(v) log p(v) / q(v)`: q covers all that p does.

    Args:
      log_p: `[..., V]` log-probs of the target.
      log_q: `[..., V]` of the draft.

    Returns:
      `[...]`, nats.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    >>> round(float(forward_kl(p, q)), 4)
    0.2231
    """
    absent = jnp.isneginf(log_p)
    # where p is 0 nothing counts, and the ratio would be NaN
    ratio = jnp.where(absent, 0.0, log_p) - jnp.where(absent, 0.0, log_q)
    return jnp.sum(jnp.exp(log_p) * ratio, axis=-1)


def reverse_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`KL(q || p) = sum_v q(v) log q(v) / p(v)`: q keeps to where p is likely.

    Args:
      log_p: `[..., V]` log-probs of the target.
      log_q: `[..., V]` of the draft.

    Returns:
      `[...]`, nats.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    >>> round(float(reverse_kl(p, q)), 4)
    0.1927
    """
    return forward_kl(log_q, log_p)


def jensen_shannon(beta: float = 0.5) -> Divergence:
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q`.

    Args:
      beta: share of the target, between 0 and 1; near 0 it goes like the forward KL, at
        1 like the reverse one.

    Raises:
      ValueError: for a share that is not between 0 and 1.

    Source: generalised Jensen-Shannon divergence, arXiv 2306.13649.

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    >>> round(float(jensen_shannon()(p, q)), 4)
    0.0507
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta = {beta}: a share between 0 and 1 is expected; the limits are "
            "forward_kl and reverse_kl"
        )

    def divergence(log_p, log_q):
        middle = _log_mean(log_p, log_q, beta)
        ours = forward_kl(log_p, middle)
        return beta * ours + (1 - beta) * forward_kl(log_q, middle)

    return divergence


def total_variation(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`1/2 sum_v |p(v) - q(v)|`: the probability that a drafted token is rejected.

    Args:
      log_p: `[..., V]` log-probs of the target.
      log_q: `[..., V]` of the draft.

    Returns:
      `[...]`, in [0, 1].

    >>> p, q = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    >>> round(float(total_variation(p, q)), 4)
    0.3
    """
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def _log_mean(log_p, log_q, beta):
    top = jax.lax.stop_gradient(jnp.maximum(log_p, log_q))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    mean = beta * jnp.exp(log_p - top) + (1 - beta) * jnp.exp(log_q - top)
    none = mean == 0.0
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1.0, mean)) + top)


def distill_loss(
    student: Backbone,
    teacher: Backbone,
    params: Params,
    base: Params,
    batch: Batch,
    divergence: Divergence = forward_kl,
    chunk: int = 64,
) -> jax.Array:
    """Weighted mean over the text of `D(p(. | x_<t), q(. | x_<t))`.

    The teacher is frozen: its gradient is 0. Logits of both exist for `chunk` positions
    at a time and are made again for the gradient.

    Args:
      student: the draft, run without a cache.
      teacher: the target, likewise; over the same vocabulary.
      params: of the student.
      base: of the teacher.
      batch: tokens `[B, T]` and weights `[B, T]`; a token's weight is that of the law
        it was drawn from.
      divergence: D.
      chunk: positions whose logits exist at one time.

    Returns:
      A float32 scalar; 0 where all weights are 0.

    Raises:
      ValueError: for vocabularies that differ.

    Source: DistillSpec, arXiv 2310.08461.

    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> small = transformer.transformer(config)
    >>> p, q = (transformer.init(jax.random.key(k), config) for k in (0, 1))
    >>> batch = Batch(jnp.array([[1, 2, 3]]), jnp.ones((1, 3)))
    >>> float(distill_loss(small, small, p, p, batch))
    0.0
    >>> bool(distill_loss(small, small, q, p, batch) > 0)
    True
    """
    tokens = jnp.asarray(batch.tokens)[:, :-1]
    weights = jnp.asarray(batch.weights)[:, 1:].astype(jnp.float32)
    base = jax.lax.stop_gradient(base)

    def hidden(backbone, params):
        return backbone.features(params, None, backbone.embed(params, tokens))[0].hidden

    @jax.checkpoint
    def part(ours, theirs, weights):
        q = student.unembed(params, ours)
        p = jax.lax.stop_gradient(teacher.unembed(base, theirs))
        if p.shape != q.shape:
            raise ValueError(
                f"a teacher over {p.shape[-1]} tokens and a student over {q.shape[-1]}:"
                " one vocabulary is expected"
            )
        apart = divergence(law.log_probs(p), law.log_probs(q))
        return jnp.where(weights == 0, 0.0, weights * apart).sum()

    theirs = jax.lax.stop_gradient(hidden(teacher, base))
    total = over_positions(part, (hidden(student, params), theirs, weights), chunk)
    whole = weights.sum()
    return jnp.where(whole > 0, total / jnp.where(whole > 0, whole, 1.0), 0.0)


def distiller(
    student: Backbone,
    teacher: Backbone,
    optimizer: optax.GradientTransformation,
    divergence: Divergence = forward_kl,
    chunk: int = 64,
) -> Finetuner:
    """Gradient steps on `distill_loss`; `base` are the parameters of the teacher.

    Args:
      student: the draft.
      teacher: the target.
      optimizer: any optax transformation.
      divergence: what is to become small.
      chunk: positions whose logits exist at one time.

    Source: DistillSpec, arXiv 2310.08461.

    >>> from collab_jax.finetune import fit
    >>> from collab_jax.models import transformer
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> small = transformer.transformer(config)
    >>> p, q = (transformer.init(jax.random.key(k), config) for k in (0, 1))
    >>> data = Batch(np.array([[1, 2, 3]]), np.ones((1, 3), np.float32))
    >>> tuner = distiller(small, small, optax.adam(0.01))
    >>> _, history = fit(tuner, q, data, base=p, epochs=5, progress=False)
    >>> history[-1] < history[0]
    True
    """

    def objective(params: Params, base: Params, batch: Batch) -> jax.Array:
        return distill_loss(student, teacher, params, base, batch, divergence, chunk)

    return descent(objective, optimizer)


def written(result: Sequences) -> Batch:
    """What a decoder wrote, as data to train on: prompts have weight 0.

    Args:
      result: of any decoder.

    Returns:
      Numpy arrays `[B, L]`; what lies behind the end of a row has weight 0 too.

    >>> tokens, length = jnp.array([[5, 7, 8, 0]]), jnp.array([3])
    >>> written(Sequences(tokens, length, jnp.array([1]), None, None)).weights.tolist()
    [[0.0, 1.0, 1.0, 0.0]]
    """
    tokens = np.asarray(result.tokens)
    place = np.arange(tokens.shape[1])
    new = place >= np.asarray(result.prompt_length)[:, None]
    new &= place < np.asarray(result.length)[:, None]
    return Batch(
        np.where(place < np.asarray(result.length)[:, None], tokens, 0), 1.0 * new
    )


def on_policy(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    batch_size: int = 8,
) -> Batch:
    """Text that a model writes behind prompts, as data to train on.

    The student's own text, `sample(student, n)`, is on policy and costs little; the
    teacher's may be written by speculation. DistillSpec trains on either or a mixture:
    concatenate them.

    Args:
      decoder: of the student, or of the teacher.
      params: its parameters.
      prompts: N lists of tokens.
      key: one typed key; consumed.
      batch_size: rows decoded together.

    Returns:
      Numpy arrays `[N, L]`, L the longest prompt and all new tokens.

    Raises:
      ValueError: for no prompts, or an empty one.

    >>> from collab_jax.decode import sample
    >>> from collab_jax.models import table
    >>> lm, params = table.language_model(1), table.init(jax.random.key(0), 5, 1)
    >>> data = on_policy(sample(lm, 3), params, [[1], [2, 3]], jax.random.key(1))
    >>> data.tokens.shape, data.weights.sum(1).tolist()
    ((2, 5), [3.0, 3.0])
    """
    tokens, length = pad(prompts)
    count = tokens.shape[0]
    batch_size = min(batch_size, count)
    program = jax.jit(lambda *arguments: run(decoder, *arguments))
    found = []
    for start in range(0, count, batch_size):
        rows = np.minimum(start + np.arange(batch_size), count - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            key, start + np.arange(batch_size)
        )
        result = program(params, tokens[rows], length[rows], keys)
        found.append(written(result))
    joined = [np.concatenate(leaves)[:count] for leaves in zip(*found, strict=True)]
    return Batch(joined[0], joined[1].astype(np.float32))
