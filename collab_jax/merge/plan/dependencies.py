"""The order in which documents that use each other's results are worked off."""

from collections.abc import Mapping, Sequence

Name = str | None  # None: the document without a name


def ordered(uses: Mapping[Name, Sequence[Name]]) -> list[Name]:
    """Each document after those that it uses; the one that no other uses last.

    Args:
      uses: of each document, the names of those that it uses.

    Raises:
      ValueError: where documents use each other in a circle, or more than one is used
        by none, so that it is open which result is wanted.

    >>> ordered({None: ["tall", "wide"], "tall": [], "wide": ["tall"]})
    ['tall', 'wide', None]
    >>> ordered({"tall": ["wide"], "wide": ["tall"]})
    Traceback (most recent call last):
    ValueError: name: documents use each other in a circle: tall -> wide -> tall
    """
    used = {name for found in uses.values() for name in found}
    ends = [name for name in uses if name not in used]
    if len(ends) > 1:
        listed = ", ".join(name or "the document without a name" for name in ends)
        raise ValueError(f"name: only one result can be wanted; nothing uses {listed}")
    done: list[Name] = []
    begun: list[Name] = []

    def visit(name: Name) -> None:
        if name in begun:
            circle = [*begun[begun.index(name) :], name]
            listed = " -> ".join(str(n) for n in circle)
            raise ValueError(f"name: documents use each other in a circle: {listed}")
        if name not in done:
            begun.append(name)
            for other in uses[name]:
                visit(other)
            begun.pop()
            done.append(name)

    for name in ends or list(uses):
        visit(name)
    if ends and len(done) < len(uses):  # a circle apart from what is wanted
        visit(next(name for name in uses if name not in done))
    return done
