"""From a stage of a plan to the jobs of the streaming driver."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from collab_jax.io.layout import Layout
from collab_jax.io.rows import Rows, align
from collab_jax.io.rows import check as check_rows
from collab_jax.io.safetensors import DTYPES
from collab_jax.merge.mergekit import METHODS
from collab_jax.merge.plan.reference import Reference, show
from collab_jax.merge.plan.stage import Stage
from collab_jax.merge.plan.targets import COPY, Target, Tensor
from collab_jax.merge.plan.tokens import Row, Tokenizer, references
from collab_jax.merge.sources import Source
from collab_jax.merge.stack import Transform, lift, scheduled
from collab_jax.merge.stream import Arrays, Job

_TYPES = {dtype.name: dtype for dtype in DTYPES.values()}


def keys(stage: Stage) -> list[str]:
    """The models of a stage in the order of the document, those for tokens last.

    >>> from collab_jax.merge.plan.stage import Stage
    >>> fields = dict.fromkeys(Stage._fields) | {"models": {"a": None, "b": None}}
    >>> keys(Stage(**fields))
    ['a', 'b']
    """
    extra = (show(reference) for reference in references(stage.tokenizer))
    return list(dict.fromkeys([*stage.models, *extra]))


def jobs(stage: Stage, sources: Mapping[str, Source], rows: Rows | None) -> list[Job]:
    """The tensors of a stage as jobs, in the order of the plan.

    Args:
      stage: of `plan`.
      sources: its models by key; may be empty where nothing will be read.
      rows: of the vocabulary that the result gets, None where that is the models'.

    Raises:
      ValueError: for knobs that a method cannot work with, naming the tensor.

    >>> from collab_jax.merge.plan.stage import Stage
    >>> fields = dict.fromkeys(Stage._fields) | {"targets": ()}
    >>> jobs(Stage(**fields), {}, None)
    []
    """
    parts = _parts(stage, rows)
    cast = None if stage.dtype is None else _TYPES[stage.dtype]
    made = []
    for target in stage.targets:
        base, experts = _roles(target)
        inputs = (*([] if base is None else [base]), *experts)
        weights = target.knobs.get("weight") or (1.0,) * len(experts)
        read = functools.partial(_read, target, base, experts, sources, rows, cast)
        shape = _shape(target, rows)
        part = parts.get(target.name)
        if part is None:
            weights = (1.0,)
        wide = target.layout.dtype.itemsize == 8
        made.append(
            Job(
                target.name,
                shape,
                target.layout.dtype,
                part,
                tuple(weights),
                read,
                tuple(f"{tensor.model} ({tensor.name})" for tensor in inputs),
                8 if wide else 4,
            )
        )
    return made


def layout(job: Job) -> Layout:
    """The type and shape of a job's result.

    >>> layout(Job("a", (2,), np.dtype("float32"), None, (1.0,), lambda: None, ()))
    Layout(dtype=dtype('float32'), shape=(2,))
    """
    return Layout(job.dtype, job.shape)


def _roles(target: Target) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The base and the experts as the method's stack has them."""
    if target.method == COPY:
        return None, target.sources
    if METHODS[target.method].base == "none" and target.base is not None:
        return None, (target.base, *target.sources)
    return target.base, target.sources


def _shape(target: Target, rows: Rows | None) -> tuple[int, ...]:
    if rows is None or target.vocabulary_axis is None:
        return target.layout.shape
    shape = list(target.layout.shape)
    shape[target.vocabulary_axis] = rows.padded
    return tuple(shape)


def _parts(stage: Stage, rows: Rows | None) -> dict[str, Transform]:
    """The transform of every tensor; all that use a method share one."""
    prepared: dict[str, dict[str, dict[str, Any]]] = {}
    for target in stage.targets:
        if target.method == COPY:
            continue
        shape = _shape(target, rows)
        try:
            knobs = METHODS[target.method].prepare(dict(target.knobs), shape)
        except ValueError as error:
            raise ValueError(f"tensor {target.name}: {error}") from None
        knobs.pop("weight", None)
        prepared.setdefault(target.method, {})[target.name] = knobs
    parts: dict[str, Transform] = {}
    for method, known in prepared.items():
        make = METHODS[method].make
        made = [lift(make(knobs)) for knobs in _unlike(known.values())]
        flat, hosted = all(p.flat for p in made), any(p.hosted for p in made)
        parts |= dict.fromkeys(known, scheduled(make, _at(known), flat, hosted))
    return parts


def _at(known: Mapping[str, dict[str, Any]]):
    return lambda name, shape: known[name]


def _unlike(knobs) -> list[dict[str, Any]]:
    """One of each kind: flags decide which part is made."""
    kinds = {}
    for each in knobs:
        flags = {k: v for k, v in each.items() if v is None or type(v) in (bool, str)}
        kinds[tuple(sorted(flags.items()))] = each
    return list(kinds.values())


def _read(
    target: Target,
    base: Tensor | None,
    experts: tuple[Tensor, ...],
    sources: Mapping[str, Source],
    rows: Rows | None,
    cast: np.dtype | None,
) -> Arrays:
    tensors = [*([] if base is None else [base]), *experts]
    arrays = [sources[t.model].checkpoint.read(t.name) for t in tensors]
    if target.method == COPY:
        for tensor, array in zip(tensors, arrays, strict=True):
            if not np.array_equal(array, arrays[0]):
                raise ValueError(
                    f"buffer {target.name} differs between {tensors[0].model} and "
                    f"{tensor.model}: it cannot be merged; make it equal"
                )
        return None, (arrays[0],)
    if rows is not None and target.vocabulary_axis is not None:
        named = {t.model: a for t, a in zip(tensors, arrays, strict=True)}
        aligned = align(rows, named, target.vocabulary_axis)
        arrays = [aligned[t.model] for t in tensors]
    if cast is not None:
        arrays = [a.astype(cast) if _narrows(a.dtype, cast) else a for a in arrays]
    if base is None:
        return None, tuple(arrays)
    return arrays[0], tuple(arrays[1:])


def _narrows(dtype: np.dtype, cast: np.dtype) -> bool:
    """Whether a cast loses digits; others are left to the programs."""
    return dtype != cast and not np.can_cast(dtype, cast, "safe")


def check(stage: Stage, sources: Mapping[str, Source], rows: Rows | None) -> None:
    """Refuses vocabularies that the models' matrices do not fit, before any is read.

    Args:
      stage: of `plan`.
      sources: its models by key.
      rows: of the vocabulary, or None.

    Raises:
      ValueError: naming the model.

    >>> from collab_jax.merge.plan.stage import Stage
    >>> check(Stage(**dict.fromkeys(Stage._fields)), {}, None)
    """
    if rows is None:
        return
    for target in stage.targets:
        if target.vocabulary_axis is None:
            continue
        tensors = [*([] if target.base is None else [target.base]), *target.sources]
        shapes = {
            t.model: sources[t.model].checkpoint.layouts[t.name].shape for t in tensors
        }
        check_rows(rows, shapes)


def vocabulary_of(stage: Stage, sources: Mapping[str, Source]) -> Any:
    """The vocabulary that a stage asks for, or None.

    Args:
      stage: of `plan`.
      sources: its models by key, those for tokens included.

    Returns:
      A `collab_jax.io.vocabulary.Vocabulary`.

    Raises:
      FileNotFoundError: for a model without a tokenizer.
      ValueError: for a token that is not there.

    >>> from collab_jax.merge.plan.stage import Stage
    >>> vocabulary_of(Stage(**dict.fromkeys(Stage._fields)), {})
    """
    if stage.tokenizer is None:
        return None
    from collab_jax.io.vocabulary import Member, vocabulary  # imports transformers

    rows = {
        tensor.model: sources[tensor.model].checkpoint.layouts[tensor.name].shape[0]
        for target in stage.targets
        if target.vocabulary_axis == 0
        for tensor in (*filter(None, [target.base]), *target.sources)
    }
    members = []
    for key in keys(stage):
        source = sources[key]
        count = rows.get(key, source.config.get("vocab_size", math.inf))
        members.append(Member(key, source.folder, count))
    return vocabulary(members, stage.base, _wish(stage.tokenizer))


def _wish(tokenizer: Tokenizer) -> Any:
    from collab_jax.io.vocabulary import Given, Wish

    def given(token):
        source = token.source
        if isinstance(source, Row):
            model = show(source.model)
            return Given(model, source.token, source.token_id, False, token.force)
        model = show(source) if isinstance(source, Reference) else None
        return Given(model, None, None, token.zero, token.force)

    source = tokenizer.source
    return Wish(
        source if isinstance(source, str) else show(source),
        {name: given(token) for name, token in tokenizer.tokens.items()},
        tokenizer.pad_to_multiple_of,
    )
