"""Contrast of routing depths: the other experts of a mixture of experts contribute too.

One set of weights is two models: the one that was trained, and one in which every token
is read by its k-th expert alone.
"""

import dataclasses

from collab_jax.combine import product
from collab_jax.lm import LM, language_model
from collab_jax.models.config import Config
from collab_jax.models.transformer import transformer
from collab_jax.pool import contrast


def rank_k(config: Config, k: int) -> Config:
    """The same model, in which every token is read by its k-th most probable expert.

    Its parameters are those of the model.

    Args:
      config: of a mixture of experts.
      k: rank of the expert, from 1.

    Raises:
      ValueError: for a model without experts, or a rank that they do not have.

    Source: "rank-k routing" of arXiv 2405.14507.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "mixtral", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...     "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2})
    >>> weak = rank_k(config, 3)
    >>> weak.active, weak.skipped
    (1, 2)
    """
    if not config.experts:
        raise ValueError(
            f"a {config.family} model without experts: rank-k routing needs a mixture "
            "of experts"
        )
    if not 1 <= k <= config.experts:
        raise ValueError(f"k = {k}: a rank from 1 to {config.experts} is expected")
    return dataclasses.replace(config, active=1, skipped=k - 1, renormalise=True)


def scmoe(config: Config, k: int, alpha=0.1, beta=0.5) -> LM:
    """Self-contrast of a mixture of experts: its routing less rank-k routing.

    `log p = (1 + beta) log p_strong - beta log p_weak` where `p_strong >= alpha max
    p_strong`, else -inf. Two runs of the model a token, each with a cache of its own.

    Args:
      config: of a mixture of experts.
      k: rank of the one expert of the weak member, from 1.
      alpha: plausibility, in [0, 1]; 0.1 in the paper.
      beta: strength; 0.5 in the paper, 0 is the model.

    Returns:
      An LM whose parameters are `(params, params)`, the model's twice, not copied.

    Raises:
      ValueError: as in `rank_k` and `pool.contrast`.

    Source: arXiv 2405.14507.

    >>> import jax
    >>> from collab_jax.models import transformer as models
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "mixtral", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...     "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2})
    >>> params = models.init(jax.random.key(0), config)
    >>> lm, both = scmoe(config, 2), (params, params)
    >>> text = jax.numpy.array([[1, 2, 3]])
    >>> lm.extend(both, lm.init(both, 1, 4), text)[0].logits.shape
    (1, 3, 10)
    """
    members = [language_model(transformer(c)) for c in (config, rank_k(config, k))]
    return product(members, contrast(alpha, beta))
