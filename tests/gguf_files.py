"""Small GGUF files as llama.cpp's converter would write them, for the tests."""

from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

from collab_jax.io import names
from collab_jax.models.config import from_hf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
GEMMA = {
    "sliding_window": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
# Some sizes are those that transformers takes whatever the file says.
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "gemma2": {"model_type": "gemma2", **GEMMA},
    "gemma3": {"model_type": "gemma3_text", **GEMMA},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 128,
        "n_positions": 1024,
    },
}


def alphabet() -> list[str]:
    """GPT-2's 256 characters for bytes, a merged pair, and a special token."""
    from collab_jax.io.tokenizer import _byte_alphabet

    return [*_byte_alphabet().values(), "th", "<|end|>"]


def llama_file(
    folder: Path,
    architecture: str,
    rope_freqs: np.ndarray | None = None,
    base: float = 1e4,
) -> tuple[Path, dict[str, np.ndarray]]:
    """Writes a random model; returns the file and the tensors of its checkpoint."""
    tokens = alphabet()
    vocab = len(tokens)
    raw = {**SIZES, "vocab_size": vocab, "tie_word_embeddings": False}
    raw |= FAMILIES[architecture]
    config = from_hf(raw)
    random = np.random.default_rng(7)
    checkpoint = {
        name: random.normal(size=shape).astype(np.float32) * 0.3
        for rule in names.rules(config)
        for name, shape in zip(rule.names, rule.shapes, strict=True)
    }
    path = folder / f"{architecture}.gguf"
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(config.context)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(128 if architecture == "gpt2" else 64)
    writer.add_head_count(4)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(2)
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(base)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(8)
    if architecture == "qwen3moe":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(config.expert_inner)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (vocab - 1) + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(vocab - 1)
    writer.add_bos_token_id(vocab - 1)
    writer.add_pad_token_id(0)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    for name, tensor in _converted(architecture, checkpoint).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, checkpoint


def _converted(architecture: str, checkpoint: dict) -> dict[str, np.ndarray]:
    """What llama.cpp's convert_hf_to_gguf.py does to names and values."""
    codes = {name: code for code, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(codes[architecture], 2)
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in checkpoint.items():
        stem, _, end = name.rpartition(".")
        if ".experts." in name:
            before, _, after = stem.partition(".experts.")
            key = f"{before}.experts.{after.partition('.')[2]}"
            stacks.setdefault(f"{table.get_name(key)}.{end}", []).append(tensor)
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else 2
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if architecture == "gpt2" and ".h." in name and tensor.ndim == 2:
            tensor = tensor.T
        found[f"{table.get_name(stem)}.{end}"] = tensor
    return found | {name: np.stack(stack) for name, stack in stacks.items()}
