"""What a GGUF file says about a model, in the words of config.json and its checkpoint.

llama.cpp renames every tensor and changes some: it interleaves the rows of Llama's
query and key matrices, stores Gemma's norms as `1 + w`, transposes GPT-2, and stacks
experts. Everything is undone here.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from collab_jax.io.gguf import Gguf
from collab_jax.io.safetensors import Checkpoint, Layout, missing

# architecture in a GGUF file -> model_type in config.json. Mistral is a llama there.
FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")


def config_dict(file: Gguf) -> dict[str, Any]:
    """The config.json of the model in a file.

    Args:
      file: opened.

    Raises:
      ValueError: for an architecture that is not known, a size that is not stated, or a
        scaling of positions that config.json cannot express.

    >>> from pathlib import Path
    >>> sizes = {"block_count": 2, "context_length": 64, "embedding_length": 8,
    ...     "feed_forward_length": 16, "attention.head_count": 2,
    ...     "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6}
    >>> metadata = {f"qwen2.{k}": v for k, v in sizes.items()}
    >>> metadata |= {"general.architecture": "qwen2", "qwen2.vocab_size": 10}
    >>> config_dict(Gguf(Path("a.gguf"), metadata, {}))["num_key_value_heads"]
    1
    """
    architecture = file.metadata["general.architecture"]
    if architecture not in FAMILIES:
        raise ValueError(
            f"unknown architecture {architecture!r} in {file.path}; known are "
            + ", ".join(sorted(FAMILIES))
        )
    family = FAMILIES[architecture]
    stated = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }

    def size(key: str) -> Any:
        if key not in stated:
            raise ValueError(f"{file.path} does not state {architecture}.{key}")
        return stated[key]

    vocab = file.metadata.get("tokenizer.ggml.tokens")
    raw = {
        "model_type": family,
        "vocab_size": len(vocab) if vocab else size("vocab_size"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        raw[f"{ours}_token_id"] = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
    if family == "gpt2":
        return raw | {
            "n_layer": size("block_count"),
            "n_positions": size("context_length"),
            "n_embd": size("embedding_length"),
            "n_inner": size("feed_forward_length"),
            "n_head": size("attention.head_count"),
            "layer_norm_epsilon": size("attention.layer_norm_epsilon"),
        }
    if family == "llama" and stated.get("expert_count"):
        raise ValueError(f"{file.path} is a llama with experts, which is not supported")
    heads = size("attention.head_count")
    raw |= {
        "num_hidden_layers": size("block_count"),
        "max_position_embeddings": size("context_length"),
        "hidden_size": size("embedding_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated.get("attention.head_count_kv", heads),
        "rms_norm_eps": size("attention.layer_norm_rms_epsilon"),
        "head_dim": stated.get(
            "attention.key_length", size("embedding_length") // heads
        ),
    }
    if "feed_forward_length" in stated:
        raw["intermediate_size"] = stated["feed_forward_length"]
    if "rope.freq_base" in stated:
        raw["rope_theta"] = stated["rope.freq_base"]
    raw |= _scaling(file, family, stated)
    if family.startswith("gemma"):
        raw |= _gemma(family, stated, raw)
    if family == "qwen3_moe":
        raw |= {
            "num_experts": size("expert_count"),
            "num_experts_per_tok": size("expert_used_count"),
            "moe_intermediate_size": size("expert_feed_forward_length"),
            "norm_topk_prob": True,  # llama.cpp always does
        }
        raw.setdefault("intermediate_size", raw["moe_intermediate_size"])
    if family == "phi3":
        raw["sliding_window"] = stated.get("attention.sliding_window") or None
        turned = stated.get("rope.dimension_count", raw["head_dim"])
        raw["partial_rotary_factor"] = turned / raw["head_dim"]
    return raw


def _gemma(family: str, stated: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    layers, width = raw["num_hidden_layers"], raw["hidden_size"]
    # the largest model of each generation scales by width / heads, not by head size
    largest = layers == (46 if family == "gemma2" else 62)
    scale = width // raw["num_attention_heads"] if largest else raw["head_dim"]
    found = {
        "query_pre_attn_scalar": scale,
        "sliding_window": stated.get("attention.sliding_window", 4096),
    }
    if family == "gemma2":
        found["attn_logit_softcapping"] = stated.get("attn_logit_softcapping", 50.0)
        found["final_logit_softcapping"] = stated.get("final_logit_softcapping", 30.0)
    return found


def _scaling(file: Gguf, family: str, stated: dict[str, Any]) -> dict[str, Any]:
    kind = stated.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_scaling": _llama3(file, stated)}
    if any(name.startswith("rope_factors") for name in file.tensors):
        raise ValueError(
            f"{file.path} scales positions by LongRoPE, not supported here"
        )
    if kind == "none":
        return {}
    if kind == "linear":
        factor = stated["rope.scaling.factor"]
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn" and family != "gemma3_text":
        scaling = {"rope_type": "yarn", "factor": stated["rope.scaling.factor"]}
        if "rope.scaling.original_context_length" in stated:
            original = stated["rope.scaling.original_context_length"]
            scaling["original_max_position_embeddings"] = original
        return {"rope_scaling": scaling}
    raise ValueError(f"{file.path} has the unknown rope.scaling.type {kind!r}")


def _llama3(file: Gguf, stated: dict[str, Any]) -> dict[str, Any]:
    """Recovers the scaling from its factors per frequency; exact or an error."""
    factors = file.checkpoint().read("rope_freqs.weight").astype(np.float64)
    base = stated.get("rope.freq_base", 10000.0)
    length = 2 * np.pi * base ** (np.arange(len(factors)) / len(factors))
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    smooth = np.clip((original / length - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{file.path} has rope_freqs that are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def checkpoint(file: Gguf, names: tuple[str, ...], raw: dict[str, Any]) -> Checkpoint:
    """The tensors of a file under the names and in the layout of Hugging Face.

    Args:
      file: opened.
      names: canonical names of all tensors of the model.
      raw: its config.json, from `config_dict`.

    Returns:
      A checkpoint of the tensors found. A name that the file lacks is missing from it,
      a tensor that no name asks for stands in it under its name in the file.

    >>> from pathlib import Path
    >>> from gguf import GGMLQuantizationType
    >>> from collab_jax.io.gguf import Tensor
    >>> sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8,
    ...     "feed_forward_length": 16, "attention.head_count": 2,
    ...     "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6}
    >>> metadata = {f"qwen2.{k}": v for k, v in sizes.items()}
    >>> metadata |= {"general.architecture": "qwen2", "qwen2.vocab_size": 2}
    >>> norm = Tensor(GGMLQuantizationType.F32, (8,), 0, 32)
    >>> file = Gguf(Path("a.gguf"), metadata, {"output_norm.weight": norm})
    >>> checkpoint(file, ("model.norm.weight",), config_dict(file)).layouts
    {'model.norm.weight': Layout(dtype=dtype('float32'), shape=(8,))}
    """
    source = file.checkpoint()
    layers = raw["n_layer"] if "n_layer" in raw else raw["num_hidden_layers"]
    codes = {name: code for code, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(codes[file.metadata["general.architecture"]], layers)
    layouts: dict[str, Layout] = {}
    where: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {}
    used = {"rope_freqs.weight"}
    for name in names:
        theirs, change, shape = _locate(name, table, raw, source)
        if theirs not in source.layouts:
            continue
        used.add(theirs)
        where[name] = theirs, change
        layouts[name] = Layout(source.layouts[theirs].dtype, shape)
    extra = {n: layout for n, layout in source.layouts.items() if n not in used}

    def read(name: str) -> np.ndarray:
        if name not in where:
            raise missing(name, where)
        theirs, change = where[name]
        return change(source.read(theirs))

    return Checkpoint(layouts | extra, read)


def _locate(name: str, table, raw: dict[str, Any], source: Checkpoint):
    """(name in the file, what undoes llama.cpp's change, shape after it)."""
    stem, _, end = name.rpartition(".")
    expert = _EXPERT.fullmatch(stem)
    if expert:
        stem = f"{expert[1]}.{expert[3]}"
    theirs = f"{table.get_name(stem)}.{end}"
    shape = source.layouts[theirs].shape if theirs in source.layouts else ()
    if expert:
        number = int(expert[2])
        return theirs, lambda stack: stack[number], shape[1:]
    family = raw["model_type"]
    if family == "llama" and ".self_attn." in name:
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if f".{part}_proj." in name:
                return theirs, _halves(raw[heads]), shape
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return theirs, lambda scale: scale - 1, shape
    if family == "gpt2" and len(shape) == 2 and ".h." in name:
        return theirs, lambda matrix: np.ascontiguousarray(matrix.T), shape[::-1]
    return theirs, lambda tensor: tensor, shape


def _halves(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Puts rows (0, half, 1, half + 1, ...) of every head back into two halves."""

    def change(tensor: np.ndarray) -> np.ndarray:
        pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)

    return change
