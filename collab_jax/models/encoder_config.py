"""The shape of a bidirectional encoder: BERT, RoBERTa and DistilBERT."""

import dataclasses
from typing import Any

FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta")
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}  # the name in config.json -> the name here


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and switches of one encoder; hashable, so that it may be static in jit."""

    family: str  # one of FAMILIES: decides the names in the checkpoint, nothing else
    vocab: int  # V
    width: int  # W, of the hidden states
    layers: int
    heads: int  # each of width / heads
    mlp_width: int
    positions: int  # rows of the position table
    token_types: int  # rows of the token type table; 0 where there is none
    position_offset: int = 0  # row of the first token's position
    activation: str = "gelu"  # gelu, gelu_tanh, relu, silu
    norm_eps: float = 1e-12
    pad_id: int = 0
    pooler: bool = False  # a tanh layer over the first token, as classifiers use

    @property
    def capacity(self) -> int:
        """The longest text in tokens."""
        return self.positions - self.position_offset


def from_hf(config: dict[str, Any]) -> EncoderConfig:
    """Reads a `config.json` of a Hugging Face checkpoint.

    Args:
      config: the file as a dict.

    Returns:
      The config, without a pooler: only the tensors of a checkpoint tell if it has one.

    Raises:
      ValueError: for an unknown architecture, and for a variant of a known one that
        would silently be read wrongly.

    >>> from_hf({"model_type": "bert", "vocab_size": 9, "hidden_size": 8,
    ...          "num_hidden_layers": 1, "num_attention_heads": 2,
    ...          "intermediate_size": 16, "max_position_embeddings": 4,
    ...          "type_vocab_size": 2}).width
    8
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not a known encoder; known are "
            f"{', '.join(FAMILIES)}"
        )
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ValueError(
            f"position_embedding_type {kind!r}: only 'absolute' positions are read"
        )
    if config.get("is_decoder"):
        raise ValueError("is_decoder is true: an encoder without causal mask is read")
    if family == "distilbert":
        made = EncoderConfig(
            family=family,
            vocab=config["vocab_size"],
            width=config["dim"],
            layers=config["n_layers"],
            heads=config["n_heads"],
            mlp_width=config["hidden_dim"],
            positions=config["max_position_embeddings"],
            token_types=0,
            activation=_activation(config.get("activation", "gelu")),
            pad_id=config.get("pad_token_id") or 0,
        )
    else:
        # RoBERTa counts positions from the row behind the padding token's
        pad_id = config.get("pad_token_id")
        pad_id = (0 if family == "bert" else 1) if pad_id is None else pad_id
        made = EncoderConfig(
            family=family,
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            mlp_width=config["intermediate_size"],
            positions=config["max_position_embeddings"],
            token_types=config.get("type_vocab_size", 2),
            position_offset=0 if family == "bert" else pad_id + 1,
            activation=_activation(config.get("hidden_act", "gelu")),
            norm_eps=config.get("layer_norm_eps", 1e-12),
            pad_id=pad_id,
        )
    if made.width % made.heads:
        raise ValueError(
            f"width {made.width} is not a multiple of the {made.heads} heads"
        )
    return made


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation {name!r}: expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """A `config.json` which torch transformers loads to the same model.

    Args:
      config: the config.

    >>> hf = to_hf(EncoderConfig("bert", 9, 8, 1, 2, 16, 4, 2))
    >>> from_hf(hf) == EncoderConfig("bert", 9, 8, 1, 2, 16, 4, 2)
    True
    """
    architecture = {
        "bert": "BertModel",
        "distilbert": "DistilBertModel",
        "roberta": "RobertaModel",
        "xlm-roberta": "XLMRobertaModel",
    }[config.family]
    activation = "gelu_new" if config.activation == "gelu_tanh" else config.activation
    common = {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.positions,
        "pad_token_id": config.pad_id,
    }
    if config.family == "distilbert":
        return common | {
            "dim": config.width,
            "n_layers": config.layers,
            "n_heads": config.heads,
            "hidden_dim": config.mlp_width,
            "activation": activation,
            "sinusoidal_pos_embds": False,
        }
    return common | {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "type_vocab_size": config.token_types,
        "hidden_act": activation,
        "layer_norm_eps": config.norm_eps,
    }
