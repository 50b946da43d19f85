"""The bijection between the tensors of a checkpoint and the leaves of a params tree.

A checkpoint keeps `[out, in]` matrices under the names of its authors, some of them
fused (queries, keys and values in one), some split (one matrix an expert); a tree
has `[in, out]` kernels, one leaf a matrix, experts stacked. A `Rule` translates tensors
into leaves and back without loss. The order of the rules is the checkpoint's.

Arrays of numpy or of JAX, tracers and sharded ones included: any type passes unchanged.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from collab_jax.models.config import Config

Path = tuple[str, ...]
Arrays = list[Any]  # of numpy or of JAX


class Rule(NamedTuple):
    """Some tensors of a checkpoint and the leaves that hold the same numbers."""

    paths: tuple[Path, ...]  # of the leaves in the tree
    names: tuple[str, ...]  # of the tensors in the checkpoint
    shapes: tuple[tuple[int, ...], ...]  # of the tensors in the checkpoint
    load: Callable[[Arrays], Arrays]  # tensors -> leaves, in the order of paths
    save: Callable[[Arrays], Arrays]  # leaves -> tensors, in the order of names


def _same(path: Path, name: str, *shape: int) -> Rule:
    return Rule((path,), (name,), (shape,), list, list)


def _own(array: Any) -> Any:
    """In the order of memory that its shape says, where numpy only changed the view."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array


def _flip(arrays: Arrays) -> Arrays:
    return [_own(array.T) for array in arrays]


def _join(arrays: Arrays, axis: int = 0) -> Any:
    return arrays[0].__array_namespace__().concatenate(arrays, axis=axis)


def _stack(arrays: Arrays, axis: int = 0) -> Any:
    return arrays[0].__array_namespace__().stack(arrays, axis=axis)


def _cut(array: Any, cuts: list[int]) -> Arrays:
    ends = [*cuts, array.shape[0]]
    return [array[a:b] for a, b in zip([0, *cuts], ends, strict=True)]


def _linear(path: Path, name: str, size_in: int, size_out: int) -> Rule:
    return Rule((path,), (name,), ((size_out, size_in),), _flip, _flip)


def _fused(paths: tuple[Path, ...], name: str, sizes: list[int], *rest: int) -> Rule:
    """One tensor whose first axis is that of several leaves, one behind the other."""
    cuts = np.cumsum(sizes)[:-1].tolist()

    def load(tensors: Arrays) -> Arrays:
        return _flip(_cut(tensors[0], cuts))

    def save(leaves: Arrays) -> Arrays:
        return [_own(_join([leaf.T for leaf in leaves]))]

    return Rule(paths, (name,), ((sum(sizes), *rest),), load, save)


def _thirds(paths: tuple[Path, ...], name: str, *shape: int) -> Rule:
    """GPT-2: one `[in, 3 out]` or `[3 out]` tensor, cut along the last axis."""

    def load(tensors: Arrays) -> Arrays:
        width = tensors[0].shape[-1] // 3
        starts = (0, width, 2 * width)
        return [_own(tensors[0][..., start : start + width]) for start in starts]

    def save(leaves: Arrays) -> Arrays:
        return [_join(leaves, axis=-1)]

    return Rule(paths, (name,), (shape,), load, save)


def _per_head(paths: tuple[Path, ...], name: str, heads: int, *shape: int) -> Rule:
    """GPT-NeoX: the first axis is head, then query-key-value, then the head's size."""

    def load(tensors: Arrays) -> Arrays:
        split = tensors[0].reshape(heads, 3, -1, *shape[1:])
        return _flip([split[:, i].reshape(-1, *shape[1:]) for i in range(3)])

    def save(leaves: Arrays) -> Arrays:
        split = [leaf.T.reshape(heads, -1, *shape[1:]) for leaf in leaves]
        return [_own(_stack(split, axis=1).reshape(shape))]

    return Rule(paths, (name,), (shape,), load, save)


def _stacked(path: Path, names: list[str], size_in: int, size_out: int) -> Rule:
    """One `[out, in]` matrix an expert; the leaf is `[E, in, out]`."""

    def load(tensors: Arrays) -> Arrays:
        return [_stack([tensor.T for tensor in tensors])]

    def save(leaves: Arrays) -> Arrays:
        return _flip(list(leaves[0]))

    shapes = ((size_out, size_in),) * len(names)
    return Rule((path,), tuple(names), shapes, load, save)


def rules(config: Config) -> tuple[Rule, ...]:
    """The bijection of one model, in the canonical order of its checkpoint.

    Args:
      config: what the model is made of.

    Returns:
      Rules; their paths are all leaves of the tree, their names all tensors, each once.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> rule = rules(config)[0]
    >>> rule.names, rule.paths, rule.shapes
    (('model.embed_tokens.weight',), (('embed', 'embedding'),), ((10, 8),))
    """
    if config.family == "gpt2":
        found = _gpt2(config)
    elif config.family == "gpt_neox":
        found = _gpt_neox(config)
    else:
        found = _llama_like(config)
    if not config.tied:
        name = "embed_out.weight" if config.family == "gpt_neox" else "lm_head.weight"
        found.append(_linear(("head", "kernel"), name, config.width, config.vocab))
    return tuple(found)


def _projection(
    path: Path, name: str, size_in: int, size_out: int, bias: bool
) -> list[Rule]:
    found = [_linear((*path, "kernel"), f"{name}.weight", size_in, size_out)]
    if bias:
        found.append(_same((*path, "bias"), f"{name}.bias", size_out))
    return found


def _norm(config: Config, path: Path, name: str) -> list[Rule]:
    found = [_same((*path, "scale"), f"{name}.weight", config.width)]
    if config.layer_norm:
        found.append(_same((*path, "bias"), f"{name}.bias", config.width))
    return found


def _llama_like(c: Config) -> list[Rule]:
    found = [
        _same(("embed", "embedding"), "model.embed_tokens.weight", c.vocab, c.width)
    ]
    for i in range(c.layers):
        layer, name = (f"layers_{i}",), f"model.layers.{i}"
        found += _llama_attention(c, (*layer, "attention"), f"{name}.self_attn")
        if c.sparse[i]:
            found += _experts(c, (*layer, "mlp"), name)
        else:
            found += _llama_mlp(c, (*layer, "mlp"), f"{name}.mlp")
        if c.pre_norm and c.post_norm:
            names = {
                "attention_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "post_mlp_norm": "post_feedforward_layernorm",
            }
        elif c.post_norm:
            names = {
                "post_attention_norm": "post_attention_layernorm",
                "post_mlp_norm": "post_feedforward_layernorm",
            }
        else:
            names = {
                "attention_norm": "input_layernorm",
                "mlp_norm": "post_attention_layernorm",
            }
        for ours, theirs in names.items():
            found += _norm(c, (*layer, ours), f"{name}.{theirs}")
    return found + _norm(c, ("norm",), "model.norm")


def _llama_attention(c: Config, path: Path, name: str) -> list[Rule]:
    queries, keys = c.heads * c.head_size, c.kv_heads * c.head_size
    found = []
    if c.family == "phi3":
        paths = tuple((*path, part, "kernel") for part in "qkv")
        sizes = [queries, keys, keys]
        found.append(_fused(paths, f"{name}.qkv_proj.weight", sizes, c.width))
    else:
        for part, size in (("q", queries), ("k", keys), ("v", keys)):
            found += _projection(
                (*path, part), f"{name}.{part}_proj", c.width, size, c.qkv_bias
            )
    found += _projection((*path, "o"), f"{name}.o_proj", queries, c.width, c.out_bias)
    if c.head_norm or c.width_norm:
        sizes = [c.head_size] * 2 if c.head_norm else [queries, keys]
        for part, size in zip(("q_norm", "k_norm"), sizes, strict=True):
            found.append(_same((*path, part, "scale"), f"{name}.{part}.weight", size))
    return found


def _llama_mlp(c: Config, path: Path, name: str) -> list[Rule]:
    found = []
    if c.family == "phi3":
        paths = tuple((*path, part, "kernel") for part in ("gate", "up"))
        sizes = [c.inner, c.inner]
        found.append(_fused(paths, f"{name}.gate_up_proj.weight", sizes, c.width))
    else:
        for part in ("gate", "up"):
            found += _projection(
                (*path, part), f"{name}.{part}_proj", c.width, c.inner, c.mlp_bias
            )
    return found + _projection(
        (*path, "down"), f"{name}.down_proj", c.inner, c.width, c.mlp_bias
    )


def _experts(c: Config, path: Path, layer: str) -> list[Rule]:
    mixtral = c.family == "mixtral"
    name = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
    parts = (
        {"gate": "w1", "up": "w3", "down": "w2"}
        if mixtral
        else {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    router = (*path, "router", "kernel")
    found = [_linear(router, f"{name}.gate.weight", c.width, c.experts)]
    for ours, theirs in parts.items():
        sizes = (c.width, c.expert_inner)
        names = [f"{name}.experts.{e}.{theirs}.weight" for e in range(c.experts)]
        found.append(
            _stacked(
                (*path, "experts", ours),
                names,
                *(sizes[::-1] if ours == "down" else sizes),
            )
        )
    return found


def _gpt2(c: Config) -> list[Rule]:
    found = [
        _same(("embed", "embedding"), "transformer.wte.weight", c.vocab, c.width),
        _same(
            ("positions", "embedding"),
            "transformer.wpe.weight",
            c.learned_positions,
            c.width,
        ),
    ]

    def conv(path: Path, name: str, size_in: int, size_out: int) -> list[Rule]:
        return [
            _same((*path, "kernel"), f"{name}.weight", size_in, size_out),
            _same((*path, "bias"), f"{name}.bias", size_out),
        ]

    for i in range(c.layers):
        layer, name = (f"layers_{i}",), f"transformer.h.{i}"
        found += _norm(c, (*layer, "attention_norm"), f"{name}.ln_1")
        for kind, shape in (
            ("kernel", (c.width, 3 * c.width)),
            ("bias", (3 * c.width,)),
        ):
            paths = tuple((*layer, "attention", part, kind) for part in "qkv")
            theirs = "weight" if kind == "kernel" else "bias"
            found.append(_thirds(paths, f"{name}.attn.c_attn.{theirs}", *shape))
        found += conv(
            (*layer, "attention", "o"), f"{name}.attn.c_proj", c.width, c.width
        )
        found += _norm(c, (*layer, "mlp_norm"), f"{name}.ln_2")
        found += conv((*layer, "mlp", "up"), f"{name}.mlp.c_fc", c.width, c.inner)
        found += conv((*layer, "mlp", "down"), f"{name}.mlp.c_proj", c.inner, c.width)
    return found + _norm(c, ("norm",), "transformer.ln_f")


def _gpt_neox(c: Config) -> list[Rule]:
    found = [
        _same(("embed", "embedding"), "gpt_neox.embed_in.weight", c.vocab, c.width)
    ]
    for i in range(c.layers):
        layer, name = (f"layers_{i}",), f"gpt_neox.layers.{i}"
        found += _norm(c, (*layer, "attention_norm"), f"{name}.input_layernorm")
        found += _norm(c, (*layer, "mlp_norm"), f"{name}.post_attention_layernorm")
        fused, rest = f"{name}.attention.query_key_value", (3 * c.width, c.width)
        paths = tuple((*layer, "attention", part, "kernel") for part in "qkv")
        found.append(_per_head(paths, f"{fused}.weight", c.heads, *rest))
        if c.qkv_bias:
            paths = tuple((*layer, "attention", part, "bias") for part in "qkv")
            found.append(_per_head(paths, f"{fused}.bias", c.heads, 3 * c.width))
        for path, theirs, size_in, size_out, bias in (
            (("attention", "o"), "attention.dense", c.width, c.width, c.out_bias),
            (("mlp", "up"), "mlp.dense_h_to_4h", c.width, c.inner, c.mlp_bias),
            (("mlp", "down"), "mlp.dense_4h_to_h", c.inner, c.width, c.mlp_bias),
        ):
            path = (*layer, *path)
            found += _projection(path, f"{name}.{theirs}", size_in, size_out, bias)
    return found + _norm(c, ("norm",), "gpt_neox.final_layer_norm")


def canonical(config: Config, name: str) -> str | None:
    """The canonical name of a tensor as some checkpoint on disk calls it.

    Older GPT-2 files lack the prefix, multimodal Gemma 3 files add one, and some files
    hold buffers and tied heads that are no parameters of their own.

    Args:
      config: what the model is made of.
      name: as found on disk.

    Returns:
      The name that `rules` knows, or None for what needs no reading.

    >>> from collab_jax.models.config import from_hf
    >>> config = from_hf({"model_type": "gpt2"})
    >>> canonical(config, "h.0.ln_1.weight"), canonical(config, "h.0.attn.bias")
    ('transformer.h.0.ln_1.weight', None)
    """
    buffers = ("rotary_emb.inv_freq", ".attn.bias", "masked_bias", "attention.bias")
    if name.endswith(buffers):
        return None
    if config.family == "gemma3_text":
        for prefix in ("language_model.", "model.language_model."):
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                whole = rest.startswith(("model.", "lm_head."))
                name = rest if whole else f"model.{rest}"
        if name.startswith(("vision_tower.", "multi_modal_projector.", "model.vision")):
            return None
        if name.startswith("model.multi_modal_projector."):
            return None
    if config.family == "gpt2" and name.startswith(("wte.", "wpe.", "h.", "ln_f.")):
        name = f"transformer.{name}"
    if config.tied and name in ("lm_head.weight", "embed_out.weight"):
        return None
    return name
