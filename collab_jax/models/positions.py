"""The position part of config.json: which layers slide a window, and how each rotates.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`,
which Gemma 3 nests per type of layer; both are read, the newer is written.
"""

import math
from collections.abc import Mapping
from typing import Any

from collab_jax.models.rotary import (
    Interpolation,
    Llama3,
    LongRope,
    Rotary,
    Scaling,
    Yarn,
)

_KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    },
}
_PARTIAL = ("phi3", "gpt_neox")  # families that may turn only a part of each head


def layer_kinds(family: str, raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Type of every layer, `full_attention` or `sliding_attention`.

    Args:
      family: model_type of config.json.
      raw: its keys, defaults filled in.
      layers: number of layers.

    Raises:
      ValueError: for a type that is not known, or that the family does not have.

    >>> layer_kinds("mistral", {"sliding_window": 8, "layer_types": None}, 2)
    ('sliding_attention', 'sliding_attention')
    """
    window = raw["sliding_window"]
    given = raw["layer_types"]
    if family in ("qwen2", "qwen3", "qwen3_moe") and not raw["use_sliding_window"]:
        window = None
    if family in ("qwen2", "qwen3"):
        sliding = [
            window is not None and i >= raw["max_window_layers"] for i in range(layers)
        ]
    elif family == "gemma2":
        sliding = [i % 2 == 0 for i in range(layers)]
    elif family == "gemma3_text":
        sliding = [(i + 1) % raw["sliding_window_pattern"] != 0 for i in range(layers)]
    elif family in ("mistral", "mixtral", "phi3", "qwen3_moe"):
        sliding = [window is not None] * layers
    else:
        sliding = [False] * layers
    kinds = tuple("sliding_attention" if s else "full_attention" for s in sliding)
    if given is not None:
        known = {"full_attention", "sliding_attention"}
        if len(given) != layers or not set(given) <= known:
            raise ValueError(
                f"layer_types of {family} must be {layers} of {sorted(known)}, "
                f"found {len(given)} of {sorted(set(given))}"
            )
        free = family in ("qwen2", "qwen3", "gemma2", "gemma3_text")
        if not free and tuple(given) != kinds:
            raise ValueError(
                f"layer_types={list(given)} is not supported for {family}, whose "
                "reference ignores it"
            )
        kinds = tuple(given)
    if "sliding_attention" in kinds and not window:
        raise ValueError(f"{family} has sliding_attention layers but no sliding_window")
    return kinds


def read(
    family: str, raw: Mapping[str, Any], kinds: tuple[str, ...], size: int
) -> tuple[Rotary, ...]:
    """Rotary embedding of every layer.

    Args:
      family: model_type of config.json.
      raw: its keys, defaults filled in.
      kinds: type of every layer.
      size: K, size of a head.

    Raises:
      ValueError: for a kind of scaling, or a key of it, that is not known.

    >>> read("llama", {"rope_theta": 500.0, "max_position_embeddings": 8}, ("",), 4)
    (Rotary(base=500.0, fraction=1.0, scaling=None),)
    """
    scaling = dict(raw.get("rope_scaling") or {})
    given = raw.get("rope_parameters") or {}
    if family == "gemma3_text":
        flat = set(given) - {"full_attention", "sliding_attention"}
        if flat:
            raise ValueError(
                f"rope_parameters of gemma3_text must be nested per layer type, found "
                f"{sorted(flat)}"
            )
        both = {
            "full_attention": {
                "rope_theta": raw.get("rope_theta", 1e6),
                **(given.get("full_attention") or {}),
                **scaling,
            },
            "sliding_attention": {
                "rope_theta": raw.get("rope_local_base_freq", 1e4),
                **(given.get("sliding_attention") or {}),
            },
        }
        return tuple(_rotary(family, raw, both[kind], size) for kind in kinds)
    theta = {"mixtral": 1e6}.get(family, 1e4)
    flat_values = {
        "rope_theta": raw.get("rope_theta", raw.get("rotary_emb_base", theta)),
        "partial_rotary_factor": 0.25 if family == "gpt_neox" else 1.0,
    }
    for key in ("rotary_pct", "partial_rotary_factor"):
        if raw.get(key) is not None:
            flat_values["partial_rotary_factor"] = raw[key]
    flat_values |= scaling or given
    return (_rotary(family, raw, flat_values, size),) * len(kinds)


def _rotary(
    family: str, raw: Mapping[str, Any], values: dict[str, Any], size: int
) -> Rotary:
    values = dict(values)
    base = float(values.pop("rope_theta"))
    fraction = float(values.pop("partial_rotary_factor", None) or 1.0)
    older = values.pop("type", "default")
    kind = values.pop("rope_type", older)
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    if fraction != 1.0 and family not in _PARTIAL:
        raise ValueError(
            f"partial_rotary_factor={fraction} is not supported for {family}"
        )
    if kind not in _KNOWN or set(values) - _KNOWN.get(kind, set()):
        raise ValueError(
            f"rope_type {kind!r} with {sorted(values)} is not supported; known are "
            + "; ".join(f"{k}: {sorted(v)}" for k, v in _KNOWN.items())
        )
    values["original_max_position_embeddings"] = (
        raw.get("original_max_position_embeddings")
        or values.get("original_max_position_embeddings")
        or raw["max_position_embeddings"]
    )
    try:
        return Rotary(base, fraction, _scaling(kind, values, raw, size, fraction))
    except KeyError as missing:
        raise ValueError(f"rope_type {kind!r} lacks {missing}") from None


def _scaling(
    kind: str,
    values: dict[str, Any],
    raw: Mapping[str, Any],
    size: int,
    fraction: float,
) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return Interpolation(float(values["factor"]))
    original = values["original_max_position_embeddings"]
    if kind == "llama3":
        return Llama3(
            float(values["factor"]),
            float(values["low_freq_factor"]),
            float(values["high_freq_factor"]),
            int(original),
        )
    factor = values.get("factor") or raw["max_position_embeddings"] / original
    attention = values.get("attention_factor")
    if kind == "yarn":
        if attention is None:
            up, down = values.get("mscale"), values.get("mscale_all_dim")
            attention = _mscale(factor, up or 1.0)
            if up and down:
                attention = _mscale(factor, up) / _mscale(factor, down)
            else:
                attention = _mscale(factor, 1.0)
        return Yarn(
            float(factor),
            int(original),
            float(attention),
            float(values.get("beta_fast") or 32),
            float(values.get("beta_slow") or 1),
            bool(values.get("truncate", True)),
        )
    if attention is None:
        attention = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    pairs = (int(size * fraction) + 1) // 2
    short, long = tuple(values["short_factor"]), tuple(values["long_factor"])
    if len(short) != pairs or len(long) != pairs:
        raise ValueError(
            f"short_factor and long_factor must have {pairs} numbers, found "
            f"{len(short)} and {len(long)}"
        )
    return LongRope(short, long, int(original), float(attention))


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def kinds_of(windows: tuple[int | None, ...]) -> tuple[str, ...]:
    """The `layer_types` of transformers for these windows.

    >>> kinds_of((4, None))
    ('sliding_attention', 'full_attention')
    """
    return tuple(
        "full_attention" if w is None else "sliding_attention" for w in windows
    )


def write_all(
    family: str,
    rotary: tuple[Rotary | None, ...],
    windows: tuple[int | None, ...],
    context: int,
) -> dict[str, Any]:
    """The position keys of config.json, without windows.

    Args:
      family: model_type of config.json.
      rotary: one per layer.
      windows: one per layer.
      context: tokens that the model was made for.

    >>> write_all("llama", (Rotary(base=500.0),), (None,), 8)
    {'rope_parameters': {'rope_theta': 500.0, 'rope_type': 'default'}}
    """
    if family == "gemma3_text":
        kinds = kinds_of(windows)
        both = {kind: write(r) for kind, r in zip(kinds, rotary, strict=True)}
        # a type without layers still needs its parameters there
        for kind in ("full_attention", "sliding_attention"):
            both.setdefault(kind, write(rotary[0]))
        return {"rope_parameters": both}
    values = write(rotary[0])
    if family in _PARTIAL:
        values.setdefault("partial_rotary_factor", 1.0)
    keys: dict[str, Any] = {"rope_parameters": values}
    if family == "phi3":
        keys["original_max_position_embeddings"] = values.get(
            "original_max_position_embeddings", context
        )
    return keys


def write(rotary: Rotary | None) -> dict[str, Any]:
    """The `rope_parameters` of transformers 5 for one rotary embedding.

    >>> write(Rotary(base=500.0))
    {'rope_theta': 500.0, 'rope_type': 'default'}
    """
    if rotary is None:
        return {}
    values: dict[str, Any] = {"rope_theta": rotary.base, "rope_type": "default"}
    if rotary.fraction != 1.0:
        values["partial_rotary_factor"] = rotary.fraction
    scaling = rotary.scaling
    if isinstance(scaling, Interpolation):
        values |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3):
        values |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    elif isinstance(scaling, Yarn):
        values |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original,
            "attention_factor": scaling.attention,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "truncate": scaling.truncate,
        }
    elif isinstance(scaling, LongRope):
        values |= {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "original_max_position_embeddings": scaling.original,
            "attention_factor": scaling.attention,
        }
    return values
