"""Progress for people: rows with an ETA each on a terminal or in a notebook, plain log lines elsewhere.

All rows that are open in a process are one drawing, as rich draws one at a time. A worker (`reported_to`)
writes what it does to a file, and a row of the process that waits for it (`progress(..., watch=)`) shows it.
"""

import contextlib
import importlib.util
import json
import logging
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

log = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0
_REPORT_EVERY_S: Final = 1.0
_PATIENCE_S: Final = 1.0
"""Seconds that a piece of work takes at least before it is a row below another one."""
_PACE_POINTS: Final = 100


class Show(Protocol):
    """Callback by which a piece of work reports its progress."""

    def __call__(self, done: int, note: str, *, total: int | None = None, work: float | None = None) -> None:
        """Report the pieces done so far, a short note, the new total if it has changed.

        `work` is the part (0..1) of all work that is done, where pieces differ: the ETA follows it.
        """


def plain_console(*, stderr: bool = False) -> "Console":
    """Return a console that prints a name as it is: rich would take [v2] for a style, and :v2: for an emoji.

    Everything that is printed by rich goes through it.
    """
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


@dataclass(eq=False)
class Row:
    """A piece of work that is going on: how far it is, and how long it will take at its pace of late."""

    title: str
    total: int  # 0: unknown
    done: int = 0
    unit: str = ""  # what is done in so many seconds each, if that is of interest
    watch: Path | None = None  # folder of what its workers report
    note: str = ""
    begin: float = field(default_factory=lambda: time.monotonic())
    _points: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=_PACE_POINTS))
    _on_move: Callable[["Row"], None] = lambda row: None

    def __post_init__(self) -> None:
        self._start = self.done
        self._points.append((self.begin, self.done, self.share))

    def __call__(self, done: int, note: str, *, total: int | None = None, work: float | None = None) -> None:
        """Move on; see `Show`."""
        self.done, self.note, self.total = done, note, total or self.total
        point = (time.monotonic(), done, self.share if work is None else work)
        is_replaced = point[0] - self._points[-2][0] < 1 if len(self._points) > 1 else done == self._start
        if is_replaced:
            self._points[-1] = point  # one a second will do
        else:
            self._points.append(point)
        if len(self._points) == 3 and self._points[0][1] == self._start:
            self._points.popleft()  # the first piece may have compiled, or warmed up
        self._on_move(self)

    def rename(self, title: str) -> None:
        """Show another title from now on."""
        self.title = title

    @property
    def share(self) -> float:
        """The part of all pieces that is done."""
        return self.done / self.total if self.total else 0.0

    def left_s(self) -> float | None:
        """Return the seconds that are left at the pace of late; None if there is no pace yet."""
        (first, _, share), (last, _, share_now) = self._points[0], self._points[-1]
        if not share < share_now < 1:
            return None
        left_s = (last - first) / (share_now - share) * (1 - share_now)
        without_this = 1 - 1 / max(1, self.total - self.done)  # a piece that takes longer than the others
        return max(left_s - (time.monotonic() - last), left_s * without_this)

    def counted(self) -> str:
        """Return `12/90`."""
        return f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}" if self.done else ""

    def details(self) -> str:
        """Return the note, the seconds of a piece where they are of interest, and the ETA."""
        (first, before, _), (last, now, _) = self._points[0], self._points[-1]
        pace = f"{(last - first) / (now - before):.3g} s/{self.unit}" if self.unit and now > before else ""
        eta = "" if (left_s := self.left_s()) is None else f"ETA {timedelta(seconds=round(left_s))}"
        return ", ".join(filter(None, (self.note, pace, eta)))


@dataclass
class _Report:
    """The file in which a worker says what it does: the outermost of its rows."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    written: float = 0.0

    def write(self, _: Row) -> None:
        if (now := time.monotonic()) - self.written < _REPORT_EVERY_S:
            return
        self.written, row = now, self.rows[0]
        fields = {"title": row.title, "done": row.done, "total": row.total, "note": row.details()}
        with contextlib.suppress(OSError):  # nobody's results depend on it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(fields), encoding="utf-8")


_report: ContextVar[_Report | None] = ContextVar("report", default=None)
_watched: ContextVar[Path | None] = ContextVar("watched", default=None)


@contextmanager
def reported_to(path: Path | None) -> Iterator[None]:
    """Let the rows of this block be reported in a file, which ends with it; None: nowhere."""
    if path is None:
        yield
        return
    token = _report.set(_Report(path))
    try:
        yield
    finally:
        _report.reset(token)
        remove_report(path)


def remove_report(path: Path) -> None:
    """Remove a worker's report, if it can be: nobody's results depend on it."""
    with contextlib.suppress(OSError):
        path.unlink()


@contextmanager
def reports_in(folder: Path) -> Iterator[None]:
    """Let workers that get tasks in this block report to a folder, which ends with it."""
    shutil.rmtree(folder, ignore_errors=True)  # of a driver that was killed
    token = _watched.set(folder)
    try:
        yield
    finally:
        _watched.reset(token)
        shutil.rmtree(folder, ignore_errors=True)


def report_of(key: str) -> Path | None:
    """Return the file to which a worker is to report on a task, None if no row would show it."""
    folder = _watched.get()
    return None if folder is None else folder / f"{key}.json"


def read_reports(folder: Path) -> dict[str, Row]:
    """Return what workers that report to a folder do, by the names of their files."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # ended, or being written
            fields = json.loads(path.read_text("utf-8"))
            rows[path.stem] = Row(**{name: fields[name] for name in ("title", "done", "total", "note")})
    return rows


class _Board:
    """The rows that are drawn in this process."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._lock = threading.RLock()
        self._live: Any = None
        self._spinner: Any = None
        self._reports: tuple[float, list[Row]] = (0.0, [])

    @contextmanager
    def drawn(self, row: Row) -> Iterator[None]:
        """Draw a row while the block runs, below those of the work that it is a part of."""
        with self._lock:
            self._rows.append(row)
            if self._live is None:
                from rich import get_console
                from rich.live import Live
                from rich.spinner import Spinner

                self._spinner = Spinner("line")
                console = get_console() if _in_notebook() else plain_console(stderr=True)
                redirected = sys.stdout.isatty()  # what is printed into a pipe stays there
                self._live = Live(
                    get_renderable=self._table,
                    console=console,
                    transient=True,
                    refresh_per_second=10,
                    redirect_stdout=redirected,
                )
                self._live.start()
        try:
            yield
        finally:
            with self._lock:
                if len(self._rows) == 1:
                    self._live.stop()
                    self._live = None
                self._rows.remove(row)

    def _table(self) -> "Table":
        """Return the rows; called by the thread of the drawing."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table, now = Table.grid(padding=(0, 1)), time.monotonic()
        for justify in ("left", "left", "right", "right", "left"):
            table.add_column(justify=justify, no_wrap=True)
        for depth, row in self._visible(now):
            bar = ProgressBar(row.total, row.done, width=20) if row.total else self._spinner
            elapsed = str(timedelta(seconds=int(now - row.begin))) if row in self._rows else ""
            texts = (row.counted(), elapsed, row.details())
            table.add_row(Text("  " * depth + row.title), bar, *map(Text, texts))
        return table

    def _visible(self, now: float) -> Iterator[tuple[int, Row]]:
        """Yield the rows with their depths, and below each what its workers report."""
        for depth, row in enumerate(list(self._rows)):
            if (depth == 0 and row.total) or now - row.begin >= _PATIENCE_S:
                yield depth, row
            if row.watch is not None:
                if now - self._reports[0] >= _REPORT_EVERY_S:
                    self._reports = (now, list(read_reports(row.watch).values()))
                yield from ((depth + 1, reported) for reported in self._reports[1])


_board: Final = _Board()


@contextmanager
def progress(
    title: str, total: int, *, start: int = 0, unit: str = "", watch: Path | None = None
) -> Iterator[Row]:
    """Show progress of `total` pieces of work (0: unknown), of which `start` were done before.

    `unit` names a piece whose seconds are of interest, such as a step. What workers of this block report to
    the folder `watch` is shown below.
    """
    row = Row(title, total, start, unit, watch)
    with contextlib.nullcontext() if watch is None else reports_in(watch), _displayed(row):
        yield row


@contextmanager
def _displayed(row: Row) -> Iterator[None]:
    if (report := _report.get()) is not None:
        row._on_move = report.write
        report.rows.append(row)
        try:
            yield
        finally:
            report.rows.remove(row)
    elif _is_drawn():
        with _board.drawn(row):
            yield
    else:
        row._on_move = _LogLines()
        yield


class _LogLines:
    """Logs a line on a row now and then."""

    def __init__(self) -> None:
        self._logged = time.monotonic()

    def __call__(self, row: Row) -> None:
        if time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            of = f" of {row.total}" if row.total else ""
            log.info("%s: %d%s %s", row.title, row.done, of, row.details())


def phase(text: str) -> AbstractContextManager[None]:
    """Announce what begins now, such as "reading cifar10"; as a context, it has a row while it takes long."""
    if _report.get() is None:
        log.info("%s", text)
    return _displayed(Row(text, 0))


def _is_drawn() -> bool:
    return _in_notebook() or sys.stderr.isatty()


def _in_notebook() -> bool:
    """Return whether rich can draw in a notebook; without ipywidgets it could only warn."""
    if "IPython" not in sys.modules or importlib.util.find_spec("ipywidgets") is None:
        return False
    from rich import get_console

    return get_console().is_jupyter
