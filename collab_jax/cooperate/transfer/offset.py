"""Tuning by offsets: what tuning did to a small model is added to a large one.

Every method here adds differences of log-probs to a base, so that each is one line over
`pool.linear`; they differ in what the members are. Members may have prompts of their
own (`combine.prefixed`): a chat model its template, the base the bare text.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import jax

from collab_jax.pool import Pool, linear


def proxy_tuning(alpha=1.0) -> Pool:
    """Proxy tuning of (base, expert, anti-expert): the base, tuned as the expert was.

    `log p = log p_0 + alpha (log p_+ - log p_-)`, up to a constant. The expert is the
    anti-expert after tuning, both small. No token is filtered.

    Args:
      alpha: strength; 1 in the paper, 0 is the base.

    Source: arXiv 2401.08565.

    >>> import jax.numpy as jnp
    >>> base, expert = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
    >>> jax.nn.softmax(proxy_tuning()([base, expert, base])).tolist()
    [0.8, 0.2]
    """
    return linear(1, alpha, -alpha)


def weak_to_strong(alpha=1.5) -> Pool:
    """Red-team measurement, of (strong, weak altered, weak): how shallow safety is.

    `log p = log p_strong + alpha (log p_altered - log p_weak)`, up to a constant: the
    arithmetic of proxy tuning, with the change of a small model carried over to a large
    one at decode time. It measures whether the safety of a model holds against whoever
    can add to its logits. No altered model comes with the library.

    Args:
      alpha: strength; 1.5 in the paper, 0 is the strong model.

    Source: arXiv 2401.17256.

    >>> import jax.numpy as jnp
    >>> strong, weak = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
    >>> jax.nn.softmax(weak_to_strong()([strong, weak, weak])).tolist()
    [0.9, 0.1]
    """
    return proxy_tuning(alpha)


def emulated(*weights) -> Pool:
    """Emulated fine-tuning of (base, tuned, reference, tuned, reference, ..).

    `log p = log p_0 + sum_i w_i (log p_tuned_i - log p_reference_i)`, up to a constant.
    A large base with a small pair is up-scaling, a small base with a large pair
    down-scaling. With weight 1 and the base as the reference it is the tuned model.

    Args:
      *weights: one for each pair; 1 in the paper.

    Raises:
      ValueError: without weights; when first called, for other numbers of members.

    Source: arXiv 2310.12962; several pairs as in arXiv 2405.19262.

    >>> import jax.numpy as jnp
    >>> base, tuned = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    >>> jax.nn.softmax(emulated(1.0)([base, tuned, base])).tolist()
    [0.8, 0.2]
    """
    if not weights:
        raise ValueError("emulated without weights: one for each pair is expected")
    signed = [factor for weight in weights for factor in (weight, -weight)]
    pool = linear(1, *signed)

    def pooled(members: Sequence[jax.Array]) -> jax.Array:
        if len(members) != 1 + 2 * len(weights):
            raise ValueError(
                f"{len(members)} members for {len(weights)} weights: the base and a "
                f"pair for each weight are expected, {1 + 2 * len(weights)} members"
            )
        return pool(members)

    return pooled


def dera(strength) -> Pool:
    """Decoding-time realignment of (SFT model, aligned model): alignment as a slider.

    `log p = (1 - s) log p_sft + s log p_aligned`, up to a constant: what alignment with
    its KL penalty divided by s would have made.

    Args:
      strength: s; 0 is the SFT model, 1 the aligned one, above 1 it extrapolates.

    Source: arXiv 2402.06694.

    >>> import jax.numpy as jnp
    >>> sft, aligned = jnp.log(jnp.array([[0.5, 0.5], [0.8, 0.2]]))
    >>> laws = [jax.nn.softmax(dera(s)([sft, aligned])) for s in (0.0, 1.0, 2.0)]
    >>> [round(float(law[0]), 3) for law in laws]
    [0.5, 0.8, 0.941]
    """
    return linear(1 - strength, strength)
