"""Sets of three models of one shape, for measuring: a base and two experts.

A set is a folder with the folders `base`, `one` and `two`, in bfloat16. They are
written piece by piece, and only where they are missing.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = "base", "one", "two"
PIECE = 1 << 21  # numbers that are drawn at once

Shapes = dict[str, tuple[int, ...]]  # by the name of a tensor


def llama(vocab, width, layers, inner, heads, kv) -> tuple[dict[str, Any], Shapes]:
    """config.json and shapes of a llama."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    few = width * kv // heads
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in "input", "post_attention":
            shapes[f"{at}.{name}_layernorm.weight"] = (width,)
        for name, rows in ("q", width), ("k", few), ("v", few), ("o", width):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, width)
        for name in "gate", "up":
            shapes[f"{at}.mlp.{name}_proj.weight"] = (inner, width)
        shapes[f"{at}.mlp.down_proj.weight"] = (width, inner)
    shapes["model.norm.weight"] = (width,)
    return config, shapes | {"lm_head.weight": (vocab, width)}


def mixtral(
    vocab, width, layers, inner, heads, kv, experts
) -> tuple[dict[str, Any], Shapes]:
    """config.json and shapes of a mixtral: each expert of a layer is three tensors."""
    config, shapes = llama(vocab, width, layers, inner, heads, kv)
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    for layer in range(layers):
        at = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{at}.gate.weight"] = (experts, width)
        for expert in range(experts):
            for name in "w1", "w2", "w3":
                shape = (width, inner) if name == "w2" else (inner, width)
                shapes[f"{at}.experts.{expert}.{name}.weight"] = shape
    return config, shapes


def random_set(
    make: Callable[..., tuple[dict[str, Any], Shapes]],
    *sizes: int,
    shard: int = 2 * 10**9,
) -> Callable[[Path], None]:
    """Writes random models into a folder, in files of `shard` bytes."""

    def write(folder: Path) -> None:
        config, shapes = make(*sizes)
        words = {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}
        texts = {
            "tokenizer.json": {"version": "1.0", "added_tokens": [], "model": words},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "config.json": config,
        }
        side = {name: json.dumps(text) for name, text in texts.items()}
        _write(folder, shapes, _norms_are_one(shapes), 0.02, side, shard)

    return write


def _norms_are_one(shapes: Shapes) -> Callable[[str], float]:
    return lambda name: 1.0 if len(shapes[name]) == 1 else 0.0


def smollm2(folder: Path) -> None:
    """Writes copies of a real model, two of them with noise."""
    from collab_jax.io import hub
    from collab_jax.io.safetensors import open_folder

    if all((folder / name / "config.json").exists() for name in NAMES):
        return
    source = hub.fetch("smollm2-135m-instruct")
    stored = open_folder(source)
    kinds = ".json", ".jinja"
    paths = [path for path in source.iterdir() if path.suffix in kinds]
    side = {path.name: path.read_text("utf-8") for path in paths}
    side.pop("model.safetensors.index.json", None)
    shapes = {name: layout.shape for name, layout in stored.layouts.items()}
    _write(folder, shapes, stored.read, 0.0, side, 5 * 10**9)


def _write(folder, shapes, start, scale, side, shard) -> None:
    """The base is `start` with noise of a scale; experts are the base with noise."""
    import ml_dtypes
    import numpy as np

    from collab_jax.io.safetensors import Layout, open_folder, write_folder

    narrow = np.dtype(ml_dtypes.bfloat16)
    layouts = {name: Layout(narrow, shape) for name, shape in shapes.items()}
    for number, name in enumerate(NAMES):
        out, rng = folder / name, np.random.default_rng(number)
        if (out / "config.json").exists():  # written last
            continue
        print(f"writing {folder.name}/{name}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        begin = open_folder(folder / NAMES[0]).read if number else start
        noise = np.float32(2e-3 if number else scale)

        def tensor(name, begin=begin, noise=noise, rng=rng):
            made = np.empty(shapes[name], narrow)
            flat, values = made.reshape(-1), np.asarray(begin(name)).reshape(-1)
            values = np.broadcast_to(values, flat.shape)
            for at in range(0, len(flat), PIECE):
                part = values[at : at + PIECE].astype(np.float32)
                if noise:
                    part += noise * rng.standard_normal(part.shape, np.float32)
                flat[at : at + PIECE] = part
            return made

        write_folder(out, layouts, map(tensor, layouts), shard)
        for file in sorted(side, key="config.json".__eq__):
            (out / file).write_text(side[file], "utf-8")
