"""The live table of a search's trials: redrawn on a terminal, one plain line per finished trial elsewhere.

A running trial's row tells what its worker reports.
"""

import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ddray.system.progress import Row, plain_console, read_reports, remove_report, reports_in

log = logging.getLogger(__name__)
_MAX_ROWS = 20


class LiveTable:
    """Shows trials on stderr: `total` in the whole search, `done` of them finished before a resume.

    Workers report to files in the folder `reports`, by the numbers of their trials; those of a trial's shards
    to a folder of that name.
    """

    def __init__(self, total: int, done: int, reports: Path) -> None:
        self._total, self._before, self._reports = total, done, reports
        self._begin = time.monotonic()
        self._trials: dict[int, tuple[str, str, float | None, str]] = {}
        self._live: Any = None

    @contextmanager
    def display(self) -> Iterator[None]:
        """Draw the table while the block runs, if stderr is a terminal."""
        with reports_in(self._reports):
            if not sys.stderr.isatty():
                yield
                return
            from rich.live import Live

            console = plain_console(stderr=True)
            with Live(get_renderable=self._table, console=console, refresh_per_second=2) as self._live:
                yield

    def update(
        self, trial_number: int, params: Mapping[str, Any], status: str, metrics: Mapping[str, Any]
    ) -> None:
        """Update a trial: its status, and its val score at its last rung if it has one."""
        before = self._trials.get(trial_number)
        if status == "running" and before is not None and (before[0] != "running" or not metrics):
            return  # it has ended meanwhile, or is tried again
        if status != "running":
            self.forget(trial_number)
        value = metrics.get("score", metrics.get(str(metrics.get("objective"))))
        text = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())
        num_rungs = len(metrics.get("rungs", {}))
        self._trials[trial_number] = (status, text, value, str(num_rungs) if num_rungs else "-")
        if self._live is None and status != "running":
            formatted = "-" if value is None else f"{value:.1%}"
            log.info("trial %d %s: val %s (%s) [%s]", trial_number, status, formatted, text, self._progress())

    def forget(self, trial_number: int) -> None:
        """Remove what a trial's workers report, which those leave behind that were killed."""
        remove_report(self._reports / f"{trial_number}.json")
        shutil.rmtree(self._reports / str(trial_number), ignore_errors=True)

    def _running(self) -> dict[int, Row]:
        """Return what running trials do, by their numbers: of one in shards, the slowest of those at work."""
        rows, reports = {}, read_reports(self._reports)
        for number in [number for number, (status, *_) in list(self._trials.items()) if status == "running"]:
            if shards := read_reports(self._reports / str(number)).values():
                rows[number] = min(shards, key=lambda row: row.share)
            elif str(number) in reports:
                rows[number] = reports[str(number)]
        return rows

    def _progress(self, running: Mapping[int, Row] = MappingProxyType({})) -> str:
        """Return `finished/total`, and the ETA at the pace so far; of `running` trials the part that is done.

        The pace is that of all workers there are.
        """
        ended = sum(status != "running" for status, *_ in list(self._trials.values()))
        done, work = self._before + ended, ended + sum(row.share for row in running.values())
        left = max(0.0, self._total - self._before - work)
        left_s = (time.monotonic() - self._begin) / max(work, 1e-9) * left
        eta = f", ETA {timedelta(seconds=round(left_s))}" if work and done < self._total else ""
        return f"{done}/{self._total}{eta}"

    def _table(self) -> Any:
        from rich.table import Table

        running = self._running()
        headers = ("trial", "status", "val %", "rungs", "settings")
        table = Table(*headers, title=f"trials {self._progress(running)}")
        for trial_number in sorted(self._trials)[-_MAX_ROWS:]:
            status, text, value, num_rungs = self._trials[trial_number]
            if status == "running" and (row := running.get(trial_number)) is not None:
                status = " ".join(filter(None, (row.title, row.counted(), row.details())))
            val = "-" if value is None else f"{100 * value:.1f}"
            table.add_row(str(trial_number), status, val, num_rungs, text)
        return table
