"""A merge configuration in mergekit's YAML, read unchanged and checked to the last key.

What mergekit 0.1.5 accepts is accepted, but for what it would silently ignore or fail
on later:
- a key that is not known, anywhere, is an error that names the closest known one;
- a parameter of another method has no effect, as there, and is told in `notes`; a
  parameter of the whole tensor among those of one source is an error;
- empty layer ranges, empty values, types other than floats and unknown methods fail
  here rather than in the middle of the merge.
"""

from pathlib import Path
from typing import Any, NamedTuple

from collab_jax.merge.mergekit_table import TABLE, Spec
from collab_jax.merge.plan import dependencies, document, fields, tokens
from collab_jax.merge.plan.group import Module, Slice, Source, check
from collab_jax.merge.plan.parameters import Setting, setting
from collab_jax.merge.plan.reference import Reference, parse
from collab_jax.merge.plan.tokens import Tokenizer, chat_template, tokenizer

DTYPES = ("bfloat16", "float16", "float32", "float64")


class Document(NamedTuple):
    """One merge. `models:` and `slices:` stand under the module ""."""

    name: str | None
    method: str
    base: Reference | None
    modules: dict[str, Module]
    parameters: dict[str, Setting]
    dtype: str | None  # what the inputs are cast to
    out_dtype: str | None  # what the result is cast to
    tokenizer: Tokenizer | None
    chat_template: str | None
    notes: tuple[str, ...] = ()  # what has no effect


def read(source: str | Path) -> tuple[Document, ...]:
    """Reads a configuration of one or several documents.

    A document may have a name; others refer to its result by that name in place of a
    path. The document whose result is wanted is the one without a name, or the one that
    no other uses.

    Args:
      source: a file, or the text itself: a `str` with a line break.

    Returns:
      The documents, each after those that it uses; the last is the wanted one.

    Raises:
      OSError: where the file cannot be read.
      ValueError: for anything that is not as it should be, with the key's path.

    >>> [merge] = read('''
    ... merge_method: linear
    ... models:
    ... - {model: a, parameters: {weight: 0.5}}
    ... - {model: b@v2, parameters: {weight: [0, 1]}}
    ... ''')
    >>> merge.method, [s.where for s in merge.modules[""].models]
    ('linear', ['models[0]', 'models[1]'])
    >>> read("merge_method: slerp\\nmodel: []\\n")
    Traceback (most recent call last):
    ValueError: model: unknown key 'model'; did you mean models or modules? known ...
    """
    raw = document.load(source)
    found = []
    for number, value in enumerate(raw, 1):
        try:
            found.append(_document(value))
        except ValueError as error:
            place = f"document {number}: " if len(raw) > 1 else ""
            raise ValueError(f"{place}{error}") from None
    return _ordered(found)


def references(merge: Document) -> list[Reference]:
    """The models of a document in the order in which they are named, the base first.

    >>> [merge] = read("{merge_method: karcher, models: [{model: b}], base_model: a}")
    >>> [reference.model.path for reference in references(merge)]
    ['a', 'b']
    """
    found = {merge.base: None} if merge.base else {}
    for module in merge.modules.values():
        for group in module.slices or ():
            found |= {group.base: None} if group.base else {}
            found |= {source.model: None for source in group.sources}
        found |= {source.model: None for source in module.models or ()}
    return list(found)


def place_of(merge: Document, model: Reference) -> str:
    """The path in the document at which a model is first named.

    >>> [merge] = read("{merge_method: linear, models: [{model: b}], parameters: {}}")
    >>> place_of(merge, references(merge)[0])
    'models[0].model'
    """
    for module in merge.modules.values():
        for part in module.slices or ():
            if part.base == model != merge.base:
                return f"{part.where}.base_model"
        groups = [part.sources for part in module.slices or ()]
        for source in (s for group in [*groups, module.models or ()] for s in group):
            if source.model == model:
                return f"{source.where}.model"
    return "base_model"


_KEYS = ("merge_method", "base_model", "models", "slices", "modules", "parameters")
_KEYS += (
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)


def _document(value: dict[str, Any]) -> Document:
    given = fields.mapping(value, "", _KEYS, ["merge_method"])
    method = fields.text(given["merge_method"], "merge_method", "a method's name")
    if method not in TABLE:
        text = fields.unknown("method", method, TABLE)
        raise ValueError(f"merge_method: {text}")
    inputs = [key for key in ("models", "slices", "modules") if given.get(key)]
    if len(inputs) != 1:
        raise ValueError(
            f"exactly one of models, slices and modules was expected; found "
            f"{' and '.join(inputs) or 'none'}"
        )
    base = parse(given["base_model"], "base_model") if "base_model" in given else None
    notes: list[str] = []
    reader = _Reader(method, TABLE[method], base, notes)
    if inputs[0] == "modules":
        modules = _modules(reader, given["modules"])
    else:
        only = {inputs[0]: given[inputs[0]]}
        modules = {"": _module(reader, only, "")}
    return Document(
        fields.text(given["name"], "name") if "name" in given else None,
        method,
        base,
        modules,
        _parameters(reader, given, ""),
        _dtype(given, "dtype"),
        _dtype(given, "out_dtype"),
        tokenizer(given),
        chat_template(given.get("chat_template")),
        tuple(dict.fromkeys(notes)),
    )


class _Reader(NamedTuple):
    """What the parts of a document are read with."""

    method: str
    spec: Spec
    base: Reference | None
    notes: list[str]


def _modules(reader: _Reader, value: Any) -> dict[str, Module]:
    if not isinstance(value, dict):
        raise ValueError("modules: a mapping from names to modules was expected")
    found = {}
    for name, content in value.items():
        where = f"modules.{name}"
        known = ("models", "slices", "parameters")
        given = fields.mapping(content, where, known)
        if bool(given.get("models")) == bool(given.get("slices")):
            raise ValueError(f"{where}: either models or slices was expected")
        found[fields.text(name, "modules", "a module's name")] = _module(
            reader, given, where
        )
    return found


def _module(reader: _Reader, given: dict[str, Any], where: str) -> Module:
    parameters = _parameters(reader, given, where) if where else {}
    if given.get("models"):
        place = fields.within(where, "models")
        listed = fields.entries(given["models"], place, "models")
        sources = tuple(_source(reader, value, at, False) for at, value in listed)
        models = [source.model for source in sources]
        if reader.base and reader.base not in models:
            sources += (Source(reader.base, None, {}, "base_model"),)
        check(reader.method, reader.spec, sources, reader.base, place)
        _base_parameters(reader, sources, reader.base)
        return Module(None, sources, parameters, place)
    place = fields.within(where, "slices")
    slices = fields.entries(given["slices"], place, "slices")
    return Module(
        tuple(_slice(reader, value, at) for at, value in slices),
        None,
        parameters,
        place,
    )


def _slice(reader: _Reader, value: Any, where: str) -> Slice:
    known = ("sources", "base_model", "parameters", "residual_weight")
    given = fields.mapping(value, where, known, ["sources"])
    place = fields.within(where, "sources")
    listed = fields.entries(given["sources"], place, "sources")
    if "residual_weight" in given:
        fields.number(given["residual_weight"], f"{where}.residual_weight")
        reader.notes.append("residual_weight has no effect, as in mergekit")
    base = reader.base
    if "base_model" in given:
        base = parse(given["base_model"], f"{where}.base_model")
    sources = tuple(_source(reader, entry, at, True) for at, entry in listed)
    check(reader.method, reader.spec, sources, base, where)
    _base_parameters(reader, sources, base)
    return Slice(sources, base, _parameters(reader, given, where), where)


def _source(reader: _Reader, value: Any, where: str, sliced: bool) -> Source:
    known = (
        ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
    )
    required = ("model", "layer_range") if sliced else ("model",)
    given = fields.mapping(value, where, known, required)
    return Source(
        parse(given["model"], f"{where}.model"),
        _range(given["layer_range"], f"{where}.layer_range") if sliced else None,
        _parameters(reader, given, where, own=True),
        where,
    )


def _range(value: Any, where: str) -> tuple[int, int]:
    ends = [
        fields.whole(v, at) for at, v in fields.entries(value, where, "two numbers")
    ]
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
        raise ValueError(
            f"{where}: found {value}; [first, end] with 0 <= first < end was expected"
        )
    return ends[0], ends[1]


def _parameters(
    reader: _Reader, given: dict[str, Any], where: str, own: bool = False
) -> dict[str, Setting]:
    """The settings of one level; `own`: it is the level of a single source."""
    place = fields.within(where, "parameters")
    value = given.get("parameters", {})
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a mapping from names to values was expected")
    spec, found = reader.spec, {}
    for name, content in value.items():
        at = f"{place}.{name}"
        if name in spec.per_source or (name in spec.shared and not own):
            parameter = (spec.per_source | spec.shared)[name]
            found[name] = setting(content, parameter, at)
        elif name in spec.shared:
            raise ValueError(
                f"{at}: {name} is one value for all sources of {reader.method}; it "
                "would have no effect here, move it to the parameters of the slice, "
                "the module or the document"
            )
        elif any(name in s.per_source | s.shared for s in TABLE.values()):
            reader.notes.append(
                f"parameter {name} has no effect: {reader.method} does not use it"
            )
        else:
            known = [*spec.per_source, *spec.shared]
            text = fields.unknown(f"parameter of {reader.method}", str(name), known)
            raise ValueError(f"{at}: {text}")
    return found


def _base_parameters(
    reader: _Reader, sources: tuple[Source, ...], base: Reference | None
) -> None:
    for source in sources:
        if source.model == base and source.parameters and reader.spec.base != "source":
            names = ", ".join(source.parameters)
            reader.notes.append(
                f"{source.where}: {names} of the base model has no effect"
            )


def _dtype(given: dict[str, Any], key: str) -> str | None:
    if not given.get(key):
        return None
    name = fields.text(given[key], key, "a type").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{key}: {fields.unknown('type', name, DTYPES)}")
    return name


def _ordered(documents: list[Document]) -> tuple[Document, ...]:
    """Each document after those that it uses, the wanted one last."""
    names: dict[str | None, Document] = {}
    for merge in documents:
        if merge.name in names:
            what = f"the name {merge.name}" if merge.name else "no name"
            raise ValueError(f"name: two documents have {what}; one may")
        names[merge.name] = merge
    uses = {}
    for merge in documents:
        models = [*references(merge), *tokens.references(merge.tokenizer)]
        uses[merge.name] = [r.model.path for r in models if r.model.path in names]
    return tuple(names[name] for name in dependencies.ordered(uses))
