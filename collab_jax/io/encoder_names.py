"""The bijection between an encoder's checkpoint tensors and its params tree.

Names are those of the bare model ("embeddings.word_embeddings.weight"); `prefix` finds
what a checkpoint with a head puts before them.
"""

from collections.abc import Iterable

import numpy as np

from collab_jax.io.names import Path, Rule
from collab_jax.models.encoder_config import EncoderConfig

PREFIXES = ("", "bert.", "roberta.", "distilbert.")
FIRST = "embeddings.word_embeddings.weight"

# the sub-layers of a layer: where in the tree, and the name in the checkpoint
BERT = (
    (("attention", "q"), "attention.self.query"),
    (("attention", "k"), "attention.self.key"),
    (("attention", "v"), "attention.self.value"),
    (("attention", "o"), "attention.output.dense"),
    (("attention_norm",), "attention.output.LayerNorm"),
    (("mlp", "up"), "intermediate.dense"),
    (("mlp", "down"), "output.dense"),
    (("mlp_norm",), "output.LayerNorm"),
)
DISTILBERT = (
    (("attention", "q"), "attention.q_lin"),
    (("attention", "k"), "attention.k_lin"),
    (("attention", "v"), "attention.v_lin"),
    (("attention", "o"), "attention.out_lin"),
    (("attention_norm",), "sa_layer_norm"),
    (("mlp", "up"), "ffn.lin1"),
    (("mlp", "down"), "ffn.lin2"),
    (("mlp_norm",), "output_layer_norm"),
)


def prefix(names: Iterable[str]) -> str:
    """What stands before the names of the bare model in this checkpoint.

    Args:
      names: of all tensors in the checkpoint.

    Raises:
      ValueError: where the word embeddings are not found.

    >>> prefix(["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"])
    'bert.'
    """
    names = set(names)
    for found in PREFIXES:
        if found + FIRST in names:
            return found
    raise ValueError(
        f"no tensor {FIRST!r} among {len(names)}, bare or behind {PREFIXES[1:]}; "
        f"found for example {sorted(names)[:3]}"
    )


def rules(config: EncoderConfig) -> tuple[Rule, ...]:
    """The bijection of one encoder, in the canonical order of its checkpoint.

    Args:
      config: what the encoder is made of.

    Returns:
      Rules; their paths are all leaves of the tree, their names all tensors, each once.

    >>> rules(EncoderConfig("bert", 9, 8, 1, 2, 16, 4, 2))[0].names
    ('embeddings.word_embeddings.weight',)
    """
    c, distil = config, config.family == "distilbert"
    found = [
        _same(("embed", "embedding"), FIRST, c.vocab, c.width),
        _same(
            ("positions", "embedding"),
            "embeddings.position_embeddings.weight",
            c.positions,
            c.width,
        ),
    ]
    if c.token_types:
        name = "embeddings.token_type_embeddings.weight"
        found.append(_same(("token_types", "embedding"), name, c.token_types, c.width))
    found += _norm(("embed_norm",), "embeddings.LayerNorm", c.width)
    sizes = {"up": (c.width, c.mlp_width), "down": (c.mlp_width, c.width)}
    for i in range(c.layers):
        layer = f"transformer.layer.{i}" if distil else f"encoder.layer.{i}"
        for path, name in DISTILBERT if distil else BERT:
            path, name = (f"layers_{i}", *path), f"{layer}.{name}"
            if path[-1].endswith("norm"):
                found += _norm(path, name, c.width)
            else:
                found += _linear(path, name, *sizes.get(path[-1], (c.width, c.width)))
    if c.pooler:
        found += _linear(("pooler",), "pooler.dense", c.width, c.width)
    return tuple(found)


def _same(path: Path, name: str, *shape: int) -> Rule:
    return Rule((path,), (name,), (shape,), list, list)


def _flip(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [np.ascontiguousarray(array.T) for array in arrays]


def _linear(path: Path, name: str, size_in: int, size_out: int) -> list[Rule]:
    kernel = ((*path, "kernel"),)
    return [
        Rule(kernel, (f"{name}.weight",), ((size_out, size_in),), _flip, _flip),
        _same((*path, "bias"), f"{name}.bias", size_out),
    ]


def _norm(path: Path, name: str, width: int) -> list[Rule]:
    return [
        _same((*path, "scale"), f"{name}.weight", width),
        _same((*path, "bias"), f"{name}.bias", width),
    ]
