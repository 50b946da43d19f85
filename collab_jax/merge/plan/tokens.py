"""What a merge configuration says about the tokenizer and the chat template."""

from typing import Any, NamedTuple

from collab_jax.merge.plan import fields
from collab_jax.merge.plan.reference import Reference, parse

CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # known by name

_SOURCE = ("kind", "model", "token", "token_id", "lora", "override_architecture")


class Row(NamedTuple):
    """The embedding of a token of a model, given by text or by number."""

    model: Reference
    token: str | None = None
    token_id: int | None = None


class Token(NamedTuple):
    """Where the embedding of a token comes from."""

    source: Reference | Row | None = None  # a model's own row for it; another row
    zero: bool = False  # a row of zeros
    force: bool = False  # also in models that have the token


class Tokenizer(NamedTuple):
    """The tokenizer of the result."""

    source: str | Reference  # "union", "base", or a model
    tokens: dict[str, Token] = {}
    pad_to_multiple_of: int | None = None


def tokenizer(given: dict[str, Any]) -> Tokenizer | None:
    """Reads `tokenizer_source` or `tokenizer`, of which one may be there.

    Args:
      given: the keys of the document.

    Raises:
      ValueError: for both, and for anything that is not as it should be.

    >>> tokenizer({"tokenizer_source": "union"})
    Tokenizer(source='union', tokens={}, pad_to_multiple_of=None)
    >>> found = tokenizer({"tokenizer": {"tokens": {"<|im|>": {"source": "a"}}}})
    >>> found.source, found.tokens["<|im|>"].source.model.path
    ('union', 'a')
    """
    if "tokenizer" not in given:
        if not given.get("tokenizer_source"):
            return None
        return Tokenizer(_source(given["tokenizer_source"], "tokenizer_source"))
    if given.get("tokenizer_source"):
        raise ValueError("tokenizer: stands beside tokenizer_source; one may")
    known = ("source", "tokens", "pad_to_multiple_of")
    inner = fields.mapping(given["tokenizer"], "tokenizer", known)
    tokens = inner.get("tokens", {})
    if not isinstance(tokens, dict):
        raise ValueError("tokenizer.tokens: a mapping from tokens was expected")
    pad = fields.whole(
        inner.get("pad_to_multiple_of", 0), "tokenizer.pad_to_multiple_of"
    )
    if pad < 0:
        raise ValueError(f"tokenizer.pad_to_multiple_of: {pad} is below zero")
    return Tokenizer(
        _source(inner.get("source", "union"), "tokenizer.source"),
        {name: _token(name, value) for name, value in tokens.items()},
        pad or None,
    )


def references(tokenizer: Tokenizer | None) -> list[Reference]:
    """The models that a tokenizer, or rows of tokens, are taken from.

    >>> found = Tokenizer(parse("b"), {"x": Token(parse("a")), "y": Token()})
    >>> [reference.model.path for reference in references(found)]
    ['b', 'a']
    """
    if tokenizer is None:
        return []
    sources = [token.source for token in tokenizer.tokens.values()]
    models = [s.model if isinstance(s, Row) else s for s in sources]
    return [m for m in (tokenizer.source, *models) if isinstance(m, Reference)]


def chat_template(value: Any) -> str | None:
    """Reads `chat_template`: auto, the name of a known one, or the text of one.

    >>> chat_template("chatml")
    'chatml'
    >>> chat_template("chatlm")
    Traceback (most recent call last):
    ValueError: chat_template: unknown chat template 'chatlm'; did you mean chatml?
    known are auto, alpaca, chatml, exaone, llama3, mistral and templates in Jinja
    """
    if not value:
        return None
    text = fields.text(value, "chat_template", "a template")
    known = ("auto", *CHAT_TEMPLATES)
    if text in known or (len(text) >= 20 and "{" in text):
        return text
    message = fields.unknown("chat template", text, known)
    raise ValueError(f"chat_template: {message} and templates in Jinja")


def _source(value: Any, where: str) -> str | Reference:
    return value if value in ("union", "base") else parse(value, where)


def _token(name: Any, value: Any) -> Token:
    if not isinstance(name, str):
        raise ValueError(f"tokenizer.tokens: the token {name!r} is no text; quote it")
    where = f"tokenizer.tokens.{name}"
    given = fields.mapping(value, where, ("source", "force"))
    force = fields.flag(given.get("force", False), f"{where}.force")
    source = given.get("source")
    place = f"{where}.source"
    if source is None:
        return Token(force=force)
    if isinstance(source, dict):
        fields.mapping(source, place, _SOURCE)
    if not isinstance(source, dict) or "kind" not in source:
        return Token(parse(source, place), force=force)
    if source["kind"] == "zero":
        fields.mapping(source, place, ("kind",))
        return Token(zero=True, force=force)
    if source["kind"] != "model_token":
        kinds = ("model_token", "zero")
        text = fields.unknown("kind", str(source["kind"]), kinds)
        raise ValueError(f"{place}.kind: {text}")
    inner = fields.mapping(
        source, place, ("kind", "model", "token", "token_id"), ["model"]
    )
    if ("token" in inner) == ("token_id" in inner):
        raise ValueError(f"{place}: either token or token_id was expected")
    row = Row(parse(inner["model"], f"{place}.model"))
    if "token" in inner:
        if not isinstance(inner["token"], str):
            raise ValueError(f"{place}.token: {inner['token']!r} is no text; quote it")
        return Token(row._replace(token=inner["token"]), force=force)
    number = fields.whole(inner["token_id"], f"{place}.token_id")
    return Token(row._replace(token_id=number), force=force)
