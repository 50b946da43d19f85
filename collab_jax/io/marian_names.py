"""The bijection between the tensors of a Marian checkpoint and its params tree."""

import numpy as np

from collab_jax.io.encoder_names import linear, norm, same
from collab_jax.io.names import Path, Rule
from collab_jax.models.marian_config import MarianConfig

BIAS = "final_logits_bias"

# the sub-layers of a layer: where in the tree, and the name in the checkpoint
SOURCE = (
    (("attention", "q"), "self_attn.q_proj"),
    (("attention", "k"), "self_attn.k_proj"),
    (("attention", "v"), "self_attn.v_proj"),
    (("attention", "o"), "self_attn.out_proj"),
    (("attention_norm",), "self_attn_layer_norm"),
    (("mlp", "up"), "fc1"),
    (("mlp", "down"), "fc2"),
    (("mlp_norm",), "final_layer_norm"),
)
CROSS = (
    (("cross", "q"), "encoder_attn.q_proj"),
    (("cross", "k"), "encoder_attn.k_proj"),
    (("cross", "v"), "encoder_attn.v_proj"),
    (("cross", "o"), "encoder_attn.out_proj"),
    (("cross_norm",), "encoder_attn_layer_norm"),
)


def rules(config: MarianConfig) -> tuple[Rule, ...]:
    """The bijection of one model, in the canonical order of its checkpoint.

    Args:
      config: what the model is made of.

    Returns:
      Rules; their paths are all leaves of the tree, their names all tensors, each once.

    >>> rules(MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8))[0].names
    ('model.shared.weight',)
    """
    c = config
    first = "model.shared.weight" if c.shared else "model.encoder.embed_tokens.weight"
    found = [same(("embed", "embedding"), first, c.source_vocab, c.width)]
    for i in range(c.source_layers):
        path, name = (f"source_layers_{i}",), f"model.encoder.layers.{i}"
        found += _layer(path, name, SOURCE, c.width, c.source_inner)
    if not c.shared:
        name = "model.decoder.embed_tokens.weight"
        found.append(same(("text_embed", "embedding"), name, c.vocab, c.width))
    parts = (*SOURCE[:5], *CROSS, *SOURCE[5:])
    for i in range(c.layers):
        path, name = (f"layers_{i}",), f"model.decoder.layers.{i}"
        found += _layer(path, name, parts, c.width, c.inner)
    found.append(_bias(c.vocab))
    if not c.tied:
        found.append(linear(("head",), "lm_head", c.width, c.vocab)[0])
    return tuple(found)


def _layer(path: Path, name: str, parts, width: int, inner: int) -> list[Rule]:
    found = []
    sizes = {"up": (width, inner), "down": (inner, width)}
    for ours, theirs in parts:
        at, theirs = (*path, *ours), f"{name}.{theirs}"
        if ours[-1].endswith("norm"):
            found += norm(at, theirs, width)
        else:
            found += linear(at, theirs, *sizes.get(ours[-1], (width, width)))
    return found


def _bias(vocab: int) -> Rule:
    """`[1, V]` on disk."""

    def save(leaves):
        return [np.asarray(leaves[0])[None]]

    return Rule(
        (("logit_bias",),),
        (BIAS,),
        ((1, vocab),),
        lambda tensors: [tensors[0][0]],
        save,
    )


def canonical(config: MarianConfig, name: str) -> str | None:
    """The canonical name of a tensor on disk, None for what needs no reading.

    Positions are computed, and tied tensors are stored again under other names.

    Args:
      config: what the model is made of.
      name: as found on disk.

    >>> config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8)
    >>> canonical(config, "lm_head.weight"), canonical(config, "final_logits_bias")
    (None, 'final_logits_bias')
    """
    if name.endswith("embed_positions.weight"):
        return None
    if config.tied and name == "lm_head.weight":
        return None
    if config.shared and name.endswith("coder.embed_tokens.weight"):
        return None
    return name
