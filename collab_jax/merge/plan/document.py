"""The text of a merge configuration as plain values: YAML, with its errors in place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def load(source: str | Path) -> list[dict[str, Any]]:
    """The documents of a YAML text that are not empty.

    Args:
      source: a file, or the text itself: a `str` with a line break or an opening brace.

    Raises:
      OSError: where the file cannot be read.
      ValueError: for what is no YAML, with line and column; for a key that stands twice
        in one mapping, of which YAML would silently keep the last; for a document that
        is no mapping.

    >>> load("{a: 1}")
    [{'a': 1}]
    >>> load("a: 1\\nb: [2\\n")
    Traceback (most recent call last):
    ValueError: line 3, column 1: expected ',' or ']', but got '<stream end>'
    >>> load("a: 1\\nb: 2\\na: 3\\n")
    Traceback (most recent call last):
    ValueError: line 3, column 1: the key a stands here for the second time
    """
    is_text = isinstance(source, str) and ("\n" in source or source.startswith("{"))
    text = str(source) if is_text else Path(source).expanduser().read_text("utf-8")
    try:
        for node in yaml.compose_all(text, yaml.SafeLoader):
            for key in _repeated(node):
                raise ValueError(
                    f"{_at(key.start_mark)}: the key {key.value} stands here for the "
                    "second time"
                )
        documents = list(yaml.safe_load_all(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _at(mark) if mark else "YAML"
        raise ValueError(f"{place}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None
    documents = [document for document in documents if document is not None]
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            raise ValueError(f"document {number} is no mapping of keys to values")
    if not documents:
        raise ValueError("the configuration is empty; merge_method was expected")
    return documents


def _at(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _repeated(root: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Keys that stand in their mapping for the second time."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys and key.value != "<<":
                        yield key
                    keys.add(key.value)
            pending += [value for _, value in reversed(node.value)]
