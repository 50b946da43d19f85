"""From groups of sources to one target per tensor of the result.

Within a model, tensors go by the names that the first model's checkpoint uses for them
(see `layout.view`); a `Tensor` holds the name in its own checkpoint.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from collab_jax.io.safetensors import DTYPES, Layout
from collab_jax.merge.mergekit_table import TABLE, Spec
from collab_jax.merge.plan import layout
from collab_jax.merge.plan.group import Source
from collab_jax.merge.plan.layout import Structure
from collab_jax.merge.plan.parameters import Setting, resolve
from collab_jax.merge.plan.reference import Reference

COPY = "copy"  # in place of a method: a buffer, equal in all sources
_TYPES = {dtype.name: dtype for dtype in DTYPES.values()}


class Tensor(NamedTuple):
    """Where an input tensor is."""

    model: str  # key of Stage.models
    name: str  # in that model's checkpoint


class Target(NamedTuple):
    """One tensor of the result."""

    name: str
    method: str  # mergekit's name; or COPY
    base: Tensor | None
    sources: tuple[Tensor, ...]  # in the order of the document
    knobs: dict[str, Any]  # by name: a value, or a tuple with one for each source
    layout: Layout  # of the result; a vocabulary step may change the rows
    vocabulary_axis: int | None = None  # 0: the rows belong to tokens


class ModelFacts(NamedTuple):
    """What is known of a model before a tensor is read."""

    layouts: dict[str, Layout]
    config: dict[str, Any]  # config.json
    settled: bool = True  # False: a vocabulary step will decide the number of rows


class Model(NamedTuple):
    """A model, or a module of one, while a plan is made."""

    key: str
    facts: ModelFacts
    names: dict[str, str]  # as the first model writes them -> as this one does
    structure: Structure  # of the former


class Group(NamedTuple):
    """Sources that are merged together, and how their parameters follow."""

    models: tuple[Model, ...]  # as the sources, the base included
    places: tuple[str, ...]  # their paths in the document
    base: int | None  # which of them is the base
    method: str
    shared: dict[str, Callable[[str, float], Any]]  # (tensor, t) -> value
    own: tuple[dict[str, Callable[[str, float], Any]], ...]  # the same by source
    dtype: str | None = None
    out_dtype: str | None = None
    aligned: bool = False  # a vocabulary step will make the rows equal


def group(
    method: str,
    sources: Sequence[Source],
    base: Reference | None,
    models: dict[Reference, Model],
    levels: Sequence[dict[str, Setting]],
    dtype: str | None = None,
    out_dtype: str | None = None,
    aligned: bool = False,
) -> Group:
    """Makes a group of sources.

    Args:
      method: its name.
      sources: in the order of the document, checked.
      base: their base model.
      models: by reference.
      levels: the settings of slice, module and document.
      dtype: of the inputs; None: as they are.
      out_dtype: of the result; None: as the method gives it.
      aligned: whether a vocabulary step makes unequal numbers of rows equal.

    >>> from collab_jax.merge.plan.reference import parse
    >>> a = parse("a")
    >>> model = Model("a", ModelFacts({}, {}), {}, Structure({}, []))
    >>> source = Source(a, None, {}, "models[0]")
    >>> made = group("karcher", [source], None, {a: model}, [])
    >>> made.shared["max_iter"]("norm.weight", 0)
    10
    """
    spec = TABLE[method]
    at = None
    if spec.base != "source" and base is not None:
        at = [source.model for source in sources].index(base)
    return Group(
        tuple(models[source.model] for source in sources),
        tuple(source.where for source in sources),
        at,
        method,
        {name: resolve(name, p, levels) for name, p in spec.shared.items()},
        tuple(_own(method, spec, source, levels) for source in sources),
        dtype,
        out_dtype,
        aligned,
    )


def _own(
    method: str, spec: Spec, source: Source, levels: Sequence[dict[str, Setting]]
) -> dict[str, Callable[[str, float], Any]]:
    where = f"{source.where}.parameters"
    if source.where == "base_model":
        where = f"base_model is one more source of {method}, name it there too; {where}"
    return {
        name: resolve(name, parameter, [source.parameters, *levels], where)
        for name, parameter in spec.per_source.items()
    }


def target(group: Group, name: str, inputs: Sequence[str], t: float) -> Target | None:
    """One tensor of the result, or None for a buffer that some source lacks.

    Args:
      group: the sources.
      name: of the result.
      inputs: its name in each source, as the first model writes it.
      t: where its layer lies, from 0 to 1.

    Raises:
      ValueError: where a source lacks the tensor, shapes differ, or a parameter has no
        value.

    >>> from collab_jax.merge.plan.reference import parse
    >>> a, f32 = parse("a"), Layout(DTYPES["F32"], (2,))
    >>> facts = ModelFacts({"n": f32}, {})
    >>> model = Model("a", facts, {"n": "n"}, Structure({}, ["n"]))
    >>> source = Source(a, None, {}, "models[0]")
    >>> one = group("passthrough", [source], None, {a: model}, [])
    >>> target(one, "n", ["n"], 0).sources
    (Tensor(model='a', name='n'),)
    """
    first = _first(group)
    found = [_find(group, i, inputs[i]) for i in range(len(inputs))]
    layouts = [
        model.facts.layouts[own] if own is not None else None
        for model, own in zip(group.models, found, strict=True)
    ]
    like = layouts[first] or next((x for x in layouts if x is not None), None)
    if like is None:
        raise _missing(group, first, inputs[first])
    differing = (x for x in layouts if x is not None and x != like)
    if layout.is_buffer(name, like) or any(
        layout.is_buffer(name, x) for x in differing
    ):
        return _buffer(group, name, found, layouts, like)
    for i, own in enumerate(found):
        if own is None:
            raise _missing(group, i, inputs[i])
    config = group.models[first].facts.config
    axis = layout.vocabulary_axis(inputs[first], like.shape, config)
    _check_shapes(group, name, layouts, axis)
    tensors = [
        Tensor(model.key, own or "")
        for model, own in zip(group.models, found, strict=True)
    ]
    others = [i for i in range(len(tensors)) if i != group.base]
    result = _result(group, [x.dtype for x in layouts if x is not None])
    made = Layout(result, like.shape)
    base = None if group.base is None else tensors[group.base]
    if not others and base is not None:  # a base alone is the result
        return Target(
            name, "passthrough", None, (base,), {"scale": (None,)}, made, axis
        )
    knobs = {key: value(name, t) for key, value in group.shared.items()}
    for key in TABLE[group.method].per_source:
        knobs[key] = tuple(group.own[i][key](inputs[i], t) for i in others)
    sources = tuple(tensors[i] for i in others)
    return Target(name, group.method, base, sources, knobs, made, axis)


def _first(group: Group) -> int:
    """Which of the sources the others are compared with."""
    return 0 if group.base is None else group.base


def _find(group: Group, index: int, name: str) -> str | None:
    """The tensor in one source; of a tied head, the embedding."""
    model = group.models[index]
    if name in model.names:
        return model.names[name]
    tied = layout.tied_to(name, model.names)
    if tied is None:
        return None
    if layout.value(model.facts.config, "tie_word_embeddings") is False:
        raise ValueError(
            f"{group.places[index]}: {name} is missing from {model.key}, whose "
            "config.json says tie_word_embeddings: false; fetch the checkpoint again"
        )
    return model.names[tied]


def _missing(group: Group, index: int, name: str) -> ValueError:
    model, like = group.models[index], group.models[_first(group)]
    close = difflib.get_close_matches(name, list(model.names), 1, 0.0)
    hint = f"; the closest there is {close[0]}" if close else ""
    return ValueError(
        f"{group.places[index]}: tensor {name} is missing from {model.key} and needed "
        f"to match {like.key}{hint}"
    )


def _buffer(
    group: Group,
    name: str,
    found: Sequence[str | None],
    layouts: Sequence[Layout | None],
    like: Layout,
) -> Target | None:
    if found[_first(group)] is None:
        return None
    for i, other in enumerate(layouts):
        if other is not None and other != like:
            raise ValueError(
                f"{group.places[i]}: the buffer {name} is {_written(other)} in "
                f"{group.models[i].key} and {_written(like)} elsewhere; buffers are "
                "copied and must be equal"
            )
    sources = tuple(
        Tensor(model.key, own)
        for model, own in zip(group.models, found, strict=True)
        if own is not None
    )
    return Target(name, COPY, None, sources, {}, like)


def _check_shapes(
    group: Group, name: str, layouts: Sequence[Layout | None], axis: int | None
) -> None:
    first = _first(group)
    like = layouts[first]
    for i, other in enumerate(layouts):
        if like is None or other is None or other.shape == like.shape:
            continue
        rows_only = axis == 0 and other.shape[1:] == like.shape[1:]
        settled = group.models[i].facts.settled and group.models[first].facts.settled
        if rows_only and (group.aligned or not settled):
            continue
        cure = (
            "; set tokenizer: {source: base} or {source: union} to align the tokens"
            if rows_only
            else "; only models of one architecture and size can be merged"
        )
        raise ValueError(
            f"{group.places[i]}: {name} is {list(other.shape)} in "
            f"{group.models[i].key} and {list(like.shape)} in "
            f"{group.models[first].key}{cure}"
        )


def _written(layout: Layout) -> str:
    return f"{layout.dtype.name}{list(layout.shape)}"


def _result(group: Group, dtypes: Sequence[np.dtype]) -> np.dtype:
    """The type of the result, as mergekit gives it."""
    if group.out_dtype:
        return _TYPES[group.out_dtype]
    found = [_TYPES[group.dtype]] if group.dtype else list(dtypes)
    if TABLE[group.method].wide:
        found.append(_TYPES["float32"])
    result = found[0]
    for dtype in found[1:]:
        if dtype.itemsize > result.itemsize:
            result = dtype
        elif dtype.itemsize == result.itemsize and dtype != result:
            result = _TYPES["float32"]  # float16 and bfloat16
    return result
