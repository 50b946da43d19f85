"""What a merge changes in config.json: layers, ties, the type of the weights."""

import copy
import re
from collections.abc import Sequence
from typing import Any

_COUNTS = {  # module -> where the number of its layers may stand
    "encoder": ("num_layers", "encoder_layers", "num_hidden_layers"),
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "vision": ("vision_config.depth", "vision_config.num_hidden_layers"),
    "": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "text_config.num_hidden_layers",
        "llm_config.num_hidden_layers",
    ),
}
# lists with one entry per layer
_LISTS = re.compile(
    r"^(\w*layer_types|no_rope_layers|layers_block_type|attention_layers)$"
)

Layers = Sequence[tuple[str, int]]  # of each layer, the model and number it comes from


def edits(
    layers: dict[str, Layers | None],
    configs: dict[str, dict[str, Any]],
    donor: str,
    untied: bool,
    dtype: str | None,
) -> tuple[dict[str, Any], list[str]]:
    """The changes to the donor's config.json, and what could not be changed.

    Args:
      layers: of each module, the layers it is made of; None where they are unchanged.
      configs: config.json of each model.
      donor: whose config.json the result takes.
      untied: whether the result has a head that the donor has not.
      dtype: of the result, where the document says it.

    Returns:
      New values by dotted key, and notes.

    >>> config = {"num_hidden_layers": 2, "layer_types": ["full", "local"]}
    >>> edits({"": [("a", 0), ("a", 1), ("a", 1)]}, {"a": config}, "a", False, None)
    ({'num_hidden_layers': 3, 'layer_types': ['full', 'local', 'local']}, [])
    """
    changes: dict[str, Any] = {}
    notes = []
    for module, own in layers.items():
        if own is None:
            continue
        kind = "vision" if "vis" in module else module
        keys = _COUNTS.get(kind, _COUNTS[""])
        key = next((k for k in keys if _get(configs[donor], k) is not None), None)
        if key is None:
            notes.append(
                f"the config.json of {donor} has none of {', '.join(keys)}: write the "
                f"number of layers, {len(own)}, into the result by hand"
            )
            continue
        if _get(configs[donor], key) != len(own):
            changes[key] = len(own)
        changes |= _lists(own, configs, donor, key)
    if untied:
        inner = configs[donor].get("text_config")
        there = isinstance(inner, dict) and "tie_word_embeddings" in inner
        nested = there and "tie_word_embeddings" not in configs[donor]
        changes["text_config." * nested + "tie_word_embeddings"] = False
    if dtype is not None:
        old = "torch_dtype" in configs[donor] and "dtype" not in configs[donor]
        key = "torch_dtype" if old else "dtype"
        if configs[donor].get(key) != dtype:
            changes[key] = dtype
    return changes, notes


def _lists(
    layers: Layers, configs: dict[str, dict[str, Any]], donor: str, count: str
) -> dict[str, Any]:
    """Lists with one entry per layer, gathered from where the layers come from."""
    above, _, _ = count.rpartition(".")
    changes = {}
    section = _get(configs[donor], above) if above else configs[donor]
    for key, old in section.items():
        if not _LISTS.match(key) or not isinstance(old, list):
            continue
        full = f"{above}.{key}" if above else key
        new = []
        for model, index in layers:
            entries = _get(configs[model], full)
            if not isinstance(entries, list) or index >= len(entries):
                entries = old
            if index < len(entries):
                new.append(entries[index])
        if len(new) == len(layers) and new != old:
            changes[full] = new
    return changes


def _get(config: dict[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def edited(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config.json with changes.

    Args:
      config: is left as it is.
      changes: new values by dotted key.

    >>> edited({"text_config": {"n": 2}}, {"text_config.n": 3})
    {'text_config': {'n': 3}}
    """
    result = copy.deepcopy(config)
    for key, value in changes.items():
        *above, last = key.split(".")
        place = result
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return result
