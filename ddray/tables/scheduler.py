"""What is done, can run now, or failed: the driver's view of a bench, whose only state is the ledger."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ddray.errors import DdrayError, StorageError
from ddray.runs.folder import Run
from ddray.runs.ledger import Ledger, Row
from ddray.system.files import home
from ddray.tables.graph import pool_work
from ddray.tables.units import Graph, Work
from ddray.tables.worker import Damaged, Job, Needs, artifact_name, has_entry, is_sound, publish

log = logging.getLogger(__name__)

_MAX_REPEATS: Final = 2  # times that a lost pool entry or a damaged set is recomputed
_MAX_POOL_REQUESTS: Final = 10  # times that a unit may ask the pool: methods ask once per stage
_SHARE: Final = "$DDRAY_HOME must be one folder that all nodes share and that nothing empties during the run"


@dataclass(frozen=True)
class Ended:
    """How an attempt at a unit ended.

    Attributes:
        key: the unit's key.
        value: what the worker returned.
        error: why it finally failed; None if it did not.
        attempts: how often it was tried.
    """

    key: str
    value: Any
    error: Exception | None
    attempts: int


class Board:
    """Hands out units whose inputs are ready, each once.

    Args:
        graph: the units.
        run: the run they belong to.
        job: what all units share.
    """

    def __init__(self, graph: Graph, run: Run, job: Job) -> None:
        self._graph, self._run, self._job = graph, run, job
        self._works = {work.key: work for work in graph.works()}
        self._waiting: dict[str, set[str]] = {}
        self._running: set[str] = set()
        self._repeats: Counter[str] = Counter()
        self.done = 0
        self.total = len(self._works)

    def work(self, key: str) -> Work:
        """Return a unit by its key."""
        return self._works[key]

    def first(self) -> list[Work]:
        """Return what can run at the start: missing sets, and missing evaluations of existing sets."""
        missing_sets, evaluations = [], []
        for work in self._graph.distil.values():
            row = self._row(work)
            if row is None:
                missing_sets.append(work)
                continue
            self.done += 1
            evaluations += self._missing_evaluations(row)
        self.done += sum(self._row(work) is not None for work in self._graph.evaluate.values())
        return self._hand_out([*evaluations, *missing_sets])

    def after(self, ended: Ended) -> list[Work]:
        """Record that a unit ended; return the units that can run as a result.

        Raises:
            StorageError: the disk is full: nothing more can be published.
            DdrayError: another process has resumed this run.
        """
        self._running.discard(ended.key)
        return self._hand_out(self._next(ended))

    def _hand_out(self, works: Sequence[Work]) -> list[Work]:
        """Return the units that no worker has yet, without duplicates, and mark them as handed out."""
        fresh = {work.key: work for work in works if work.key not in self._running}
        self._running |= fresh.keys()
        return list(fresh.values())

    def _next(self, ended: Ended) -> list[Work]:
        work = self._works[ended.key]
        if isinstance(ended.error, StorageError):
            raise ended.error  # no row: --resume runs it once there is space
        if isinstance(ended.value, Needs):
            return self._wait(work, ended.value)
        if isinstance(ended.value, Damaged):
            return self._redistil(work)
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
            return self._missing_evaluations(row)
        return self._unblocked(work.key) if work.kind == "pool" else []

    def _fail(self, work: Work, reason: str, attempts: int = _MAX_REPEATS) -> None:
        """Publish a failed row, which --retry-failed can withdraw."""
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
        """Return a unit's row; if its set is still needed but missing or changed, withdraw it."""
        row = self._run.ledger.row(work.key)
        if row is None or row.kind != "distill" or row.status == "failed":
            return row
        evaluations = self._graph.scored_from(work.key)
        scored = bool(evaluations) and all(
            self._run.ledger.row(evaluation.key) is not None for evaluation in evaluations
        )
        if (scored and not self._graph.is_ranked(work.key)) or is_sound(self._run.folder, row):
            return row
        self._withdraw_set(work)
        return None

    def _withdraw_set(self, work: Work) -> None:
        path = self._run.folder / artifact_name(work.key)
        log.warning("%s: its set %s is missing or damaged; it is distilled again", work.title, path)
        self._run.ledger.withdraw(work.key, "damaged")

    def _redistil(self, evaluation: Work) -> list[Work]:
        """Return the units that replace an evaluation's damaged set; after a few times, it fails."""
        source = self._works[evaluation.unit.inputs[0]]
        self._repeats[evaluation.key] += 1
        if self._repeats[evaluation.key] > _MAX_REPEATS:
            path = self._run.folder / artifact_name(source.key)
            self._fail(evaluation, f"its set {path} is damaged again and again, or not the same on all nodes")
            self.done += 1
            return []
        row = self._run.ledger.row(source.key)
        if row is not None and (row.status == "failed" or is_sound(self._run.folder, row)):
            return self._missing_evaluations(row)
        if row is not None:
            self._withdraw_set(source)
            self.done -= 1
        return [source]

    def _missing_evaluations(self, row: Row) -> list[Work]:
        """Return the evaluations of a set that have no row; none if the set failed."""
        if row.status == "failed":
            return []
        evaluations = self._graph.scored_from(row.key)
        return [work for work in evaluations if self._run.ledger.row(work.key) is None]

    def _wait(self, asker: Work, needs: Needs) -> list[Work]:
        """Let a unit wait for its pool entries; return those that no worker is training yet."""
        self._repeats[asker.key] += 1
        blocked: dict[str, Work] = {}
        for spec in needs.specs:
            work = pool_work(asker, spec)
            work = self._works.get(work.key, work)
            if not has_entry(spec):
                blocked[work.key] = work
        again = replace(asker, waited=True)
        self._works[asker.key] = again
        if self._repeats[asker.key] > _MAX_POOL_REQUESTS:
            self._fail(asker, f"the pool has trained what it asks for, but no longer has it: {_SHARE}")
            self.done += 1
            return []
        if not blocked:
            return [again]
        self._waiting[asker.key] = set(blocked)
        return [work for work in blocked.values() if self._must_train(work)]

    def _must_train(self, work: Work) -> bool:
        """Register a missing entry; return whether to train it. After a few times it fails."""
        if work.key in self._running:  # still running
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
        self._repeats[work.key] += 1
        if self._repeats[work.key] > _MAX_REPEATS:
            self._fail(work, f"trained {_MAX_REPEATS + 1} times, and still not in the pool: {_SHARE}")
            return False
        self.done -= 1
        return True

    def _unblocked(self, key: str) -> list[Work]:
        """Return the units for which this was the last missing entry; if it failed, they keep waiting."""
        row = self._run.ledger.row(key)
        if row is None or row.status == "failed":
            return []
        unblocked = []
        for asker, blocked in list(self._waiting.items()):
            blocked.discard(key)
            if not blocked:
                del self._waiting[asker]
                unblocked.append(self._works[asker])
        return unblocked


def withdraw_crashes(ledger: Ledger) -> int:
    """Withdraw the failed rows of units that crashed (not of those that diverged); return how many."""
    crashed = [row for row in ledger.rows() if row.status == "failed" and "attempts" in row.result]
    for row in crashed:
        ledger.withdraw(row.key, "failed")
    return len(crashed)
