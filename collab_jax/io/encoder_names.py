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
        same(("embed", "embedding"), FIRST, c.vocab, c.width),
        same(
            ("positions", "embedding"),
            "embeddings.position_embeddings.weight",
            c.positions,
            c.width,
        ),
    ]
    if c.token_types:
        name = "embeddings.token_type_embeddings.weight"
        found.append(same(("token_types", "embedding"), name, c.token_types, c.width))
    found += norm(("embed_norm",), "embeddings.LayerNorm", c.width)
    sizes = {"up": (c.width, c.mlp_width), "down": (c.mlp_width, c.width)}
    for i in range(c.layers):
        layer = f"transformer.layer.{i}" if distil else f"encoder.layer.{i}"
        for path, name in DISTILBERT if distil else BERT:
            path, name = (f"layers_{i}", *path), f"{layer}.{name}"
            if path[-1].endswith("norm"):
                found += norm(path, name, c.width)
            else:
                found += linear(path, name, *sizes.get(path[-1], (c.width, c.width)))
    if c.pooler:
        found += linear(("pooler",), "pooler.dense", c.width, c.width)
    return tuple(found)


def same(path: Path, name: str, *shape: int) -> Rule:
    """A tensor that is a leaf as it is.

    Args:
      path: of the leaf.
      name: of the tensor.
      *shape: of both.

    >>> same(("a", "bias"), "x.bias", 3).shapes
    ((3,),)
    """
    return Rule((path,), (name,), (shape,), list, list)


def _flip(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [np.ascontiguousarray(array.T) for array in arrays]


def linear(path: Path, name: str, size_in: int, size_out: int) -> list[Rule]:
    """A weight matrix, on disk `[out, in]`, and its bias.

    Args:
      path: of the projection.
      name: of the layer.
      size_in: I.
      size_out: O.

    >>> [rule.names for rule in linear(("up",), "fc1", 2, 3)]
    [('fc1.weight',), ('fc1.bias',)]
    """
    kernel = ((*path, "kernel"),)
    return [
        Rule(kernel, (f"{name}.weight",), ((size_out, size_in),), _flip, _flip),
        same((*path, "bias"), f"{name}.bias", size_out),
    ]


def norm(path: Path, name: str, width: int) -> list[Rule]:
    """The gain and the bias of a layer norm.

    Args:
      path: of the norm.
      name: of the layer.
      width: W.

    >>> [rule.names for rule in norm(("norm",), "ln", 2)]
    [('ln.weight',), ('ln.bias',)]
    """
    return [
        same((*path, "scale"), f"{name}.weight", width),
        same((*path, "bias"), f"{name}.bias", width),
    ]
