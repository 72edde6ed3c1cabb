"""A search for hyperparameters: its trials, and which of them are missing."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ddray.errors import DdrayError, InterruptedRunError
from ddray.jobs.plan import Plan
from ddray.runs.folder import Run
from ddray.runs.ledger import Row
from ddray.system.files import write_text
from ddray.tuning.options import TuneOptions
from ddray.tuning.space import Range
from ddray.tuning.study import score_of
from ddray.tuning.trial import trial_unit
from ddray.tuning.worker import SearchJob

log = logging.getLogger(__name__)


def numbers_of(rows: Sequence[Row]) -> set[int]:
    """Return the trial numbers that have a row."""
    return {int(row.spec["number"]) for row in rows}


def unfinished(
    events: Sequence[Mapping[str, Any]], rows: Sequence[Row], job: SearchJob
) -> list[tuple[int, dict[str, Any]]]:
    """Return (number, settings) of trials that were started and have no row, by number."""
    done = numbers_of(rows)
    started = {
        int(event["number"]): dict(event["params"])
        # A late worker of a killed driver may write after the next epoch has begun: the newest epoch counts.
        for event in sorted(events, key=lambda event: int(event["epoch"]))
        if event["event"] in ("start", "retry") and "params" in event and "number" in event
    }
    return sorted(
        (trial_number, params) for trial_number, params in started.items() if trial_number not in done
    )


class Search:
    """One search: what is done, and what is missing."""

    def __init__(
        self,
        plan: Plan,
        options: TuneOptions,
        space: Mapping[str, Range],
        paper: dict[str, Any],
        job: SearchJob,
        run: Run,
        num_samples: int,
    ) -> None:
        self.plan, self.options, self.space, self.paper = plan, options, space, paper
        self.job, self.ledger, self.folder, self.num_samples = job, run.ledger, run.folder, num_samples
        self._closed = run.folder / "search.closed"

    def rows(self) -> list[Row]:
        """Return the trials' rows, by number."""
        return sorted(self.ledger.rows("trial"), key=lambda row: int(row.spec["number"]))

    def missing(self) -> list[int]:
        """Return the numbers without a row; of a closed search (see `close`) only those that it had."""
        done = {int(row.spec["number"]) for row in self.rows()}
        trial_numbers: Sequence[int] = range(self.num_samples)
        if self._closed.exists():
            trial_numbers = json.loads(self._closed.read_text(encoding="utf-8"))
        return [trial_number for trial_number in trial_numbers if trial_number not in done]

    def close(self) -> None:
        """Mark the search as ended before test is opened: a search with test scores must not go on."""
        if not self._closed.exists():
            trial_numbers = [int(row.spec["number"]) for row in self.rows()]
            write_text(self._closed, json.dumps(trial_numbers))
            if len(trial_numbers) < self.num_samples:
                log.warning("the time budget closed this search: test is opened, so --resume adds no trials")

    def row_of(self, trial_number: int, params: Mapping[str, Any]) -> Row | None:
        """Return the published row of a trial, or None."""
        return self.ledger.row(self.unit(trial_number, params).key)

    def unit(self, trial_number: int, params: Mapping[str, Any]) -> Any:
        """Return the unit of a trial."""
        return trial_unit(self.job, trial_number, params, self.plan.dataset.fingerprint)

    def check_ended(self, run_s: float) -> None:
        """Check after `run_s` seconds of running that the search may end.

        Raises:
            InterruptedRunError: a signal came, or the time budget ended before the paper's point.
        """
        missing = self.missing()
        budget = self.options.time_budget
        out_of_time = budget is not None and run_s >= budget
        # A budget lets running trials end; a signal leaves some without a row.
        cut_off = bool(unfinished(self.ledger.events(), self.rows(), self.job))
        if missing and (cut_off or not out_of_time or 0 in missing):
            raise InterruptedRunError(
                f"the search ended with {self.num_samples - len(missing)} of {self.num_samples} trials in "
                f"{self.folder}; run again with --run-dir {self.folder} --resume to finish it"
            )


def best_trial(rows: Sequence[Row]) -> Row:
    """Return the trial with the highest val score at full length (the earliest of equals).

    Raises:
        DdrayError: no trial finished.
    """
    full_length = [row for row in rows if row.status == "done" and not row.result["stopped_early"]]
    if not full_length:
        reasons = sorted({row.error or "unknown" for row in rows})
        raise DdrayError(f"no trial finished: {'; '.join(reasons)}; narrow the space or lower its rates")
    return max(full_length, key=lambda row: (score_of(row.result), -int(row.spec["number"])))


def paper_trial(rows: Sequence[Row]) -> Row | None:
    """Return the paper's own point (trial 0) if it finished."""
    return next((row for row in rows if int(row.spec["number"]) == 0 and row.status == "done"), None)
