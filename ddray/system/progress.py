"""Progress for people: a bar with ETA in a notebook or on a terminal's stderr, plain log lines elsewhere."""

import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0


class Show(Protocol):
    """Callback by which a piece of work reports its progress."""

    def __call__(self, done: int, note: str, *, total: int | None = None) -> None:
        """Report the pieces done so far, a short note, and the new total if it has changed."""


def plain_console(*, stderr: bool = False) -> "Console":
    """Return a console that prints a name as it is: rich would take [v2] for a style, and :v2: for an emoji.

    Everything that is printed by rich goes through it.
    """
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


@contextmanager
def progress(title: str, total: int, *, start: int = 0) -> Iterator[Show]:
    """Show progress of `total` pieces of work (0: unknown), of which `start` were done before."""
    in_notebook = _in_notebook()
    if (in_notebook or sys.stderr.isatty()) and total > 0:
        from rich import get_console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (
            *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TextColumn("ETA"), Remaining()),
            TextColumn("{task.fields[note]}", markup=False),
        )
        console = get_console() if in_notebook else plain_console(stderr=True)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total, completed=start, note="")

            def move(done: int, note: str, *, total: int | None = None) -> None:
                bar.update(task, completed=done, note=note, total=total)

            yield move
        return
    last_logged, pieces = time.monotonic(), total

    def line(done: int, note: str, *, total: int | None = None) -> None:
        nonlocal last_logged, pieces
        pieces = total or pieces
        if time.monotonic() - last_logged >= _LOG_EVERY_S:
            last_logged = time.monotonic()
            log.info("%s: %d%s %s", title, done, f" of {pieces}" if pieces else "", note)

    yield line


def _in_notebook() -> bool:
    """Return whether rich can draw a bar in a notebook; without ipywidgets it could only warn."""
    if "IPython" not in sys.modules or importlib.util.find_spec("ipywidgets") is None:
        return False
    from rich import get_console

    return get_console().is_jupyter
