"""config.json and generation_config.json of a merge's result."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# lists of the indices of layers
_INDICES = ("mlp_only_layers", "full_attn_idxs", "global_attn_layers")
# rules of a layer's index that no list can replace
_RULES = (
    "decoder_sparse_step",
    "sliding_window_pattern",
    "global_attn_every_n_layers",
    "first_k_dense_replace",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "max_window_layers",
    "num_kv_shared_layers",
    "full_attention_interval",
)
_TOKENS = ("_token_id", "_token_index", "suppress_tokens")


class Change(NamedTuple):
    """What the result has that its donor has not; None for no difference."""

    layers: Sequence[tuple[Mapping[str, Any], int]] | None = None  # (config, its layer)
    vocabulary: int | None = None  # rows of the embedding
    dtype: str | None = None
    tied: bool | None = None  # the head is the embedding
    place: Callable[[int], int | None] | None = None  # the donor's token id -> new id
    special: Mapping[str, int | None] = {}  # ids by key, for tokens that are gone


def result_config(
    donor: Mapping[str, Any], change: Change
) -> tuple[dict[str, Any], list[str]]:
    """The donor's config.json with what a merge changes.

    Args:
      donor: the parsed config.json.
      change: `layers` says for each layer of the result whose it is: the config of that
        model and the index there. Lists with an entry per layer follow.

    Returns:
      The new config, and a line for each thing that it cannot express.

    Raises:
      ValueError: for a config that states no number of layers where `layers` is given.

    >>> donor = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}
    >>> layers = [(donor, 0), (donor, 1), (donor, 1)]
    >>> result_config(donor, Change(layers=layers, vocabulary=9, tied=False))[0]
    {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding'],
     'vocab_size': 9, 'tie_word_embeddings': False}
    """
    config, notes = copy.deepcopy(dict(donor)), list[str]()
    text = _text(config)
    if change.layers is not None:
        _set_layers(text, change.layers, notes)
    if change.place is not None:
        _move_tokens(config, change, "config.json", notes)
    if change.vocabulary is not None:
        _set(config, text, "vocab_size", change.vocabulary)
    if change.dtype is not None:
        old = "torch_dtype" in config or "torch_dtype" in text
        _set(config, text, "torch_dtype" if old else "dtype", change.dtype)
        if old and "dtype" in config:
            config["dtype"] = change.dtype
    if change.tied is not None:
        config["tie_word_embeddings"] = change.tied
        if "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = change.tied
    return config, notes


def result_generation(
    donor: Mapping[str, Any], change: Change
) -> tuple[dict[str, Any], list[str]]:
    """The donor's generation_config.json with the tokens of a new vocabulary.

    Args:
      donor: the parsed file.
      change: its `place` and `special` count.

    >>> result_generation({"eos_token_id": [3, 5]}, Change(place={3: 7}.get))
    ({'eos_token_id': [7]}, ['generation_config.json: eos_token_id 5 has no token in
    the new vocabulary'])
    """
    made, notes = copy.deepcopy(dict(donor)), list[str]()
    if change.place is not None:
        _move_tokens(made, change, "generation_config.json", notes)
    return made, notes


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the language model."""
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def _set(config: dict[str, Any], text: dict[str, Any], key: str, value: Any) -> None:
    """Wherever it stands, and else in the language model's part."""
    for part in (config, text):
        if key in part:
            part[key] = value
    if key not in config and key not in text:
        text[key] = value


def _set_layers(
    text: dict[str, Any],
    layers: Sequence[tuple[Mapping[str, Any], int]],
    notes: list[str],
) -> None:
    key = next((key for key in _DEPTHS if key in text), None)
    if key is None:
        raise ValueError(
            "config.json states no number of layers; expected was one of "
            + ", ".join(_DEPTHS)
        )
    depth, sources = text[key], [(_text(dict(c)), i) for c, i in layers]
    text[key] = len(layers)
    indices = [i for _, i in layers]
    if indices == list(range(depth)):
        return
    moved = indices != list(range(len(layers)))
    for name, value in list(text.items()):
        if name in _INDICES and isinstance(value, list):
            text[name] = [
                new for new, (c, i) in enumerate(sources) if i in (c.get(name) or ())
            ]
        elif isinstance(value, list) and len(value) == depth and not _of_tokens(name):
            if name == "architectures":
                continue
            lists = [c.get(name) or () for c, _ in sources]
            if all(i < len(x) for x, (_, i) in zip(lists, sources, strict=True)):
                text[name] = [x[i] for x, (_, i) in zip(lists, sources, strict=True)]
            else:
                notes.append(f"config.json: {name} is missing from one of the models")
        elif moved and name in _RULES and _counts(text, name, value):
            notes.append(
                f"config.json: {name} = {value} goes by a layer's index; layers that "
                "moved may be read wrongly"
            )


def _counts(text: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a rule of the index tells layers apart, and no list does it instead."""
    if name == "max_window_layers":
        return bool(text.get("use_sliding_window")) and not text.get("layer_types")
    if value == 1 and name != "first_k_dense_replace":  # every layer
        return False
    return bool(value) and not text.get("layer_types")


def _of_tokens(key: str) -> bool:
    return key.endswith(_TOKENS)


def _move_tokens(
    config: dict[str, Any], change: Change, file: str, notes: list[str]
) -> None:
    assert change.place is not None
    for key, value in config.items():
        if isinstance(value, dict):
            _move_tokens(value, change, file, notes)
        elif _of_tokens(key):
            many = isinstance(value, list)
            old = value if many else [value]
            if not all(type(id) is int for id in old):
                continue  # null stays
            new = [change.place(id) for id in old]
            gone = [id for id, there in zip(old, new, strict=True) if there is None]
            kept: list[int | None] = [id for id in new if id is not None]
            instead = change.special.get(key)
            if not kept and instead is not None:
                kept = [instead]
            elif gone:
                notes.append(
                    f"{file}: {key} {', '.join(map(str, gone))} has no token in the "
                    "new vocabulary"
                )
            config[key] = kept if many and kept else (kept or [None])[0]
