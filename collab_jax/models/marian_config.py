"""The shape of a Marian translation model: an encoder, and a decoder that reads it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from collab_jax.models.config import Config
from collab_jax.models.encoder_config import EncoderConfig

EPS = 1e-5  # of every layer norm; no config.json states it
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}  # the name in config.json -> the name here
# Switches of older files: only these values were ever released
FIXED = {
    "normalize_before": False,
    "normalize_embedding": False,
    "add_final_layer_norm": False,
    "static_position_embeddings": True,
    "add_bias_logits": False,
}


@dataclasses.dataclass(frozen=True)
class MarianConfig:
    """Sizes and switches of one model; hashable, so that it may be static in jit."""

    source_vocab: int
    vocab: int  # V, of the text that is written; that of the source where `shared`
    width: int  # W, of the hidden states
    source_layers: int
    source_heads: int
    source_inner: int  # width inside the MLP
    layers: int  # of the decoder
    heads: int
    inner: int
    context: int  # tokens of a text that the model was made for
    start: int  # the token that every text begins with
    activation: str = "silu"  # gelu, gelu_tanh, relu, silu
    scaled: bool = True  # embeddings are multiplied by sqrt(W)
    shared: bool = True  # source and text have one embedding
    tied: bool = True  # the head is the text's embedding
    eos: tuple[int, ...] = ()
    pad: int | None = None

    @property
    def source(self) -> EncoderConfig:
        """The layers of the encoder."""
        return EncoderConfig(
            family="marian",
            vocab=self.source_vocab,
            width=self.width,
            layers=self.source_layers,
            heads=self.source_heads,
            mlp_width=self.source_inner,
            positions=self.context,
            token_types=0,
            activation=self.activation,
            norm_eps=EPS,
        )

    @property
    def decoder(self) -> Config:
        """The layers of the decoder, but for their attention to the source."""
        return Config(
            family="marian",
            vocab=self.vocab,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_size=self.width // self.heads,
            inner=self.inner,
            context=self.context,
            rotary=(None,) * self.layers,
            windows=(None,) * self.layers,
            query_scale=(self.width // self.heads) ** -0.5,
            activation=self.activation,
            eps=EPS,
            layer_norm=True,
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
        )


def from_hf(raw: Mapping[str, Any]) -> MarianConfig:
    """Reads a config.json of Marian.

    Args:
      raw: the parsed file.

    Raises:
      ValueError: for another architecture, a missing size, or a switch that would
        change the logits and is not supported.

    >>> from_hf({"model_type": "marian", "vocab_size": 9, "d_model": 8,
    ...     "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    ...     "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
    ...     "decoder_start_token_id": 8, "pad_token_id": 8}).start
    8
    """
    family = raw.get("model_type")
    if family != "marian":
        raise ValueError(f"model_type {family!r}: 'marian' is expected")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key} = {raw[key]!r}: only {value!r} is supported")

    def size(key: str) -> int:
        if raw.get(key) is None:
            raise ValueError(f"config.json of marian lacks {key!r}")
        return raw[key]

    activation = raw.get("activation_function", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}"
        )
    shared = raw.get("share_encoder_decoder_embeddings", True)
    source, target = size("vocab_size"), raw.get("decoder_vocab_size")
    if shared and target not in (None, source):
        raise ValueError(
            f"one embedding for {source} tokens of the source and {target} of the text"
        )
    if shared and not raw.get("tie_word_embeddings", True):
        raise ValueError("one embedding for source and text, and a head of its own")
    eos = raw.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    config = MarianConfig(
        source_vocab=source,
        vocab=target or source,
        width=size("d_model"),
        source_layers=size("encoder_layers"),
        source_heads=size("encoder_attention_heads"),
        source_inner=size("encoder_ffn_dim"),
        layers=size("decoder_layers"),
        heads=size("decoder_attention_heads"),
        inner=size("decoder_ffn_dim"),
        context=raw.get("max_position_embeddings", 1024),
        start=size("decoder_start_token_id"),
        activation=ACTIVATIONS[activation],
        scaled=raw.get("scale_embedding", False),
        shared=shared,
        tied=raw.get("tie_word_embeddings", True),
        eos=tuple(eos),
        pad=raw.get("pad_token_id"),
    )
    for heads in (config.source_heads, config.heads):
        if config.width % heads:
            raise ValueError(
                f"width {config.width} is not a multiple of the {heads} heads"
            )
    return config


def to_hf(config: MarianConfig) -> dict[str, Any]:
    """A config.json which torch transformers loads to the same model.

    Args:
      config: the config.

    >>> config = MarianConfig(9, 9, 8, 1, 2, 16, 1, 2, 16, 32, 8, eos=(0,), pad=8)
    >>> from_hf(to_hf(config)) == config
    True
    """
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "is_encoder_decoder": True,
        "vocab_size": config.source_vocab,
        "decoder_vocab_size": config.vocab,
        "d_model": config.width,
        "encoder_layers": config.source_layers,
        "encoder_attention_heads": config.source_heads,
        "encoder_ffn_dim": config.source_inner,
        "decoder_layers": config.layers,
        "decoder_attention_heads": config.heads,
        "decoder_ffn_dim": config.inner,
        "max_position_embeddings": config.context,
        "activation_function": names[config.activation],
        "scale_embedding": config.scaled,
        "share_encoder_decoder_embeddings": config.shared,
        "tie_word_embeddings": config.tied,
        "decoder_start_token_id": config.start,
        "pad_token_id": config.pad,
        "eos_token_id": config.eos[0] if len(config.eos) == 1 else list(config.eos),
        "forced_eos_token_id": None,
        "bos_token_id": None,
    }
