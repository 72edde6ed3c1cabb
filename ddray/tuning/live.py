"""The live table of a search's trials: redrawn on a terminal, one plain line per finished trial elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ddray.system.progress import plain_console

log = logging.getLogger(__name__)
_MAX_ROWS = 20


class LiveTable:
    """Shows trials on stderr: `total` in the whole search, `done` of them finished before a resume."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before = total, done
        self._begin = time.monotonic()
        self._trials: dict[int, tuple[str, str, float | None, str]] = {}
        self._live: Any = None

    @contextmanager
    def display(self) -> Iterator[None]:
        """Draw the table while the block runs, if stderr is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.live import Live

        with Live(self._table(), console=plain_console(stderr=True), refresh_per_second=2) as self._live:
            yield

    def update(
        self, trial_number: int, params: Mapping[str, Any], status: str, metrics: Mapping[str, Any]
    ) -> None:
        """Update a trial: its status, and its val score at its last rung if it has one."""
        if status == "running" and self._trials.get(trial_number, ("",))[0] not in ("", "running"):
            return
        value = metrics.get("score", metrics.get(str(metrics.get("objective"))))
        text = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())
        num_rungs = len(metrics.get("rungs", {}))
        self._trials[trial_number] = (status, text, value, str(num_rungs) if num_rungs else "-")
        if self._live is not None:
            self._live.update(self._table())
        elif status != "running":
            formatted = "-" if value is None else f"{value:.1%}"
            log.info("trial %d %s: val %s (%s) [%s]", trial_number, status, formatted, text, self._progress())

    def _progress(self) -> str:
        """Return `finished/total`, and the ETA at the current pace."""
        ended = sum(status != "running" for status, *_ in self._trials.values())
        done = self._before + ended
        pace = (time.monotonic() - self._begin) / max(1, ended)
        left = f", ETA {pace * (self._total - done):.0f} s" if ended and done < self._total else ""
        return f"{done}/{self._total}{left}"

    def _table(self) -> Any:
        from rich.table import Table

        table = Table("trial", "status", "val %", "rungs", "settings", title=f"trials {self._progress()}")
        for trial_number in sorted(self._trials)[-_MAX_ROWS:]:
            status, text, value, num_rungs = self._trials[trial_number]
            val = "-" if value is None else f"{100 * value:.1f}"
            table.add_row(str(trial_number), status, val, num_rungs, text)
        return table
