"""Reading what YAML gave, value by value: what is not as expected is a ValueError.

Every reader takes the path of the value in the document (`slices[0].sources[1].model`),
which begins the message.
"""

import difflib
from collections.abc import Iterable
from typing import Any

_TRUE = ("true", "t", "yes", "y", "on", "1")  # as pydantic reads words
_FALSE = ("false", "f", "no", "n", "off", "0")


def within(where: str, key: str) -> str:
    """The path of a key.

    >>> within("slices[0]", "sources"), within("", "models")
    ('slices[0].sources', 'models')
    """
    return f"{where}.{key}" if where else key


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """`unknown WHAT VALUE`, the closest that is known, and all that are.

    >>> unknown("method", "dare-ties", ["dare_ties", "slerp"])
    "unknown method 'dare-ties'; did you mean dare_ties? known are dare_ties, slerp"
    """
    known = list(known)
    close = difflib.get_close_matches(value.lower().replace("-", "_"), known, 2, 0.5)
    hint = f" did you mean {' or '.join(close)}?" if close else ""
    listed = ", ".join(known) or "none"
    return f"unknown {what} {value!r};{hint} known are {listed}"


def mapping(
    value: Any, where: str, known: Iterable[str], required: Iterable[str] = ()
) -> dict[str, Any]:
    """A mapping whose keys are all known; keys that are null count as absent.

    Args:
      value: what YAML gave.
      where: the path of the value, "" for the document.
      known: the keys there are.
      required: those that must be there.

    Raises:
      ValueError: for another type, an unknown key, or a missing one.

    >>> known = ["model", "parameters"]
    >>> mapping({"model": "a", "parameters": None}, "models[0]", known)
    {'model': 'a'}
    >>> mapping({"modle": "a"}, "models[0]", known)
    Traceback (most recent call last):
    ValueError: models[0].modle: unknown key 'modle'; did you mean model? known are
    model, parameters
    """
    known = list(known)
    here = where or "the document"
    if not isinstance(value, dict):
        keys = ", ".join(known)
        raise ValueError(f"{here}: {_found(value)}; a mapping with {keys} was expected")
    for key in value:
        if key not in known:
            text = unknown("key", str(key), known)
            raise ValueError(f"{within(where, str(key))}: {text}")
    present = {key: item for key, item in value.items() if item is not None}
    for key in required:
        if key not in present:
            raise ValueError(f"{within(where, key)}: is required and missing")
    return present


def entries(value: Any, where: str, of: str) -> list[tuple[str, Any]]:
    """The entries of a list, each with its path.

    >>> entries(["a", "b"], "models", "models")
    [('models[0]', 'a'), ('models[1]', 'b')]
    """
    if not isinstance(value, list):
        raise ValueError(f"{where}: {_found(value)}; a list of {of} was expected")
    return [(f"{where}[{i}]", entry) for i, entry in enumerate(value)]


def text(value: Any, where: str, what: str = "text") -> str:
    """A string that is not empty.

    >>> text(3, "merge_method", "a method's name")
    Traceback (most recent call last):
    ValueError: merge_method: found the number 3; a method's name was expected
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {_found(value)}; {what} was expected")
    return value


def number(value: Any, where: str) -> float:
    """A float, also from text: YAML 1.1 reads `1e-5` as a string.

    >>> number("1e-5", "parameters.tol")
    1e-05
    """
    try:
        if isinstance(value, bool | int | float | str):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: {_found(value)}; a number was expected")


def whole(value: Any, where: str) -> int:
    """An int, also from text or from a float without a fraction.

    >>> whole("8", "layer_range[1]")
    8
    """
    try:
        if isinstance(value, int | str):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
    except ValueError:
        pass
    raise ValueError(f"{where}: {_found(value)}; a whole number was expected")


def flag(value: Any, where: str) -> bool:
    """A bool, also from 0, 1 and the words for them.

    >>> flag("on", "parameters.normalize")
    True
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise ValueError(f"{where}: {_found(value)}; true or false was expected")


def _found(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "is empty"
    if isinstance(value, bool):
        return f"found {str(value).lower()}"
    if isinstance(value, int | float):
        return f"found the number {value}"
    if isinstance(value, str):
        return f"found the text {value[:40]!r}"
    return "found a list" if isinstance(value, list) else "found a mapping"
