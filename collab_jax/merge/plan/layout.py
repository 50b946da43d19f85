"""The structure of a model, read off the names and shapes of its checkpoint.

No table of architectures: the layers are the tensors whose names differ in their first
number only; the others stand before the layers (embeddings) or after them (the last
norm, the head). Rows that belong to tokens, heads that are tied to embeddings, and
buffers that are no parameters are told by the names that models have in common.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from collab_jax.io.safetensors import Layout

_INDEX = re.compile(r"\.(\d+)\.")
_BEFORE = re.compile(
    r"embed|embd|(^|[._])(wte|wpe|emb|shared|conv[12]|patch_conv|ln_pre|layernorm_pre"
    r"|pre_layrnorm|relative_pe|position_ids|project_in)([._]|$)"
)
_AFTER = re.compile(r"(^|\.)(embed_out|embedding_norm|lm_head|cls|classifier|output)\.")
_EMBEDDING = re.compile(
    r"(^|\.)(shared|embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$"
)
_PLAIN = re.compile(r"(^|\.)embeddings\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
# of these, the number of rows decides
_PERHAPS = re.compile(
    r"(^|\.)(embeddings?|embed|output|output_layer|proj_out|decoder|lm_head\.linear"
    r"|vocab_projector)\.weight$"
    r"|(^|\.)(lm_head|embed_out|lm_head\.linear|decoder|predictions|vocab_projector)"
    r"\.bias$"
)
_BUFFER = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # of rank 4: no bias


class Structure(NamedTuple):
    """The tensors of a model, layer by layer."""

    stacks: dict[str, list[list[str]]]  # "model.layers" -> of each layer, what follows
    loose: list[str]  # all others


def structure(names: Iterable[str]) -> Structure:
    """Sorts names into stacks of layers and others.

    Numbers that do not count from 0 without a gap are no layers, except in the largest
    stack, where they are an error.

    Args:
      names: of all tensors.

    Raises:
      ValueError: where a layer of the model is missing.

    >>> structure(["embed.weight", "model.h.0.up", "model.h.1.up", "norm.weight"])
    Structure(stacks={'model.h': [['up'], ['up']]}, loose=['embed.weight',
    'norm.weight'])
    """
    found: dict[str, dict[int, list[str]]] = {}
    loose: list[str] = []
    for name in names:
        match = _INDEX.search(name)
        if match is None:
            loose.append(name)
            continue
        layers = found.setdefault(name[: match.start()], {})
        layers.setdefault(int(match[1]), []).append(name[match.end() :])
    stacks = {}
    largest = max(found, key=lambda p: sum(map(len, found[p].values())), default=None)
    for prefix, layers in found.items():
        gaps = sorted(set(range(max(layers) + 1)) - set(layers))
        if not gaps:
            stacks[prefix] = [layers[i] for i in range(len(layers))]
        elif prefix == largest:
            raise ValueError(
                f"layer {gaps[0]} of {prefix} is missing (there are {len(layers)}, the "
                f"last is {max(layers)}); fetch the checkpoint again"
            )
        else:
            loose += [f"{prefix}.{i}.{rest}" for i in layers for rest in layers[i]]
    return Structure(stacks, loose)


def before_layers(name: str) -> bool:
    """Whether a tensor outside of the layers is used before them.

    >>> before_layers("model.embed_tokens.weight"), before_layers("lm_head.weight")
    (True, False)
    """
    return bool(_BEFORE.search(name)) and not _AFTER.search(name)


def vocabulary_axis(
    name: str, shape: Sequence[int], config: dict[str, Any]
) -> int | None:
    """0 where the rows of a tensor belong to tokens, else None.

    Args:
      name: of the tensor.
      shape: of the tensor.
      config: config.json of its model; its vocab_size decides where names do not.

    >>> vocabulary_axis("lm_head.weight", (100, 8), {})
    0
    >>> vocabulary_axis("output.weight", (8, 8), {"vocab_size": 100}) is None
    True
    """
    if len(shape) == 2 and (_EMBEDDING.search(name) or _HEAD.search(name)):
        return 0
    rows = value(config, "vocab_size")
    if shape and shape[0] == rows and _PERHAPS.search(name):
        return 0
    return None


def is_head(name: str) -> bool:
    """Whether a tensor is what logits are made with.

    >>> is_head("lm_head.weight"), is_head("model.embed_tokens.weight")
    (True, False)
    """
    return bool(_HEAD.search(name))


def value(config: dict[str, Any], key: str) -> Any:
    """An entry of config.json, or of its text_config; None where neither has it.

    >>> value({"text_config": {"vocab_size": 3}}, "vocab_size")
    3
    """
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    return config.get(key, inner.get(key))


def is_buffer(name: str, layout: Layout) -> bool:
    """Whether a tensor is no parameter: integers, masks, rotary frequencies.

    >>> import numpy as np
    >>> is_buffer("embeddings.position_ids", Layout(np.dtype("int64"), (1, 8)))
    True
    >>> is_buffer("h.0.attn.bias", Layout(np.dtype("float32"), (8,)))
    False
    """
    floating = layout.dtype.kind not in "iub"
    mask = len(layout.shape) == 4 and bool(_MASK.search(name))
    return not floating or mask or bool(_BUFFER.search(name))


def tied_to(name: str, names: Collection[str]) -> str | None:
    """The tensor that stands in for a head or an embedding which a checkpoint lacks.

    Args:
      name: of the tensor that is missing.
      names: those that are there.

    >>> tied_to("lm_head.weight", ["model.embed_tokens.weight", "model.norm.weight"])
    'model.embed_tokens.weight'
    >>> tied_to("model.norm.weight", ["model.embed_tokens.weight"]) is None
    True
    """
    if not (_HEAD.search(name) or _EMBEDDING.search(name) or _PERHAPS.search(name)):
        return None
    for pattern in (_EMBEDDING, _PLAIN, _HEAD):
        found = [other for other in names if pattern.search(other)]
        for other in sorted(found, key=lambda n: ("shared" not in n, "decoder" in n)):
            return other
    return None


def view(names: Iterable[str], like: Iterable[str]) -> dict[str, str]:
    """The names of a checkpoint as another one writes them, which may add a first part.

    Args:
      names: of the checkpoint (`h.0.ln_1.weight`).
      like: those of the other (`transformer.h.0.ln_1.weight`).

    Returns:
      A dict from the other's way of writing to the checkpoint's own.

    >>> view(["h.0.up", "lm_head.weight"], ["transformer.h.0.up"])
    {'transformer.h.0.up': 'h.0.up', 'lm_head.weight': 'lm_head.weight'}
    """
    names, like = list(names), set(like)
    if not names or all(name in like for name in names):
        return {name: name for name in names}
    for name in names:
        first, _, rest = name.partition(".")
        if name not in like and rest in like and _INDEX.search("." + rest):
            cut = len(first) + 1
            return {
                n[cut:] if n.startswith(f"{first}.") and n not in like else n: n
                for n in names
            }
    if not any(_INDEX.search(name) and name in like for name in names):
        layer = next((n for n in names if _INDEX.search(n)), None)
        ends = [n[: -len(layer)] for n in like if layer and n.endswith(f".{layer}")]
        if ends:
            return {ends[0] + n if ends[0] + n in like else n: n for n in names}
    return {name: name for name in names}
