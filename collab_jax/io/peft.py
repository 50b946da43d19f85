"""LoRA adapters in the files of PEFT: adapter_config.json, adapter_model.safetensors.

For each module of a checkpoint, PEFT keeps `lora_A` `[R, I]` and `lora_B` `[O, R]`.
Where a module is fused (queries, keys and values in one), its kernels share A and cut
B; kernels with factors of their own are written as one pair of a larger rank, block by
block. All modules of a file have one rank: smaller ones are filled with zeros.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.io.names import Rule, canonical, rules
from collab_jax.io.peft_settings import FOREWORD, read_settings, scale_of
from collab_jax.io.safetensors import Layout, open_file, write
from collab_jax.lm import Params
from collab_jax.models.config import Config


def load_adapter(
    folder: str | Path, config: Config, dtype: Any = None
) -> tuple[Params, float]:
    """Reads an adapter written by PEFT.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      config: of the model that it adapts.
      dtype: type of the factors; None keeps the file's.

    Returns:
      The adapter as a tree (see `collab_jax.models.lora`), and its scale: alpha / R, or
      alpha / sqrt(R) where the file says so.

    Raises:
      FileNotFoundError: where a file is missing.
      ValueError: for anything but plain LoRA, a module that the model has not, or
        factors of a wrong shape.

    >>> import tempfile
    >>> from collab_jax import tree
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> factors = {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))}
    >>> folder = Path(tempfile.mkdtemp())
    >>> adapter = {"layers_0": {"attention": {"q": {"kernel": factors}}}}
    >>> save_adapter(folder, adapter, 2.0, config)
    >>> found, scale = load_adapter(folder, config)
    >>> tree.paths(found), scale
    (['layers_0/attention/q/kernel/a', 'layers_0/attention/q/kernel/b'], 2.0)
    """
    folder = Path(folder)
    scale = scale_of(read_settings(folder / "adapter_config.json"), "")
    file = open_file(folder / "adapter_model.safetensors")
    modules = _modules(config)
    adapter: dict[str, Any] = {}
    for name in file.layouts:
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind == "lora_B" and f"{stem}.lora_A.weight" in file.layouts:
            continue
        found = canonical(config, stem.removeprefix(FOREWORD) + ".weight")
        if kind != "lora_A" or not name.startswith(FOREWORD) or found not in modules:
            raise ValueError(
                f"{folder} has a tensor {name}, which is no LoRA factor of a kernel of "
                f"this {config.family} model; its modules are like {list(modules)[:2]}"
            )
        rule = modules[found]
        if f"{stem}.lora_B.weight" not in file.layouts:
            raise ValueError(f"{folder} has {name} but no {stem}.lora_B.weight")
        a = np.asarray(file.read(name)).T
        b = np.asarray(file.read(f"{stem}.lora_B.weight")).T
        size_in, size_out = _sizes(config, rule)
        if a.shape[0] != size_in or b.shape[1] != size_out or len(a.T) != len(b):
            raise ValueError(
                f"factors of {stem} have shapes {a.T.shape} and {b.T.shape}; "
                f"[R, {size_in}] and [{size_out}, R] are expected"
            )
        for path, part in zip(rule.paths, _cut(config, rule, b), strict=True):
            node = adapter
            for key in path:
                node = node.setdefault(key, {})
            node["a"], node["b"] = jnp.asarray(a, dtype), jnp.asarray(part, dtype)
    return adapter, scale


def save_adapter(
    folder: str | Path, adapter: Params, scale: float, config: Config, base: str = ""
) -> None:
    """Writes an adapter that PEFT loads to the same function.

    Args:
      folder: is made where it does not exist.
      adapter: from `collab_jax.models.lora.init`.
      scale: alpha / R.
      config: of the model that it adapts.
      base: the name of that model, for the reader of the file.

    Raises:
      ValueError: for factors that belong to no module of the checkpoint.

    >>> import tempfile
    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 3, "hidden_size": 4,
    ...     "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> factors = {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))}
    >>> adapter = {"layers_0": {"attention": {"q": {"kernel": factors}}}}
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_adapter(folder, adapter, 2.0, config)
    >>> list(open_file(folder / "adapter_model.safetensors").layouts)[0]
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    left = {
        path[:-1]
        for path in (
            tuple(key.key for key in keys)
            for keys, _ in jax.tree_util.tree_leaves_with_path(adapter)
        )
    }
    pairs = {}
    for name, rule in _modules(config).items():
        factors = [_at(adapter, path) for path in rule.paths]
        if any(factors):
            pairs[name.removesuffix(".weight")] = _join(config, rule, factors)
            left -= set(rule.paths)
    if left or not pairs:
        raise ValueError(
            f"factors at {sorted('/'.join(path) for path in left)[:3]} belong to no "
            f"linear module of a {config.family} checkpoint"
        )
    rank = max(len(a) for a, _ in pairs.values())
    tensors = {}
    for name, (a, b) in pairs.items():
        fill = (0, rank - len(a))
        stem = f"{FOREWORD}{name}"
        tensors[f"{stem}.lora_A.weight"] = np.pad(a, (fill, (0, 0)))
        tensors[f"{stem}.lora_B.weight"] = np.pad(b, ((0, 0), fill))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layouts = {name: Layout(t.dtype, t.shape) for name, t in tensors.items()}
    write(folder / "adapter_model.safetensors", layouts, tensors.values())
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": float(scale) * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "target_modules": sorted(pairs),
        "inference_mode": True,
    }
    path = folder / "adapter_config.json"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(settings, out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def _modules(config: Config) -> dict[str, Rule]:
    """The rules of linear modules, by the name of their weight."""
    return {
        rule.names[0]: rule
        for rule in rules(config)
        if len(rule.names) == 1
        and len(rule.shapes[0]) == 2
        and all(path[-1] == "kernel" for path in rule.paths)
    }


def _sizes(config: Config, rule: Rule) -> tuple[int, int]:
    """Sizes in and out of a module; GPT-2 keeps `[in, out]`, all others `[out, in]`."""
    first, second = rule.shapes[0]
    return (first, second) if config.family == "gpt2" else (second, first)


def _cut(config: Config, rule: Rule, b: np.ndarray) -> list[np.ndarray]:
    """The part of b `[R, O]` for each leaf of a module.

    The rule cuts the weight; b goes through it as a weight of which all but R inputs
    are zero.
    """
    size_in, _ = _sizes(config, rule)
    rank = len(b)
    if len(rule.paths) == 1:
        return [b]
    if rank > size_in:
        raise ValueError(f"rank {rank} of {rule.names[0]} exceeds its {size_in} inputs")
    weight = np.pad(b, ((0, size_in - rank), (0, 0)))
    leaves = rule.load([weight if config.family == "gpt2" else weight.T])
    return [leaf[:rank] for leaf in leaves]


def _join(
    config: Config, rule: Rule, factors: list[dict[str, Any] | None]
) -> tuple[np.ndarray, np.ndarray]:
    """A `[R, I]` and B `[O, R]` of a module from the factors of its leaves."""
    have = [f for f in factors if f]
    a = [np.asarray(f["a"]) for f in have]
    if len(factors) == 1:
        return np.ascontiguousarray(a[0].T), np.asarray(have[0]["b"]).T
    shared = len(have) == len(factors) and all(np.array_equal(x, a[0]) for x in a)
    rank = a[0].shape[1] if shared else sum(x.shape[1] for x in a)
    size_in, _ = _sizes(config, rule)
    if rank > size_in:
        raise ValueError(f"rank {rank} of {rule.names[0]} exceeds its {size_in} inputs")
    # the leaves' sizes out are found by cutting a weight of zeros
    empty = rule.load([np.zeros(rule.shapes[0], a[0].dtype)])
    start = 0
    for leaf, factor in zip(empty, factors, strict=True):
        if factor:
            own = np.asarray(factor["b"])
            leaf[start : start + len(own)] = own
            start += 0 if shared else len(own)
    (weight,) = rule.save(empty)
    b = weight[:rank] if config.family == "gpt2" else weight.T[:rank]
    joined = a[0] if shared else np.concatenate(a, axis=1)
    return np.ascontiguousarray(joined.T), np.ascontiguousarray(b.T)


def _at(adapter: Params, path: tuple[str, ...]) -> dict[str, Any] | None:
    node = adapter
    for key in path:
        if key not in node:
            return None
        node = node[key]
    return node
