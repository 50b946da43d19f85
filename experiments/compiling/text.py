"""What a compiled program does at every turn of its loops, read off its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from collab_jax.collectives import collectives

# these name values; what ends in "-done" was counted where it started
FREE = {
    "",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "parameter",
    "partition-id",
    "tuple",
}
LARGE = 2**20  # bytes of an array that is not copied in passing
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]\{([^}]*)\}")
_CALLED = re.compile(r"(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.\-]+)")


class Turn(NamedTuple):
    """One turn of a loop, loops inside of it left out."""

    started: int  # operations: on a GPU kernels
    loops: int  # inside of it
    copied: int  # bytes of large arrays that it copies in the main memory
    sent: int  # bytes that a chip has of exchanges with others


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and not line.startswith(" "):
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            found[current].append(line.strip())
    return found, entry


def operation(line: str) -> str:
    """The name of what a line does."""
    found = _OPERATION.search(line.partition(" = ")[2])
    return found[1] if found else ""


def _reached(parts: dict[str, list[str]], name: str) -> Iterator[str]:
    """Lines of a computation and of those that it calls, but of no loop."""
    for line in parts.get(name, ()):
        yield line
        if operation(line) in ("call", "conditional"):
            called = _CALLED.findall(line)
            if branches := _BRANCHES.search(line):
                called += re.findall(r"[\w.\-]+", branches[1])
            for other in called:
                yield from _reached(parts, other)


def _copied(line: str) -> int:
    """Bytes of a large array that is copied within the main memory."""
    if operation(line) != "copy":
        return 0
    kind = _ARRAY.search(line.partition(" = ")[2])
    if kind is None or "S(" in kind[4]:  # to a memory on the chip
        return 0
    sizes = [int(n) for n in kind[3].split(",") if n]
    size = math.prod(sizes) * max(1, int(kind[2]) // 8)
    return size if size >= LARGE else 0


def last_loop(text: str) -> Turn | None:
    """What a turn of the last of the outermost loops does; None without a loop.

    Loops of less than a tenth of the operations of the largest are left out: they read
    off what was written.

    Args:
      text: `compiled.as_text()`.
    """
    parts, entry = computations(text)
    found = []
    for line in _reached(parts, entry):
        if operation(line) == "while" and (body := _BODY.search(line)):
            found.append(_turn([*_reached(parts, body[1])]))
    most = max((turn.started for turn in found), default=0)
    return next((turn for turn in found[::-1] if 10 * turn.started >= most), None)


def _turn(lines: list[str]) -> Turn:
    kinds = [operation(line) for line in lines]
    return Turn(
        started=sum(not (k in FREE or k.endswith("-done")) for k in kinds),
        loops=kinds.count("while"),
        copied=sum(map(_copied, lines)),
        sent=sum(each.size for each in collectives("\n".join(lines))),
    )
