"""What is done, what can run now, what failed: the driver's view of a bench, kept in the ledger alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ddray.bench.graph import pool_work
from ddray.bench.units import Graph, Work
from ddray.bench.work import Damaged, Job, Needs, artifact_name, has_entry, is_sound, publish
from ddray.errors import DdrayError, StorageError
from ddray.files import home
from ddray.ledger import Ledger, Row
from ddray.run import Run

log = logging.getLogger(__name__)

_MAX_AGAIN: Final = 2  # times that a lost pool entry, or a set that is found damaged, is made again
_MAX_ASKED: Final = 10  # times that a unit may ask the pool: methods ask in stages, each once
_SHARE: Final = "$DDRAY_HOME must be one folder that all nodes share, and that nothing empties meanwhile"


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
        self._out: set[str] = set()
        self._again: Counter[str] = Counter()
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
        return self._handed_out([*scores, *found])

    def after(self, ended: Ended) -> list[Work]:
        """Take note of a unit's end; return what can run now because of it.

        Raises:
            StorageError: the disk is full: nothing more can be published.
            DdrayError: another process has resumed this run.
        """
        self._out.discard(ended.key)
        return self._handed_out(self._next(ended))

    def _handed_out(self, works: Sequence[Work]) -> list[Work]:
        """Return those of `works` that no worker has, each once, and note that they are handed out."""
        fresh = {work.key: work for work in works if work.key not in self._out}
        self._out |= fresh.keys()
        return list(fresh.values())

    def _next(self, ended: Ended) -> list[Work]:
        work = self._works[ended.key]
        if isinstance(ended.error, StorageError):
            raise ended.error  # no row: --resume runs it when there is space again
        if isinstance(ended.value, Needs):
            return self._wait(work, ended.value)
        if isinstance(ended.value, Damaged):
            return self._made_again(work)
        if ended.error is not None:
            tries = "" if ended.attempts == 1 else f"failed {ended.attempts} times; last: "
            text = f"{tries}{type(ended.error).__name__}: {' '.join(str(ended.error).split())}"
            self._fail(work, text, ended.attempts)
        row = self._run.ledger.row(work.key)
        if row is None:
            raise DdrayError(f"another process has resumed {self._run.folder}: this one ends")
        self.done += 1
        if row.status == "failed":
            log.warning("%s failed: %s", work.title, row.error)
        if work.kind == "distill":
            return self._released(row)
        return self._unblocked(work.key) if work.kind == "pool" else []

    def _fail(self, work: Work, reason: str, attempts: int = _MAX_AGAIN) -> None:
        """Publish a failed row that --retry-failed sets aside."""
        publish(self._run.ledger, self._job, work, {"attempts": attempts}, 0.0, error=reason)

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
        """Return a unit's row; one whose set is needed but gone or changed is set aside and is none."""
        row = self._run.ledger.row(work.key)
        if row is None or row.kind != "distill" or row.status == "failed":
            return row
        scores = self._graph.scored_from(work.key)
        scored = bool(scores) and all(self._run.ledger.row(score.key) is not None for score in scores)
        if (scored and not self._graph.is_ranked(work.key)) or is_sound(self._run.folder, row):
            return row
        self._withdraw_set(work)
        return None

    def _withdraw_set(self, work: Work) -> None:
        path = self._run.folder / artifact_name(work.key)
        log.warning("%s: its set %s is missing or damaged; it is distilled again", work.title, path)
        self._run.ledger.withdraw(work.key, "damaged")

    def _made_again(self, score: Work) -> list[Work]:
        """Return what gives an evaluation its set that a worker found damaged; a few times, then it fails."""
        source = self._works[score.unit.inputs[0]]
        self._again[score.key] += 1
        if self._again[score.key] > _MAX_AGAIN:
            path = self._run.folder / artifact_name(source.key)
            self._fail(score, f"its set {path} is damaged again and again, or not the same on all nodes")
            self.done += 1
            return []
        row = self._run.ledger.row(source.key)
        if row is not None and (row.status == "failed" or is_sound(self._run.folder, row)):
            return self._released(row)
        if row is not None:
            self._withdraw_set(source)
            self.done -= 1
        return [source]

    def _released(self, row: Row) -> list[Work]:
        """Return the missing evaluations of a set that is there."""
        if row.status == "failed":
            return []
        scores = self._graph.scored_from(row.key)
        return [work for work in scores if self._run.ledger.row(work.key) is None]

    def _wait(self, asker: Work, needs: Needs) -> list[Work]:
        """Let a unit wait for the pool; return the entries that nobody trains yet."""
        self._again[asker.key] += 1
        blocked: dict[str, Work] = {}
        for spec in needs.specs:
            work = pool_work(asker, spec)
            work = self._works.get(work.key, work)
            if not has_entry(spec):
                blocked[work.key] = work
        again = replace(asker, waited=True)
        self._works[asker.key] = again
        if self._again[asker.key] > _MAX_ASKED:
            self._fail(asker, f"the pool has trained what it asks for, but does not hold it: {_SHARE}")
            self.done += 1
            return []
        if not blocked:
            return [again]
        self._waiting[asker.key] = set(blocked)
        return [work for work in blocked.values() if self._is_to_train(work)]

    def _is_to_train(self, work: Work) -> bool:
        """Register an entry that is not there; return whether to train it, a few times, then it fails."""
        if work.key in self._out:  # its end is still to come
            return False
        row = self._run.ledger.row(work.key)
        if work.key not in self._works:
            self._works[work.key] = work
            self.total += 1
            self.done += row is not None
        if row is None:
            return True
        if row.status == "failed":
            return False
        log.warning("%s was trained, but is not in the pool (%s): it is trained again", work.title, home())
        self._run.ledger.withdraw(work.key, "removed")
        self._again[work.key] += 1
        if self._again[work.key] > _MAX_AGAIN:
            self._fail(work, f"trained {_MAX_AGAIN + 1} times, and still not in the pool: {_SHARE}")
            return False
        self.done -= 1
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
