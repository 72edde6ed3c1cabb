"""A search for hyperparameters: its trials, and which of them are missing."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddray.artifact.distilled_set import set_name
from ddray.errors import DdrayError, InterruptedRunError
from ddray.jobs.plan import Plan
from ddray.runs.folder import Run
from ddray.runs.ledger import Row, Unit
from ddray.system.files import storage_errors, write_text
from ddray.tuning.options import TuneOptions
from ddray.tuning.space import Space
from ddray.tuning.start_points import Points
from ddray.tuning.study import score_of, trial_rows
from ddray.tuning.trial import trial_unit
from ddray.tuning.worker import SearchJob

log = logging.getLogger(__name__)


@dataclass
class Search:
    """One search: what is done, and what is missing."""

    plan: Plan
    options: TuneOptions
    space: Space
    paper: dict[str, Any]  # the preset's settings: trial 0
    job: SearchJob
    run: Run
    num_samples: int
    start_points: Points = field(default_factory=dict)  # the user's

    @property
    def name(self) -> str:
        """What people call the search, such as `datadam-cifar10-ipc1-seed0`."""
        plan = self.plan
        return set_name(plan.method, plan.dataset.name, ipc=plan.ipc, budget=plan.budget, seed=plan.seed)

    def rows(self) -> list[Row]:
        """Return the trials' rows, by number."""
        return trial_rows(self.run.ledger)

    def _numbers(self) -> list[int]:
        return [int(row.spec["number"]) for row in self.rows()]

    def missing(self) -> list[int]:
        """Return the numbers without a row; of a closed search (see `close`) only those that it had."""
        closed, done = self.run.folder / "search.closed", self._numbers()
        numbers = json.loads(closed.read_text("utf-8")) if closed.exists() else range(self.num_samples)
        return [trial_number for trial_number in numbers if trial_number not in done]

    def unfinished(self) -> list[tuple[int, dict[str, Any]]]:
        """Return (number, settings) of trials that were started and have no row, by number."""
        done = self._numbers()
        started = {
            int(event["number"]): dict(event["params"])
            # A late worker of a killed driver may write after the next epoch has begun: the newest counts.
            for event in sorted(self.run.ledger.events(), key=lambda event: int(event["epoch"]))
            if event["event"] in ("start", "retry") and "params" in event and "number" in event
        }
        return sorted((number, params) for number, params in started.items() if number not in done)

    def close(self) -> None:
        """Mark the search as ended before test is opened: a search with test scores must not go on."""
        closed, numbers = self.run.folder / "search.closed", self._numbers()
        if not closed.exists():
            write_text(closed, json.dumps(numbers))
            if len(numbers) < self.num_samples:
                log.warning("the time budget closed this search: test is opened, so --resume adds no trials")

    def row_of(self, trial_number: int, params: Mapping[str, Any]) -> Row | None:
        """Return the published row of a trial, or None."""
        return self.run.ledger.row(self.unit(trial_number, params).key)

    def unit(self, trial_number: int, params: Mapping[str, Any]) -> Unit:
        """Return the unit of a trial."""
        return trial_unit(self.job, trial_number, params, self.plan.dataset.fingerprint)

    def check_ended(self, run_s: float) -> None:
        """Check after `run_s` seconds of running that the search may end.

        InterruptedRunError if a signal came, or the time budget ended before the paper's point.
        """
        missing = self.missing()
        out_of_time = self.options.time_budget is not None and run_s >= self.options.time_budget
        # A budget lets running trials end; a signal leaves some without a row.
        if missing and (self.unfinished() or not out_of_time or 0 in missing):
            num_done = self.num_samples - len(missing)
            raise InterruptedRunError(
                f"the search ended with {num_done} of {self.num_samples} trials", self.run.folder
            )


def reopen(run: Run) -> None:
    """Let a search that has ended go on with more trials; that test was opened then stays on record."""
    closed = run.folder / "search.closed"
    if closed.exists():
        num_trials = len(json.loads(closed.read_text("utf-8")))
        text = "test was opened after %d trials of this search: a new winner will be scored on it again"
        log.warning(text, num_trials)
        with storage_errors(closed):
            closed.replace(run.folder / f"search.closed-{num_trials}")


def earlier_tests(run: Run) -> list[int]:
    """Return after how many trials test had been opened before the search was extended."""
    return sorted(int(path.name.rpartition("-")[2]) for path in run.folder.glob("search.closed-*"))


def best_trial(rows: Sequence[Row]) -> Row:
    """Return the trial with the highest val score at full length (the earliest of equals).

    DdrayError if no trial finished.
    """
    full_length = [row for row in rows if row.status == "done" and not row.result["stopped_early"]]
    if not full_length:
        reasons = sorted({row.error or "unknown" for row in rows})
        raise DdrayError(f"no trial finished: {'; '.join(reasons)}; narrow the space or lower its rates")
    return max(full_length, key=lambda row: (score_of(row.result), -int(row.spec["number"])))


def paper_trial(rows: Sequence[Row]) -> Row | None:
    """Return the paper's own point (trial 0) if it finished."""
    return next((row for row in rows if int(row.spec["number"]) == 0 and row.status == "done"), None)
