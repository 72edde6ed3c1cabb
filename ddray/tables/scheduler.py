"""What is done, can run now, or failed: the driver's view of a bench, whose only state is the ledger."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ddray.errors import DdrayError, StorageError
from ddray.jobs.shard_worker import shard_file
from ddray.runs.executor import Outcome
from ddray.runs.folder import Run
from ddray.runs.ledger import Ledger, Row
from ddray.system.files import home
from ddray.tables.table import failure_of
from ddray.tables.units import BenchUnit, Graph, pool_unit
from ddray.tables.worker import BenchJob, Damaged, Needs, Sharded, artifact_name, has_entry, is_sound, publish

log = logging.getLogger(__name__)

_MAX_REPEATS: Final = 2  # times that a lost pool entry, a damaged set or a damaged shard is recomputed
_MAX_POOL_REQUESTS: Final = 10  # times that a unit may ask the pool: methods ask once per stage
_SHARE_RUN: Final = "the run's folder must be one that all nodes share"
_SHARE: Final = "$DDRAY_HOME must be one folder that all nodes share and that nothing empties during the run"


class UnitScheduler:
    """Hands out the units of a run whose inputs are ready, each once; pool units and shards join later."""

    def __init__(self, graph: Graph, run: Run, job: BenchJob) -> None:
        self._graph, self._run, self._job = graph, run, job
        self._row = run.ledger.row
        self.units = {unit.key: unit for unit in graph.units()}
        self._waiting: dict[str, set[str]] = {}
        self._prepared: dict[str, Any] = {}  # what unfinished shards share, by their keys
        self._running: set[str] = set()
        self._repeats: Counter[str] = Counter()
        self.done = 0
        self.total = len(self.units)

    def first(self) -> list[BenchUnit]:
        """Return what can run at the start: missing sets, and missing evaluations of existing sets."""
        rows = {key: self._sound_row(unit) for key, unit in self._graph.distil.items()}
        missing_sets = [unit for key, unit in self._graph.distil.items() if rows[key] is None]
        finished = [row for row in rows.values() if row is not None]
        evaluations = [unit for row in finished for unit in self._missing_evaluations(row)]
        of_no_set = (unit for unit in self._graph.evaluate.values() if not unit.identity.inputs)
        evaluations += [unit for unit in of_no_set if self._row(unit.key) is None]
        self.done += len(finished) + sum(self._row(key) is not None for key in self._graph.evaluate)
        return self._hand_out([*evaluations, *missing_sets])

    def after(self, outcome: Outcome) -> list[BenchUnit]:
        """Record that a unit ended; return the units that can run as a result.

        Raises:
            StorageError: the disk is full: nothing more can be published.
            DdrayError: another process has resumed this run.
        """
        self._running.discard(outcome.key)
        return self._hand_out(self._next(outcome))

    def _hand_out(self, units: Sequence[BenchUnit]) -> list[BenchUnit]:
        """Return the units that no worker has yet, without duplicates, and mark them as handed out."""
        fresh = {unit.key: unit for unit in units if unit.key not in self._running}
        self._running |= fresh.keys()
        return list(fresh.values())

    def _next(self, outcome: Outcome) -> list[BenchUnit]:
        unit = self.units[outcome.key]
        if isinstance(outcome.error, StorageError):
            raise outcome.error  # no row: --resume runs it once there is space
        if isinstance(outcome.value, Needs):
            return self._wait(unit, outcome.value)
        if isinstance(outcome.value, Sharded):
            return self._wait_for_shards(unit, outcome.value)
        if isinstance(outcome.value, Damaged):
            return self._redistil(unit)
        if outcome.error is not None:
            tries = "" if outcome.attempts == 1 else f"failed {outcome.attempts} times; last: "
            text = f"{tries}{type(outcome.error).__name__}: {outcome.error}"
            self._fail(unit, text, outcome.attempts)
        row = self._row(unit.key)
        if row is None:
            raise DdrayError(f"another process has resumed {self._run.folder}: this one ends")
        self.done += 1
        self._prepared.pop(unit.key, None)
        if row.status == "failed":
            log.warning("%s failed: %s", unit.title, row.error)
        if unit.kind == "distill":
            return self._missing_evaluations(row)
        return self._unblocked(unit.key) if unit.kind in ("pool", "shard") else []

    def _fail(self, unit: BenchUnit, reason: str, attempts: int = _MAX_REPEATS) -> None:
        """Publish a failed row, which --retry-failed can withdraw."""
        publish(self._run.ledger, self._job, unit, {"attempts": attempts}, 0.0, error=reason)

    def failures(self) -> list[dict[str, Any]]:
        """Return the failed units with their reasons."""
        rows = ((unit.title, self._row(key)) for key, unit in self.units.items())
        return [failure_of(title, row) for title, row in rows if row is not None and row.status == "failed"]

    def skipped(self) -> list[str]:
        """Return the titles of units that could not run because what they need failed."""
        return [unit.title for unit in self.units.values() if self._row(unit.key) is None]

    def _sound_row(self, unit: BenchUnit) -> Row | None:
        """Return a unit's row; if its set is still needed but missing or changed, withdraw it."""
        row = self._row(unit.key)
        if row is None or row.status == "failed":
            return row
        is_proxy = any(unit.key in sweep.sets for sweep in self._graph.sweeps)
        is_scored = bool(self._graph.scored_from(unit.key)) and not self._missing_evaluations(row)
        if (is_scored and not is_proxy) or is_sound(self._run.folder, row):
            return row
        self._withdraw_set(unit)
        return None

    def _withdraw_set(self, unit: BenchUnit) -> None:
        path = self._run.folder / artifact_name(unit.key)
        log.warning("%s: its set %s is missing or damaged; it is distilled again", unit.title, path)
        self._run.ledger.withdraw(unit.key, "damaged")

    def _redistil(self, evaluation: BenchUnit) -> list[BenchUnit]:
        """Return the units that replace an evaluation's damaged set; after a few times, it fails."""
        source = self.units[evaluation.identity.inputs[0]]
        self._repeats[evaluation.key] += 1
        if self._repeats[evaluation.key] > _MAX_REPEATS:
            path = self._run.folder / artifact_name(source.key)
            self._fail(evaluation, f"its set {path} is damaged again and again, or not the same on all nodes")
            self.done += 1
            return []
        row = self._row(source.key)
        if row is not None and (row.status == "failed" or is_sound(self._run.folder, row)):
            return self._missing_evaluations(row)
        if row is not None:
            self._withdraw_set(source)
            self.done -= 1
        return [source]

    def _missing_evaluations(self, row: Row) -> list[BenchUnit]:
        """Return the evaluations of a set that have no row; none if the set failed."""
        evaluations = [] if row.status == "failed" else self._graph.scored_from(row.key)
        return [unit for unit in evaluations if self._row(unit.key) is None]

    def _wait(self, asker: BenchUnit, needs: Needs) -> list[BenchUnit]:
        """Let a unit wait for its pool entries; return those that no worker is training yet."""
        self._repeats[asker.key] += 1
        missing = [pool_unit(asker, spec) for spec in needs.specs if not has_entry(spec)]
        blocked = {unit.key: self.units.get(unit.key, unit) for unit in missing}
        again = self.units[asker.key] = replace(asker, waited_for="networks")
        if self._repeats[asker.key] > _MAX_POOL_REQUESTS:
            self._fail(asker, f"the pool has trained what it asks for, but no longer has it: {_SHARE}")
            self.done += 1
            return []
        if not blocked:
            return [again]
        return self._wait_for(asker, blocked)

    def _wait_for_shards(self, asker: BenchUnit, sharded: Sharded) -> list[BenchUnit]:
        """Let a set wait for its shards; return those to run."""
        self.units[asker.key] = replace(asker, waited_for="shards")
        blocked = {unit.key: self.units.get(unit.key, unit) for unit in sharded.units}
        self._prepared |= dict.fromkeys(blocked, sharded.prepared)
        return self._wait_for(asker, blocked)

    def shared(self, unit: BenchUnit) -> tuple[Any, ...]:
        """Return what a shard's worker needs besides the unit: a `Prepared`, or what stands for it."""
        return (self._prepared[unit.key],) if unit.kind == "shard" else ()

    def _wait_for(self, asker: BenchUnit, blocked: Mapping[str, BenchUnit]) -> list[BenchUnit]:
        self._waiting[asker.key] = set(blocked)
        return [unit for unit in blocked.values() if self._must_run(unit)]

    def _must_run(self, unit: BenchUnit) -> bool:
        """Register a missing entry or shard; return whether to run it. After a few times it fails."""
        if unit.key in self._running:  # still running
            return False
        row = self._row(unit.key)
        if unit.key not in self.units:
            self.units[unit.key] = unit
            self.total += 1
            self.done += row is not None
        if row is None:
            return True
        if row.status == "failed":
            return False
        self._repeats[unit.key] += 1
        reason = self._withdraw_lost(unit)
        if self._repeats[unit.key] > _MAX_REPEATS:
            self._fail(unit, reason)
            return False
        self.done -= 1
        return True

    def _withdraw_lost(self, unit: BenchUnit) -> str:
        """Withdraw the row of a lost pool entry or a damaged shard; return the reason why it may fail."""
        times = f"{_MAX_REPEATS + 1} times"
        if unit.kind == "shard":
            path = shard_file(self._run.folder, unit.key)
            log.warning("%s: its set %s is missing or damaged; it is distilled again", unit.title, path)
            self._run.ledger.withdraw(unit.key, "damaged")
            return f"distilled {times}, and its set {path} is missing or damaged again: {_SHARE_RUN}"
        log.warning("%s was trained, but is not in the pool (%s): it is trained again", unit.title, home())
        self._run.ledger.withdraw(unit.key, "removed")
        return f"trained {times}, and still not in the pool: {_SHARE}"

    def _unblocked(self, key: str) -> list[BenchUnit]:
        """Return the units for which this was the last missing input; if it failed, they keep waiting."""
        row = self._row(key)
        if row is None or row.status == "failed":
            return []
        for blocked in self._waiting.values():
            blocked.discard(key)
        ready = [asker for asker, blocked in self._waiting.items() if not blocked]
        for asker in ready:
            del self._waiting[asker]
        return [self.units[asker] for asker in ready]


def withdraw_crashes(ledger: Ledger) -> int:
    """Withdraw the failed rows of units that crashed (not of those that diverged); return how many."""
    crashed = [row for row in ledger.rows() if row.status == "failed" and "attempts" in row.result]
    for row in crashed:
        ledger.withdraw(row.key, "failed")
    return len(crashed)
