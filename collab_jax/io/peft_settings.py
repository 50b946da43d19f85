"""The settings of a LoRA adapter, as adapter_config.json of PEFT says them."""

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

FOREWORD = "base_model.model."  # before the names of the adapted model
UNREAD = {  # what would change the meaning -> its neutral value
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "use_bdlora": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "kasa_config": None,
    "velora_config": None,
    "arrow_config": None,
    "monteclora_config": None,
}
# these leave the base as it is; others (pissa, olora, corda, loftq ...) change it too
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_settings(path: str | Path, known: Collection[str] = ()) -> dict[str, Any]:
    """Reads the settings of a LoRA adapter, and refuses those that would be ignored.

    Args:
      path: of adapter_config.json.
      known: settings beyond plain LoRA that the caller heeds.

    Raises:
      FileNotFoundError: where it is missing.
      ValueError: for another kind of adapter, and for a setting that is not heeded.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "adapter_config.json"
    >>> _ = path.write_text('{"peft_type": "LORA", "r": 4, "use_dora": true}')
    >>> read_settings(path, ["use_dora"])["r"]
    4
    >>> read_settings(path)
    Traceback (most recent call last):
    ValueError: ...adapter_config.json says use_dora = True: only plain LoRA is read
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder of an adapter has it")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        found = settings.get("peft_type") if isinstance(settings, dict) else settings
        raise ValueError(f"{path} says peft_type {found!r}: 'LORA' is expected")
    for name, neutral in UNREAD.items():
        if name not in known and (settings.get(name) or neutral) != neutral:
            raise ValueError(
                f"{path} says {name} = {settings[name]!r}: only "
                f"{'these are' if known else 'plain LoRA is'} read"
                + (f": plain LoRA, {', '.join(known)}" if known else "")
            )
    start = settings.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"{path} says init_lora_weights = {start!r}, which changes the base model "
            "too; convert it with PEFT (path_initial_model_for_weight_conversion)"
        )
    return settings


def rank_of(settings: dict[str, Any], module: str) -> int:
    """R of one module: the first pattern that fits its name, else the common one.

    Args:
      settings: from `read_settings`.
      module: its name in the adapted model.

    >>> rank_of({"r": 8, "rank_pattern": {"q_proj": 2}}, "layers.0.q_proj")
    2
    """
    return _chosen(settings.get("rank_pattern"), module, settings.get("r", 8))


def scale_of(settings: dict[str, Any], module: str) -> float:
    """What B A is multiplied by: alpha / R, or alpha / sqrt(R) with `use_rslora`.

    Args:
      settings: from `read_settings`.
      module: its name in the adapted model.

    >>> scale_of({"r": 4, "lora_alpha": 8, "use_rslora": True}, "layers.0.q_proj")
    4.0
    """
    rank = rank_of(settings, module)
    alpha = _chosen(
        settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8)
    )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _chosen(patterns: dict[str, Any] | None, module: str, common: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return common
