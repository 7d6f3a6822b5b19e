"""How far a long computation is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = bool | Callable[[int, int, str], None] | None


@contextmanager
def progress_of(progress: Progress, what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A function to call before each item.

    Args:
        progress: True for a bar on the standard error, False for none, None for a bar where that is a terminal; a
            function is called with how many are done, how many there are, and the name of the next.
        what: what is done, for the bar.
        total: how many items there are.

    Yields:
        A function that takes how many are done and the name of the next.
    """
    if callable(progress):
        told = progress
        yield lambda done, name: told(done, total, name)
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda done, name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = [
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    ]
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, name: bar.update(task, completed=done, description=name)


__all__ = ["Progress", "progress_of"]
