"""What devices send each other in a compiled program.

A program over a mesh is fast if little crosses it. The compiler decides what does; here
it is read off its text, for a person, and for tests that must notice a cache which is
gathered anew for every token.
"""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
_PLACE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One exchange; in a loop it happens at every turn."""

    kind: str  # of `KINDS`
    shapes: tuple[tuple[int, ...], ...]  # of what a device has afterwards
    size: int  # its bytes
    place: str  # where in the traced program

    @property
    def looped(self) -> bool:
        """Whether it happens at every turn of a loop."""
        return "/while/" in self.place


def collectives(compiled: str) -> list[Collective]:
    """The exchanges of a program, in its order.

    Args:
      compiled: the text of `jax.jit(f).lower(...).compile().as_text()`.

    >>> text = '%a = f32[4,8]{1,0} all-reduce(%b), metadata={op_name="jit(f)/dot"}'
    >>> collectives(text)
    [Collective(kind='all-reduce', shapes=((4, 8),), size=128, place='jit(f)/dot')]
    """
    found = []
    for line in compiled.splitlines():
        if (call := _CALL.search(line)) is None:
            continue
        shapes, size = [], 0
        for kind, bits, dims in _ARRAY.findall(call[1]):
            shape = tuple(int(n) for n in dims.split(",") if n)
            shapes.append(shape)
            size += math.prod(shape) * _bytes(kind, bits)
        place = _PLACE.search(line)
        found.append(
            Collective(call[2], tuple(shapes), size, place[1] if place else "")
        )
    return found


def _bytes(kind: str, bits: str) -> int:
    return 1 if kind == "pred" else max(1, int(bits or 8) // 8)


def table(found: list[Collective]) -> str:
    """Lines for a person: how often, what, its shapes and bytes, and where.

    Args:
      found: of `collectives`.

    >>> print(table([Collective("all-reduce", ((4,),), 16, "jit(f)/while/body/dot")]))
    1 x all-reduce (4,), 16 bytes, in a loop: jit(f)/while/body/dot
    """
    counts: dict[Collective, int] = {}
    for each in found:
        counts[each] = counts.get(each, 0) + 1
    lines = []
    for each, count in counts.items():
        shapes = " ".join(map(str, each.shapes))
        where = "in a loop" if each.looped else "once"
        lines.append(
            f"{count} x {each.kind} {shapes}, {each.size} bytes, {where}: {each.place}"
        )
    return "\n".join(lines)
