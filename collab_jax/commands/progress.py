"""Progress of long work, on stderr and only for somebody who watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int, show: bool = True) -> Iterator[Callable[[], None]]:
    """A bar on stderr; yields the function that moves it by one.

    Args:
      label: what is counted.
      total: how many there are.
      show: False shows nothing, as does a stderr that is not a terminal.

    >>> with progress("prompts", 2) as advance:
    ...     advance()
    """
    if not show or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
