"""Running a search's trials under Ray Tune: scheduler, callbacks, and the function that Tune calls."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from ddray.cluster.executor import RayExecutor
from ddray.cluster.loggers import loggers, trial_name
from ddray.cluster.searcher import NumberedSearch, stopped_row
from ddray.errors import DdrayError, DeviceMissingError, StorageError
from ddray.runs.executor import MAX_ATTEMPTS
from ddray.runs.ledger import Row
from ddray.runs.recovery import recovering
from ddray.system.interrupts import handlers_restored
from ddray.system.progress import reported_to, reports_in
from ddray.system.worker import prepare_worker
from ddray.tuning.live import LiveTable
from ddray.tuning.shards import run_in_shards
from ddray.tuning.study import status_of, write_study
from ddray.tuning.trial import ETA, METRIC, publish_trial, run_trial, trial_unit

if TYPE_CHECKING:
    from ddray.tuning.payload import Payload
    from ddray.tuning.search import Search

log = logging.getLogger(__name__)


class PaperSafeAsha(AsyncHyperBandScheduler):
    """ASHA that never stops trial 0, so that the paper's point is compared at full length.

    The rungs of `rows`, trials that had finished before a resume, still count.
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
            trial: Any = SimpleNamespace(trial_id=f"number-{row.spec['number']}")
            for budget, value in row.result.get("rungs", {}).items():
                self._brackets[0].on_result(trial, int(budget), float(value))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the scheduler's decision."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if result.get("number") == 0 else decision)


class Publisher(Callback):
    """Publishes the rows that a worker can't: of trials that were stopped and of those that kept crashing."""

    def __init__(self, search: Search, live: LiveTable) -> None:
        self._search, self._live = search, live
        self.error: DdrayError | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show that a trial is running."""
        self._live.update(trial.config["number"], trial.config["params"], "running", {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show a rung's score."""
        self._live.update(trial.config["number"], trial.config["params"], "running", result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log that a trial is tried again."""
        self._live.forget(trial.config["number"])
        log.warning("trial %d: its worker failed, trying again", trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Publish a stopped trial's row."""
        trial_number, params = trial.config["number"], trial.config["params"]
        row = self._search.row_of(trial_number, params)
        if row is None:
            unit = self._search.unit(trial_number, params)
            row = stopped_row(unit, self._search.job.objective, trial.last_result)
            self._search.run.ledger.publish(unit, row, epoch=self._search.job.epoch)
            self._search.job.forget_checkpoint(unit.key)
        self._live.update(trial_number, params, status_of(row), row.result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Publish a failed row for a trial whose retries are used up."""
        trial_number, params = trial.config["number"], trial.config["params"]
        unit = self._search.unit(trial_number, params)
        # Tune writes the traceback beside the trial's local files; its last line is the exception.
        text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["its worker died"]
        for kind in (StorageError, DeviceMissingError):
            if kind.__name__ in lines[-1]:
                # Not the trial's fault: no row, so that --resume runs it when there is space, or a GPU.
                self.error = kind(lines[-1].partition(kind.__name__)[2].lstrip(": "))
                self._live.forget(trial_number)
                return
        reason = f"failed {MAX_ATTEMPTS} times; last: {lines[-1][:300]}"
        row = Row.failed(unit, reason, result={"number": trial_number})
        self._search.run.ledger.publish(unit, row, epoch=self._search.job.epoch)
        self._live.update(trial_number, params, "failed", {})


def _trainable(config: dict[str, Any], *, job: Any, payload: Any, reports: Any) -> None:
    """What Tune runs in a worker."""
    # Tune replaces the worker of a trial that fails: what it raises is tried again by another process.
    with reported_to(reports / f"{config['number']}.json"):
        recovering(run_trial, job, payload, config["number"], config["params"], tune.report)


def _sharded(
    config: dict[str, Any], *, job: Any, fingerprint: str, payload: Any, executor: Any, reports: Any
) -> None:
    """What Tune runs in the process of a sharded trial, which computes nothing: its workers do.

    They have the bundles of the trial's placement group, which Tune lets its children take. `payload` is a
    list of one reference: Ray resolves references that are arguments themselves.
    """
    prepare_worker()
    unit = trial_unit(job, config["number"], config["params"], fingerprint)
    with reports_in(reports / str(config["number"])), executor.workers() as workers:
        publish_trial(
            job, unit, tune.report, lambda: run_in_shards(workers, job, payload[0], unit, tune.report)
        )


def _with_resources(search: Search, payload: Payload, workers: int) -> Any:
    """Return what Tune runs for a trial, with its resources: one worker, or `workers` for its shards."""
    job, options = search.job, search.options
    bundle = {"CPU": options.cpus_per_trial, "GPU": options.gpus}
    if not job.shards:
        # In the object store once.
        trainable = tune.with_parameters(_trainable, job=job, payload=payload, reports=search.run.reports)
        return tune.with_resources(trainable, PlacementGroupFactory([bundle]))
    trainable = tune.with_parameters(
        _sharded,
        job=job,
        fingerprint=payload.facts["fingerprint"],
        payload=[ray.put(payload)],
        executor=RayExecutor(options.cpus_per_trial, options.gpus, workers),
        reports=search.run.reports,
    )
    return tune.with_resources(trainable, PlacementGroupFactory([{}, *[bundle] * workers]))


def run_tune(search: Search, payload: Payload, slots: int) -> None:
    """Run the missing trials of a search under Tune on `slots` workers, of which a sharded trial has more."""
    job, folder = search.job, search.run.folder
    workers = max(1, min(len(job.shards), slots))
    rows = search.rows()
    live = LiveTable(search.num_samples, len(rows), search.run.reports)
    publisher = Publisher(search, live)
    asha = len(job.budgets) > 1
    tuner = Tuner(
        _with_resources(search, payload, workers),
        tune_config=TuneConfig(
            search_alg=NumberedSearch(search, rows),
            scheduler=PaperSafeAsha(job.budgets, rows) if asha else FIFOScheduler(),  # type: ignore[no-untyped-call]
            num_samples=-1,
            max_concurrent_trials=slots // workers,
            reuse_actors=True,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=RunConfig(
            name=f"epoch-{job.epoch}",
            storage_path=str(folder / "tune"),
            callbacks=[publisher, *loggers(search)],
            failure_config=FailureConfig(max_failures=MAX_ATTEMPTS - 1),
            verbose=0,
        ),
    )
    with live.display(), handlers_restored():
        tuner.fit()
    if publisher.error is not None:
        raise publisher.error
    write_study(folder, search.name, search.space, search.rows())
