"""What a decoder transformer is made of, and its translation from and to config.json.

One `Config` describes every family: a family is a choice of its fields. Reading a
config.json either understands everything that changes the logits or raises an error
that names what it did not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from collab_jax.models import positions
from collab_jax.models.defaults import ARCHITECTURES, DEFAULTS
from collab_jax.models.rotary import LongRope, Rotary


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder transformer. Frozen and hashable; sizes are counts of dimensions."""

    family: str  # the name in config.json: decides the names of the tensors on disk
    vocab: int
    width: int  # of the hidden states
    layers: int
    heads: int  # of queries
    kv_heads: int  # of keys and values; divides heads
    head_size: int
    inner: int  # width inside the dense MLP
    context: int  # tokens that the model was made for
    rotary: tuple[Rotary | None, ...]  # one per layer
    windows: tuple[
        int | None, ...
    ]  # one per layer: how far back it sees, itself counted
    query_scale: float  # scores = query_scale * q . k
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu
    eps: float = 1e-6
    layer_norm: bool = False  # mean and bias too; otherwise root mean square
    norm_offset: float = 0.0  # y = (offset + scale) * normed
    pre_norm: bool = True  # norm before attention and MLP
    post_norm: bool = False  # norm after them, before the residual sum
    parallel: bool = False  # attention and MLP read the same hidden states
    gated: bool = True  # MLP = down(activation(gate x) * up x); else down(act(up x))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False  # norm of queries and keys, per head
    width_norm: bool = False  # norm of queries and keys, over all heads together
    attention_cap: float | None = None  # scores = cap * tanh(scores / cap)
    logit_cap: float | None = None
    embed_scale: float = 1.0
    learned_positions: int = 0  # rows of the table of learned positions; 0 = no table
    tied: bool = False  # the head is the embedding
    sparse: tuple[bool, ...] = ()  # per layer: experts in the place of the MLP
    experts: int = 0
    active: int = 0  # experts that read each token
    skipped: int = 0  # more probable experts that do not
    expert_inner: int = 0  # width inside an expert
    renormalise: bool = True  # the weights of the active experts sum to one
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Keys of other families that change the logits when they are set, and whose meaning for
# the families here is not known.
_FOREIGN = (
    "quantization_config",
    "use_bidirectional_attention",
    "add_cross_attention",
    "scale_attn_by_inverse_layer_idx",
    "clip_qkv",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "no_rope_layers",
    "attention_chunk_size",
)


def from_hf(raw: Mapping[str, Any]) -> Config:
    """Reads a config.json of transformers 4 or 5 into a `Config`.

    Args:
      raw: the parsed file. Of a multimodal Gemma 3 the text part is read.

    Raises:
      ValueError: for an architecture that is not known, a missing size, or a feature
        that would change the logits and is not supported; the message names it.

    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2})
    >>> config.head_size, config.kv_heads, config.rotary[0].base
    (4, 2, 10000.0)
    """
    if raw.get("model_type") == "gemma3" and "text_config" in raw:
        outer = {k: raw[k] for k in ("bos_token_id", "eos_token_id") if k in raw}
        raw = {**outer, "model_type": "gemma3_text", **raw["text_config"]}
    family = raw.get("model_type")
    if family not in DEFAULTS:
        raise ValueError(
            f"unknown architecture {family!r} (model_type in config.json); known are "
            + ", ".join(sorted(DEFAULTS))
        )
    for key in _FOREIGN:
        if raw.get(key):
            raise ValueError(
                f"config.json of {family} sets {key}={raw[key]!r}, "
                "which is not supported"
            )
    fields = _Fields(family, {**DEFAULTS[family], **raw})
    config = _gpt2(fields) if family == "gpt2" else _rotary_family(fields)
    if min(config.heads, config.kv_heads) < 1 or config.heads % config.kv_heads:
        raise ValueError(
            f"{config.heads} query heads must be a positive multiple of "
            f"{config.kv_heads} key-value heads"
        )
    if config.head_size % 2 and any(r and r.fraction == 1 for r in config.rotary):
        raise ValueError(
            f"heads of {config.head_size} dimensions: rotary positions turn pairs of "
            "them, an even number is expected"
        )
    return config


class _Fields(dict):
    """The keys of a config.json; a missing one is an error that names it."""

    def __init__(self, family: str, raw: Mapping[str, Any]):
        super().__init__(raw)
        self.family = family

    def __missing__(self, key: str):
        raise ValueError(f"config.json of {self.family} lacks {key!r}")

    def activation(self, key: str) -> str:
        if self[key] not in _ACTIVATIONS:
            raise ValueError(
                f"unknown activation {key}={self[key]!r}; known are "
                + ", ".join(sorted(_ACTIVATIONS))
            )
        return _ACTIVATIONS[self[key]]

    def tokens(self) -> dict[str, Any]:
        eos = self.get("eos_token_id")
        return {
            "bos": self.get("bos_token_id"),
            "eos": tuple(eos)
            if isinstance(eos, list)
            else ()
            if eos is None
            else (eos,),
            "pad": self.get("pad_token_id"),
        }


def _gpt2(raw: _Fields) -> Config:
    width, heads, layers = raw["n_embd"], raw["n_head"], raw["n_layer"]
    size = _divide(width, heads)
    return Config(
        family="gpt2",
        vocab=raw["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=size,
        inner=raw["n_inner"] or 4 * width,
        context=raw["n_positions"],
        rotary=(None,) * layers,
        windows=(None,) * layers,
        query_scale=size**-0.5 if raw["scale_attn_weights"] else 1.0,
        activation=raw.activation("activation_function"),
        eps=raw["layer_norm_epsilon"],
        layer_norm=True,
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=raw["n_positions"],
        tied=raw["tie_word_embeddings"],
        sparse=(False,) * layers,
        **raw.tokens(),
    )


def _rotary_family(raw: _Fields) -> Config:
    family = raw.family
    gemma = family in ("gemma2", "gemma3_text")
    neox = family == "gpt_neox"
    width, heads, layers = (
        raw["hidden_size"],
        raw["num_attention_heads"],
        raw["num_hidden_layers"],
    )
    kv_heads = heads if neox else raw["num_key_value_heads"] or heads
    size = _divide(width, heads) if neox else raw["head_dim"] or _divide(width, heads)
    biased = bool(raw["attention_bias"])
    if family == "gemma3_text" and raw["attn_logit_softcapping"] is not None:
        raise ValueError(
            "gemma3_text sets attn_logit_softcapping, which its reference ignores"
        )
    kinds = positions.layer_kinds(family, raw, layers)
    return Config(
        family=family,
        vocab=raw["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        inner=raw["intermediate_size"],
        context=raw["max_position_embeddings"],
        rotary=positions.read(family, raw, kinds, size),
        windows=tuple(
            raw["sliding_window"] if kind == "sliding_attention" else None
            for kind in kinds
        ),
        query_scale=(raw["query_pre_attn_scalar"] if gemma else size) ** -0.5,
        activation=raw.activation("hidden_activation" if gemma else "hidden_act"),
        eps=raw["layer_norm_eps" if neox else "rms_norm_eps"],
        layer_norm=neox,
        norm_offset=1.0 if gemma else 0.0,
        pre_norm=family != "olmo2",
        post_norm=gemma or family == "olmo2",
        parallel=neox and raw["use_parallel_residual"],
        gated=not neox,
        qkv_bias=family == "qwen2" or biased,
        out_bias=family != "qwen2" and biased,
        mlp_bias=neox or (family == "llama" and bool(raw["mlp_bias"])),
        head_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        width_norm=family == "olmo2",
        attention_cap=raw["attn_logit_softcapping"] if gemma else None,
        logit_cap=raw["final_logit_softcapping"] if gemma else None,
        embed_scale=width**0.5 if gemma else 1.0,
        tied=raw["tie_word_embeddings"],
        **_experts(raw, layers),
        **raw.tokens(),
    )


def _experts(raw: _Fields, layers: int) -> dict[str, Any]:
    if raw.family == "mixtral":
        return {
            "sparse": (True,) * layers,
            "experts": raw["num_local_experts"],
            "active": raw["num_experts_per_tok"],
            "expert_inner": raw["intermediate_size"],
        }
    if raw.family == "qwen3_moe" and raw["num_experts"]:
        dense = set(raw["mlp_only_layers"] or ())
        step = raw["decoder_sparse_step"]
        return {
            "sparse": tuple(
                i not in dense and (i + 1) % step == 0 for i in range(layers)
            ),
            "experts": raw["num_experts"],
            "active": raw["num_experts_per_tok"],
            "expert_inner": raw["moe_intermediate_size"],
            "renormalise": raw["norm_topk_prob"],
        }
    return {"sparse": (False,) * layers}


def _divide(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"width {width} must be a multiple of {heads} heads")
    return width // heads


_WINDOWED = ("mistral", "mixtral", "phi3")


def to_hf(config: Config) -> dict[str, Any]:
    """Writes a config.json that transformers 5 loads as the same model.

    Args:
      config: what the model is made of.

    Returns:
      A dict for `json.dump`; `from_hf` of it is the same configuration.

    Raises:
      ValueError: for rank-k routing, which transformers does not know.

    >>> config = from_hf({"model_type": "gpt2", "n_layer": 2})
    >>> from_hf(to_hf(config)) == config
    True
    """
    c = config
    if c.skipped:
        raise ValueError(
            f"skipped = {c.skipped}: config.json has no word for rank-k routing; write "
            "the configuration that `rank_k` was given, its parameters are the same"
        )
    hf_activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab,
        "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos,
        "eos_token_id": list(c.eos) if len(c.eos) > 1 else (c.eos or (None,))[0],
        "pad_token_id": c.pad,
    }
    if c.family == "gpt2":
        return raw | {
            "n_positions": c.context,
            "n_embd": c.width,
            "n_layer": c.layers,
            "n_head": c.heads,
            "n_inner": c.inner,
            "activation_function": {"gelu_tanh": "gelu_new"}.get(
                c.activation, c.activation
            ),
            "layer_norm_epsilon": c.eps,
            "scale_attn_weights": c.query_scale != 1.0,
        }
    gemma = c.family in ("gemma2", "gemma3_text")
    windows = [w for w in c.windows if w is not None]
    raw |= {
        "hidden_size": c.width,
        "intermediate_size": c.inner,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.context,
        "hidden_activation" if gemma else "hidden_act": hf_activation,
        "layer_norm_eps" if c.layer_norm else "rms_norm_eps": c.eps,
        **positions.write_all(c.family, c.rotary, c.windows, c.context),
    }
    if c.family == "gpt_neox":
        return raw | {
            "use_parallel_residual": c.parallel,
            "attention_bias": c.qkv_bias,
        }
    raw |= {"num_key_value_heads": c.kv_heads, "head_dim": c.head_size}
    if c.family != "qwen2":
        raw["attention_bias"] = c.out_bias
    if c.family == "llama":
        raw["mlp_bias"] = c.mlp_bias
    if c.family in _WINDOWED or gemma:
        raw["sliding_window"] = windows[0] if windows else (4096 if gemma else None)
    if c.family in ("qwen2", "qwen3", "qwen3_moe"):
        raw["use_sliding_window"] = bool(windows)
        raw["sliding_window"] = windows[0] if windows else None
    if c.family in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        raw["layer_types"] = list(positions.kinds_of(c.windows))
    if gemma:
        raw["query_pre_attn_scalar"] = round(c.query_scale**-2)
        raw["attn_logit_softcapping"] = c.attention_cap
        raw["final_logit_softcapping"] = c.logit_cap
    if c.family == "mixtral":
        raw |= {"num_local_experts": c.experts, "num_experts_per_tok": c.active}
    if c.family == "qwen3_moe":
        raw |= {
            "num_experts": c.experts,
            "num_experts_per_tok": c.active,
            "moe_intermediate_size": c.expert_inner,
            "norm_topk_prob": c.renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(c.layers) if not c.sparse[i]],
        }
    return raw


def long_context(config: Config) -> Config:
    """The same model for texts beyond its first context (the long list of LongRoPE).

    A configuration without such a list comes back as it is.

    >>> from collab_jax.models.rotary import LongRope, Rotary
    >>> scaling = LongRope((1.0, 1.0), (1.0, 4.0), original=16, attention=1.2)
    >>> config = Config("phi3", 8, 8, 1, 2, 2, 4, 8, 64, (Rotary(scaling=scaling),),
    ...     (None,), 0.5)
    >>> long_context(config).rotary[0].scaling.use_long
    True
    """

    def lengthen(rotary: Rotary | None) -> Rotary | None:
        if rotary is None or not isinstance(rotary.scaling, LongRope):
            return rotary
        return rotary._replace(scaling=rotary.scaling._replace(use_long=True))

    return dataclasses.replace(config, rotary=tuple(map(lengthen, config.rotary)))
