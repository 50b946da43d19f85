"""Which tensors of several models belong together, and what speaks against it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from collab_jax.io.layout import Checkpoint, Layout
from collab_jax.merge.plan import layout


class Matched(NamedTuple):
    """A tensor that all models have, in one shape."""

    name: str  # as the first model writes it
    own: tuple[str, ...]  # as each model does
    shape: tuple[int, ...]
    buffer: bool  # no parameter: it is only told whether it is equal


class Correspondence(NamedTuple):
    """The tensors of several models, side by side."""

    matched: list[Matched]  # in the order of the first model
    findings: list[str]  # as those of `collab_jax.io.compatible.check_models`
    apart: list[str]  # tensors of the first that could not be compared


def correspond(
    names: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    configs: Sequence[Mapping[str, Any]],
) -> Correspondence:
    """Brings the tensors of models together by their names; no tensor is read.

    A head that a model lacks because it is tied is compared as its embedding.

    Args:
      names: how messages call the models; the first is what others are compared with.
      checkpoints: theirs.
      configs: config.json of each.

    >>> import numpy as np
    >>> f32 = np.dtype("float32")
    >>> one = Checkpoint({"a": Layout(f32, (2,)), "b": Layout(f32, (2,))}, None)
    >>> two = Checkpoint({"a": Layout(f32, (3,))}, None)
    >>> found = correspond(["A", "B"], [one, two], [{}, {}])
    >>> print("\\n".join(found.findings))
    wrong: tensors: B lacks b, which A has; nothing can be merged there
    wrong: shape: a: A [2], B [3]; only tensors of one shape can be merged
    """
    first = checkpoints[0].layouts
    views = [{name: name for name in first}]
    findings: list[str] = []
    for who, other in zip(names[1:], checkpoints[1:], strict=True):
        view = layout.view(other.layouts, first)
        lines, view = _names(names[0], who, first, view, other.layouts)
        findings += lines
        views.append(view)
    matched, apart, unlike = [], [], dict[tuple, list[str]]()
    for name, mine in first.items():
        own = [view.get(name) for view in views]
        layouts = [
            None if n is None else c.layouts[n]
            for n, c in zip(own, checkpoints, strict=True)
        ]
        whole = True
        for n, other in enumerate(layouts):
            if other is None:
                whole = False
            elif other.shape != mine.shape:
                whole = False
                token = layout.vocabulary_axis(name, mine.shape, dict(configs[0]))
                key = n, token is not None and other.shape[1:] == mine.shape[1:]
                unlike.setdefault(key, []).append(
                    f"{name}: {names[0]} {list(mine.shape)}, "
                    f"{names[n]} {list(other.shape)}"
                )
        if whole:
            buffer = layout.is_buffer(name, mine)
            matched.append(
                Matched(name, tuple(n or "" for n in own), mine.shape, buffer)
            )
        else:
            apart.append(name)
    for (_, tokens), lines in sorted(unlike.items()):
        why = (
            "set tokenizer: {source: union} or {source: base}"
            if tokens
            else "only tensors of one shape can be merged"
        )
        findings.append(f"wrong: shape: {lines[0]}{_more(lines)}; {why}")
    findings += _types(names, checkpoints)
    return Correspondence(matched, findings, apart)


def _names(
    one: str,
    two: str,
    first: Mapping[str, Layout],
    view: dict[str, str],
    others: Mapping[str, Layout],
) -> tuple[list[str], dict[str, str]]:
    """Lines about missing and extra tensors; and the view with tied heads in it."""
    lines, lacking = [], []
    view = dict(view)
    extra = [name for name in view if name not in first]
    for name in first:
        if name in view:
            continue
        stand_in = layout.tied_to(name, others)
        if stand_in is not None and layout.is_head(name):
            view[name] = stand_in
            lines.append(
                f"suspicious: head: {one} has {name}, {two} ties it to {stand_in}; "
                "the result has a head of its own"
            )
        else:
            lacking.append(name)
    for name in list(extra):
        stand_in = layout.tied_to(name, first)
        if stand_in is not None and layout.is_head(name):
            extra.remove(name)
            lines.append(
                f"suspicious: head: {two} has {name}, {one} ties it to {stand_in}; "
                "the result has a head of its own"
            )
    if lacking:
        lines.append(
            f"wrong: tensors: {two} lacks {lacking[0]}{_more(lacking)}, which {one} "
            "has; nothing can be merged there"
        )
    if extra:
        lines.append(
            f"wrong: tensors: {two} has {extra[0]}{_more(extra)}, which {one} lacks; "
            "a merge would leave out what they do"
        )
    return lines, view


def _types(names: Sequence[str], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A line where models are stored in different types."""
    stored = []
    for who, checkpoint in zip(names, checkpoints, strict=True):
        kinds = {x.dtype.name for x in checkpoint.layouts.values()}
        floating = sorted(kind for kind in kinds if "float" in kind)
        stored.append((who, "+".join(floating) or "none"))
    if len({kinds for _, kinds in stored}) < 2:
        return []
    said = ", ".join(f"{who} {kinds}" for who, kinds in stored)
    return [
        f"suspicious: stored type: {said}; rounding to the narrower one shows as a "
        "difference"
    ]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
