"""Progress for people: a bar with ETA on a terminal's stderr, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0


@contextmanager
def progress(what: str, total: int, *, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show progress of `total` pieces of work.

    Args:
        what: the line's title.
        total: pieces in all; 0: not known beforehand.
        start: pieces done before.

    Yields:
        A function to call with (pieces done in all, a short note).
    """
    if sys.stderr.isatty() and total > 0:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            Remaining(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, completed=start, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
        return
    said = time.monotonic()

    def line(done: int, note: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _LOG_EVERY_S:
            said = time.monotonic()
            log.info("%s: %d%s %s", what, done, f" of {total}" if total else "", note)

    yield line
