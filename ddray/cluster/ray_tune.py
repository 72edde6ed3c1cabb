"""Running a search's trials under Ray Tune: scheduler, callbacks, and the function that Tune calls."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from ddray.cluster.searcher import FunctionSource, NumberedSearch, TpeSource, stopped_row
from ddray.errors import StorageError
from ddray.runs.executor import MAX_ATTEMPTS
from ddray.runs.ledger import Row
from ddray.tuning.live import LiveTable
from ddray.tuning.search import unfinished
from ddray.tuning.space import grid, sample
from ddray.tuning.study import write_study
from ddray.tuning.trial import ETA, METRIC, forget_checkpoint, run_trial

if TYPE_CHECKING:
    from ddray.tuning.payload import Payload
    from ddray.tuning.search import Search

log = logging.getLogger(__name__)


class PaperSafeAsha(AsyncHyperBandScheduler):
    """ASHA that never stops trial 0, so that the paper's point is compared at full length.

    Args:
        budgets: the rungs.
        rows: trials that had finished before a resume; their rungs still count.
    """

    def __init__(self, budgets: tuple[int, ...], rows: list[Row]) -> None:
        super().__init__(
            time_attr="budget",
            metric=METRIC,
            mode="max",
            max_t=budgets[-1] + 1,
            grace_period=1,
            reduction_factor=ETA,
        )
        for row in rows:
            self._recall(row)

    def _recall(self, row: Row) -> None:
        class Known:
            trial_id = f"number-{row.spec['number']}"

        for budget, value in row.result.get("rungs", {}).items():
            self._brackets[0].on_result(Known, int(budget), float(value))  # type: ignore[arg-type]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the scheduler's decision."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if result.get("number") == 0 else decision)


class Publisher(Callback):
    """Publishes the rows that a worker can't: of trials that were stopped and of those that kept crashing."""

    def __init__(self, search: Search, live: LiveTable) -> None:
        self._search = search
        self._live = live
        self.storage_error: str | None = None

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show a rung's score."""
        self._live.update(trial.config["number"], trial.config["params"], "running", result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log that a trial is tried again."""
        log.warning("trial %d: its worker failed, trying again", trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Publish a stopped trial's row."""
        trial_number, params = trial.config["number"], trial.config["params"]
        row = self._search.row_of(trial_number, params)
        if row is None:
            unit = self._search.unit(trial_number, params)
            draft = stopped_row(trial_number, params, trial.last_result)
            wall_s = float(trial.last_result.get("time_total_s", 0.0))
            row = draft.model_copy(update={"key": unit.key, "spec": unit.spec, "wall_s": wall_s})
            self._search.ledger.publish(unit, row, epoch=self._search.job.epoch)
            forget_checkpoint(self._search.folder, unit.key)
        stopped = row.status == "done" and row.result["stopped_early"]
        self._live.update(trial_number, params, "stopped early" if stopped else row.status, row.result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Publish a failed row for a trial whose retries are used up."""
        trial_number, params = trial.config["number"], trial.config["params"]
        unit = self._search.unit(trial_number, params)
        # Tune writes the traceback beside the trial's local files; its last line is the exception.
        text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["its worker died"]
        if "StorageError" in lines[-1]:
            # Not the trial's fault: no row, so that --resume runs it when there is space again.
            self.storage_error = lines[-1].partition("StorageError")[2].lstrip(": ")
            return
        reason = f"failed {MAX_ATTEMPTS} times; last: {lines[-1][:300]}"
        row = Row.failed(unit, reason, result={"number": trial_number})
        self._search.ledger.publish(unit, row, epoch=self._search.job.epoch)
        self._live.update(trial_number, params, "failed", {})


def _trainable(config: dict[str, Any], *, job: Any, payload: Any) -> None:
    """What Tune runs in a worker."""
    run_trial(job, payload, config["number"], config["params"], tune.report)


def run_tune(search: Search, payload: Payload, concurrent: int) -> None:
    """Run the missing trials of a search under Tune.

    Args:
        search: what to run.
        payload: the real images, put into the object store once.
        concurrent: trials at a time.
    """
    options, job = search.options, search.job
    rows = search.rows()
    live = LiveTable(search.num_samples, len(rows))
    publisher = Publisher(search, live)
    asha = len(job.budgets) > 1
    tuner = Tuner(
        tune.with_resources(
            tune.with_parameters(_trainable, job=job, payload=payload),
            {"cpu": options.cpus_per_trial, "gpu": options.gpus_per_trial},
        ),
        tune_config=TuneConfig(
            search_alg=_numbered(search, rows),
            scheduler=PaperSafeAsha(job.budgets, rows) if asha else FIFOScheduler(),  # type: ignore[no-untyped-call]
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name=f"epoch-{job.epoch}",
            storage_path=str(search.folder / "tune"),
            callbacks=[publisher, TBXLoggerCallback()],  # type: ignore[no-untyped-call]
            failure_config=FailureConfig(max_failures=MAX_ATTEMPTS - 1),
            verbose=0,
        ),
    )
    with live:
        tuner.fit()
    if publisher.storage_error is not None:
        raise StorageError(publisher.storage_error)
    write_study(search.folder / "optuna.journal", search.space, search.rows())


def _numbered(search: Search, rows: list[Row]) -> NumberedSearch:
    """Return the searcher: unfinished trials first, then the paper's point, then new numbers."""
    options, space, seed = search.options, search.space, search.job.seed
    queued = unfinished(search.ledger.events(), rows, search.job)
    if 0 in search.missing() and 0 not in dict(queued):
        queued.insert(0, (0, search.paper))
    fresh = [trial_number for trial_number in search.missing() if trial_number not in dict(queued)]
    source: TpeSource | FunctionSource
    if options.strategy in ("asha-tpe", "tpe") and space:
        path = search.folder / "optuna.journal"
        source = TpeSource(
            space, rows, seed=seed, epoch=search.job.epoch, num_samples=search.num_samples, path=path
        )
    elif options.strategy == "grid":
        source = FunctionSource(grid(space, search.paper).__getitem__)
    else:
        source = FunctionSource(lambda trial_number: sample(space, seed, trial_number))
    deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
    return NumberedSearch(source, queued=queued, fresh=fresh, row_of=search.row_of, deadline=deadline)
