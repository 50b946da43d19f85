"""What a merge's config says about the tokenizer of the result."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Wish(NamedTuple):
    """What a config says about the tokenizer."""

    source: str = "union"  # "base", or a model's name
    tokens: Mapping[str, Mapping[str, Any]] = {}
    pad_to_multiple_of: int | None = None


def wish(source: str | None = None, tokenizer: Any = None) -> Wish | None:
    """Reads `tokenizer_source` or `tokenizer`, which exclude each other.

    Args:
      source: "union", "base" or a model's name.
      tokenizer: a mapping of source, tokens and pad_to_multiple_of.

    Returns:
      None where the config has neither: no token is moved.

    Raises:
      ValueError: for both, an unknown key, or a value of the wrong kind; it begins with
        the path of the key.

    >>> wish(tokenizer={"source": "base", "pad_to_multiple_of": 8}).pad_to_multiple_of
    8
    >>> wish(tokenizer={"source": "union", "pad_to_multiple_of": 0})
    Traceback (most recent call last):
    ValueError: tokenizer.pad_to_multiple_of is 0, a whole number from 1 was expected
    """
    if source is not None and tokenizer is not None:
        raise ValueError(
            "tokenizer_source and tokenizer are both given; keep tokenizer, with "
            f"source: {source}"
        )
    if source is not None:
        return Wish(_text(source, "tokenizer_source"))
    if tokenizer is None:
        return None
    keys = ("source", "tokens", "pad_to_multiple_of")
    tokenizer = _mapping(tokenizer, "tokenizer", keys)
    pad = tokenizer.get("pad_to_multiple_of")
    if pad is not None and (type(pad) is not int or pad < 1):
        raise ValueError(
            f"tokenizer.pad_to_multiple_of is {pad!r}, a whole number from 1 was "
            "expected"
        )
    given = _mapping(tokenizer.get("tokens") or {}, "tokenizer.tokens")
    tokens = {str(t): _token(v, f"tokenizer.tokens.{t}") for t, v in given.items()}
    chosen = tokenizer.get("source")
    chosen = "union" if chosen is None else _text(chosen, "tokenizer.source")
    return Wish(chosen, tokens, pad)


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path} is {value!r}, union, base or a model was expected")
    return value


def _mapping(value: Any, path: str, keys: Iterable[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} is {value!r}, a mapping was expected")
    strange = [key for key in value if keys and key not in keys]
    if strange:
        raise ValueError(
            f"{path}.{strange[0]} is unknown; expected was one of {', '.join(keys)}"
        )
    return value


def _token(value: Any, path: str) -> dict[str, Any]:
    """One entry of tokens: its kind, "model_token", "zero" or "model", is filled in."""
    value = _mapping(value, path, ("source", "force"))
    force, source = value.get("force", False), value.get("source")
    if not isinstance(force, bool):
        raise ValueError(f"{path}.force is {force!r}, true or false was expected")
    if isinstance(source, str) and source:
        return {"kind": "model", "model": source, "force": force}
    path += ".source"
    if source is None:
        raise ValueError(f"{path} is missing: a model, or kind: model_token, or zero")
    source = _mapping(source, path)
    kind = source.get("kind")
    if kind == "zero":
        _mapping(source, path, ("kind",))
        return {"kind": "zero", "force": force}
    if kind != "model_token":
        raise ValueError(f"{path}.kind is {kind!r}, model_token or zero was expected")
    _mapping(source, path, ("kind", "model", "token", "token_id"))
    _text(source.get("model"), f"{path}.model")
    if (source.get("token") is None) == (source.get("token_id") is None):
        raise ValueError(f"{path} needs one of token and token_id")
    if type(source.get("token_id", 0)) not in (int, type(None)):
        raise ValueError(f"{path}.token_id is {source['token_id']!r}, no whole number")
    return {**source, "force": force}
