"""A merge resolved to the last tensor, as plain data.

What runs a stage needs no configuration and no architecture: it reads the tensors that
a target names, merges them by the target's method and knobs, and writes the result
under the target's name.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

from collab_jax.io.safetensors import Layout
from collab_jax.merge.plan.reference import Reference, show
from collab_jax.merge.plan.targets import Target
from collab_jax.merge.plan.tokens import Tokenizer


class Stage(NamedTuple):
    """One merge, resolved to the last tensor."""

    name: str | None  # of the document; the last stage's result is the one wanted
    method: str
    targets: tuple[Target, ...]
    models: dict[str, Reference]  # by key, in the order of the document, the base first
    # key, also of a model for tokens -> the stage whose result stands for that model
    earlier: dict[str, str]
    base: str | None  # key
    donor: str  # key of the model whose config.json and tokenizer the result takes
    dtype: str | None  # what inputs are cast to; None: as they are, promoted
    out_dtype: str | None  # what results are cast to; None: as the method gives them
    tokenizer: Tokenizer | None
    chat_template: str | None
    layers: dict[str, int]  # by module ("" for the model): layers made from slices
    config: dict[str, Any]  # changes to the donor's config.json, by dotted key
    notes: tuple[str, ...]  # what has no effect or may surprise


def describe(stage: Stage) -> str:
    """A plan in a few lines: models, tensors by method, layers, types, notes.

    Args:
      stage: of `plan`.

    >>> from collab_jax.merge.plan.reference import Place
    >>> models = {"a": Reference(Place("a"))}
    >>> stage = Stage(None, "linear", (), models, {}, None, "a", None, "bfloat16", None,
    ...     None, {}, {}, ("nothing to do",))
    >>> print(describe(stage))
    linear of 1 model: a
      0 tensors, 0.00 GB
      config.json and tokenizer from a
      dtype: of the inputs, out_dtype: bfloat16
      note: nothing to do
    """
    listed = ", ".join(
        key + (" (the base)" if key == stage.base else "") for key in stage.models
    )
    count = len(stage.models)
    title = f"{stage.name}: " if stage.name else ""
    lines = [f"{title}{stage.method} of {count} model{'s' * (count > 1)}: {listed}"]
    for method, number in Counter(t.method for t in stage.targets).items():
        lines.append(f"  {number} tensors by {method}")
    total = sum(_size(target.layout) for target in stage.targets)
    lines.append(f"  {len(stage.targets)} tensors, {total / 1e9:.2f} GB")
    rows = [t.name for t in stage.targets if t.vocabulary_axis is not None]
    if stage.tokenizer:
        source = stage.tokenizer.source
        written = source if isinstance(source, str) else show(source)
        lines.append(
            f"  tokenizer: {written}; it aligns {', '.join(rows) or 'nothing'}"
        )
        lines.append(f"  config.json from {stage.donor}")
    else:
        lines.append(f"  config.json and tokenizer from {stage.donor}")
    for key, value in stage.config.items():
        lines.append(f"  config.json: {key} becomes {value}")
    for module, number in stage.layers.items():
        lines.append(f"  {number} layers in {module or 'the model'}")
    dtype, out = stage.dtype or "of the inputs", stage.out_dtype or "of the merge"
    lines.append(f"  dtype: {dtype}, out_dtype: {out}")
    lines += [f"  note: {note}" for note in stage.notes]
    return "\n".join(lines)


def _size(layout: Layout) -> int:
    return math.prod(layout.shape) * layout.dtype.itemsize
