"""The parts of a model that `modules:` names: decoder, vision tower, projector, ...

A name is one that mergekit gives to parts of models it knows, or the beginning of the
tensors' names (`model.vision_tower`, `model.language_model.layers`), or `default` for
what no other module holds.
"""

import re
from collections.abc import Iterable

from collab_jax.merge.plan import fields

# mergekit's names, the more special first
_NAMES = {
    "multi_modal_projector": (
        r"^(model\.)?(multi_modal_projector\.|(visual\.)(merger|deepstack_merger_list)\.)"
    ),
    "vision_tower": r"^(model\.)?(vision_tower|visual)\.",
    "vision_model": r"^(model\.)?vision_model\.",
    "encoder": r"^(model\.)?encoder\.",
    "decoder": r"^(model\.)?decoder\.|^proj_out\.",
    "shared": r"^(shared|lm_head)\.",
    "text_decoder": (
        r"^(model\.)?language_model\.|^model\.(embed_tokens|layers|norm)\.|^lm_head\."
    ),
}
_DEFAULT = "default"


def split(names: Iterable[str], wanted: Iterable[str]) -> dict[str, list[str]]:
    """Gives each tensor to one of the modules that are asked for.

    Args:
      names: of all tensors.
      wanted: names of modules.

    Raises:
      ValueError: for a module without tensors, and for tensors without a module: they
        would be missing in the result.

    >>> names = ["vision_tower.a.weight", "language_model.norm.weight"]
    >>> split(names, ["text_decoder", "vision_tower"])
    {'text_decoder': ['language_model.norm.weight'],
     'vision_tower': ['vision_tower.a.weight']}
    >>> split(names, ["text_decoder"])
    Traceback (most recent call last):
    ValueError: modules: vision_tower.a.weight and 0 other tensors belong to none of
    text_decoder and would be missing; add a module, such as vision_tower
    """
    names, wanted = list(names), list(wanted)
    patterns = {name: _pattern(name) for name in wanted if name != _DEFAULT}
    order = sorted(patterns, key=_rank)
    found: dict[str, list[str]] = {name: [] for name in wanted}
    left = []
    for name in names:
        for module in order:
            if patterns[module].search(name):
                found[module].append(name)
                break
        else:
            left.append(name)
    if _DEFAULT in found:
        found[_DEFAULT], left = left, []
    known = _fitting(names)
    for module, tensors in found.items():
        if not tensors:
            text = fields.unknown("module", module, known)
            raise ValueError(f"modules.{module}: {text}")
    if left:
        fitting = [name for name in known if _pattern(name).search(left[0])]
        raise ValueError(
            f"modules: {left[0]} and {len(left) - 1} other tensors belong to none of "
            f"{', '.join(wanted)} and would be missing; add a module, such as "
            f"{(fitting or [_DEFAULT])[0]}"
        )
    return found


def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(
        _NAMES.get(module, rf"^(model\.)?{re.escape(module.rstrip('.'))}\.")
    )


def _rank(module: str) -> tuple[int, int]:
    """Beginnings of names come first, the longest first."""
    if module not in _NAMES:
        return -1, -len(module)
    return list(_NAMES).index(module), 0


def _fitting(names: list[str]) -> list[str]:
    found = [m for m in _NAMES if any(_pattern(m).search(name) for name in names)]
    return [*found, _DEFAULT]
