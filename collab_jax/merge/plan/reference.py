"""References to models: `path@revision+lora@revision`, or the same as a mapping."""

from typing import Any, NamedTuple

from collab_jax.merge.plan import fields


class Place(NamedTuple):
    """A folder, or a repository of the Hub at a revision."""

    path: str
    revision: str | None = None


class Reference(NamedTuple):
    """A model, perhaps with an adapter that is merged into it first."""

    model: Place
    lora: Place | None = None
    architecture: str | None = None  # in place of the one in config.json


def parse(value: Any, where: str = "model") -> Reference:
    """Reads a reference as mergekit does.

    Args:
      value: text, or `{model: PLACE, lora: PLACE, override_architecture: NAME}` with
        places as text or `{path: ..., revision: ...}`.
      where: its path in the document, for messages.

    Raises:
      ValueError: for anything else; it names the path.

    >>> parse("org/base@v2+me/adapter")
    Reference(model=Place(path='org/base', revision='v2'), lora=Place(path='me/adapter',
    revision=None), architecture=None)
    >>> parse({"model": {"path": "a", "revision": "b"}}) == parse("a@b")
    True
    >>> parse("a+b+c", "base_model")
    Traceback (most recent call last):
    ValueError: base_model: 'a+b+c' has 2 plus signs; expected was MODEL or MODEL+LORA
    """
    if isinstance(value, dict):
        known = ("model", "lora", "override_architecture")
        given = fields.mapping(value, where, known, ["model"])
        lora = given.get("lora")
        name = given.get("override_architecture")
        return Reference(
            _place(given["model"], f"{where}.model"),
            None if lora is None else _place(lora, f"{where}.lora"),
            None
            if name is None
            else fields.text(name, f"{where}.override_architecture"),
        )
    chunks = fields.text(value, where, "a model").split("+")
    if len(chunks) > 2:
        raise ValueError(
            f"{where}: {value!r} has {len(chunks) - 1} plus signs; expected was MODEL "
            "or MODEL+LORA"
        )
    places = [_place(chunk, where) for chunk in chunks]
    return Reference(places[0], places[1] if len(places) > 1 else None)


def _place(value: Any, where: str) -> Place:
    if isinstance(value, dict):
        given = fields.mapping(value, where, ("path", "revision"), ["path"])
        revision = given.get("revision")
        return Place(
            fields.text(given["path"], f"{where}.path"),
            None if revision is None else fields.text(revision, f"{where}.revision"),
        )
    parts = fields.text(value, where, "a path").split("@")
    if len(parts) > 2 or not all(parts):
        raise ValueError(f"{where}: {value!r} is not PATH or PATH@REVISION")
    return Place(*parts)


def show(reference: Reference) -> str:
    """A reference as text; the inverse of `parse`.

    >>> show(parse("a@b+c"))
    'a@b+c'
    """
    places = [reference.model] + ([reference.lora] if reference.lora else [])
    written = (p.path + (f"@{p.revision}" if p.revision else "") for p in places)
    return "+".join(written)
