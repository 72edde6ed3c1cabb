"""What is done, what can run now, what failed: the driver's view of a bench, kept in the ledger alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from ddray.bench.graph import pool_work
from ddray.bench.units import Graph, Work
from ddray.bench.work import Job, Needs, artifact_name, file_hash, has_entry, publish
from ddray.errors import DdrayError, StorageError
from ddray.ledger import Ledger, Row
from ddray.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """How a try at a unit ended.

    Attributes:
        key: the unit's key.
        value: what the worker answered.
        error: why it failed for good; None if it did not.
        attempts: how often it was tried.
    """

    key: str
    value: Any
    error: Exception | None
    attempts: int


class Board:
    """Hands out units whose inputs are there, each once.

    Args:
        graph: the units.
        run: the run they belong to.
        job: what they share.
    """

    def __init__(self, graph: Graph, run: Run, job: Job) -> None:
        self._graph, self._run, self._job = graph, run, job
        self._works = {work.key: work for work in graph.works()}
        self._waiting: dict[str, set[str]] = {}
        self.done = 0
        self.total = len(self._works)

    def work(self, key: str) -> Work:
        """Return a unit by its key."""
        return self._works[key]

    def first(self) -> list[Work]:
        """Return what can run at the start: missing sets, and missing evaluations of those that are there."""
        found, scores = [], []
        for work in self._graph.distil.values():
            row = self._row(work)
            if row is None:
                found.append(work)
                continue
            self.done += 1
            scores += self._released(row)
        self.done += sum(self._row(work) is not None for work in self._graph.evaluate.values())
        return [*scores, *found]

    def after(self, ended: Ended) -> list[Work]:
        """Take note of a unit's end; return what can run now because of it.

        Raises:
            StorageError: the disk is full: nothing more can be published.
            DdrayError: another process has resumed this run.
        """
        work = self._works[ended.key]
        if isinstance(ended.error, StorageError):
            raise ended.error  # no row: --resume runs it when there is space again
        if isinstance(ended.value, Needs):
            return self._wait(work, ended.value)
        if ended.error is not None:
            tries = "" if ended.attempts == 1 else f"failed {ended.attempts} times; last: "
            text = f"{tries}{type(ended.error).__name__}: {' '.join(str(ended.error).split())}"
            result = {"attempts": ended.attempts}
            publish(self._run.ledger, self._job, work, result, 0.0, error=text)
        row = self._row(work)
        if row is None:
            raise DdrayError(f"another process has resumed {self._run.folder}: this one ends")
        self.done += 1
        if row.status == "failed":
            log.warning("%s failed: %s", work.title, row.error)
        if work.kind == "distill":
            return self._released(row)
        return self._unblocked(work.key) if work.kind == "pool" else []

    def failures(self) -> list[dict[str, Any]]:
        """Return the failed units with their reasons."""
        rows = ((work, self._run.ledger.row(key)) for key, work in self._works.items())
        return [
            {"unit": work.title, "kind": work.kind, "key": row.key, "reason": row.error}
            for work, row in rows
            if row is not None and row.status == "failed"
        ]

    def skipped(self) -> list[str]:
        """Return the titles of units that could not run because what they need failed."""
        return [work.title for work in self._works.values() if self._run.ledger.row(work.key) is None]

    def _row(self, work: Work) -> Row | None:
        """Return a unit's row; one whose set is gone or changed is set aside, and counts as none."""
        row = self._run.ledger.row(work.key)
        if row is None or row.kind != "distill" or row.status == "failed":
            return row
        if all(self._run.ledger.row(score.key) is not None for score in self._graph.scored_from(work.key)):
            return row
        path = self._run.folder / artifact_name(work.key)
        if path.is_file() and file_hash(path) == row.result["sha256"]:
            return row
        log.warning("%s: its set %s is missing or damaged; it is distilled again", work.title, path)
        self._run.ledger.withdraw(work.key, "damaged")
        return None

    def _released(self, row: Row) -> list[Work]:
        """Return the missing evaluations of a set that is there."""
        if row.status == "failed":
            return []
        scores = self._graph.scored_from(row.key)
        return [work for work in scores if self._run.ledger.row(work.key) is None]

    def _wait(self, asker: Work, needs: Needs) -> list[Work]:
        """Let a unit wait for the pool; return the entries that nobody trains yet."""
        fresh: list[Work] = []
        blocked: set[str] = set()
        for spec in needs.specs:
            work = pool_work(asker, spec)
            if work.key not in self._works:
                self._works[work.key] = work
                self.total += 1
                fresh.append(work)
            if self._needs_training(self._works[work.key]):
                blocked.add(work.key)
        again = replace(asker, waited=True)
        self._works[asker.key] = again
        if not blocked:
            return [again]
        self._waiting[asker.key] = blocked
        return [work for work in fresh if work.key in blocked]

    def _needs_training(self, work: Work) -> bool:
        """Return whether an entry has yet to come; one that was removed after it was trained comes again."""
        if work.pool is not None and has_entry(work.pool):
            return False
        row = self._run.ledger.row(work.key)
        if row is not None and row.status == "done":
            self._run.ledger.withdraw(work.key, "removed")
        return True

    def _unblocked(self, key: str) -> list[Work]:
        """Return the units that waited for this entry alone; those whose entry failed go on waiting."""
        row = self._run.ledger.row(key)
        if row is None or row.status == "failed":
            return []
        found = []
        for asker, blocked in list(self._waiting.items()):
            blocked.discard(key)
            if not blocked:
                del self._waiting[asker]
                found.append(self._works[asker])
        return found


def withdraw_crashes(ledger: Ledger) -> int:
    """Set aside the failed rows of units that crashed (not of those that diverged); return how many."""
    crashed = [row for row in ledger.rows() if row.status == "failed" and "attempts" in row.result]
    for row in crashed:
        ledger.withdraw(row.key, "failed")
    return len(crashed)
