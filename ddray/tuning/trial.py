"""One trial in a worker: distil, score on val at every rung, publish one row. Independent of Tune."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ddray.data import SplitName
from ddray.distillation.loop import Distillation
from ddray.errors import DivergedError
from ddray.jobs.context import make_distiller
from ddray.jobs.distill import distil_plan
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.system.files import write_text
from ddray.system.worker import prepare_worker
from ddray.tuning.payload import Payload
from ddray.tuning.worker import SearchJob, SearchWorker, trial_config

METRIC: Final = "score"
"""The name under which Tune gets the score, whatever the objective is."""
_WORST: Final = -1.0  # of a failed trial: the lowest rank correlation, below every accuracy
ETA: Final = 3
"""ASHA's reduction factor: a third of the trials go on at each rung."""


def trial_unit(job: SearchJob, trial_number: int, params: Mapping[str, Any], fingerprint: str) -> Unit:
    """Return the ledger unit of a trial; its number is part of it."""
    spec = {
        "number": trial_number,
        "params": dict(params),
        "method": job.method,
        **job.size,
        "seed": job.seed,
        "fingerprint": fingerprint,
        "split": str(SplitName(job.seed)),
        "budgets": list(job.budgets),
        "config": trial_config(job, params).dump(),
    }
    if job.nas is not None:
        spec["objective"] = job.nas.describe()
    return Unit(kind="trial", spec=spec)


def rung_steps(steps: int, budgets: tuple[int, ...]) -> dict[int, int]:
    """Return step -> budget for the rungs of a run of `steps`."""
    return {max(1, steps * budget // budgets[-1]): budget for budget in budgets} if steps else {}


class Rungs:
    """The val scores of a trial's rungs, saved beside its checkpoint: a resume scores no rung twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[int, float] = {}
        if path.exists():
            self.values = {int(k): float(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}

    def add(self, budget: int, value: float) -> None:
        """Save a rung's value."""
        self.values[budget] = value
        write_text(self._path, json.dumps(self.values))


def run_trial(
    job: SearchJob,
    payload: Payload,
    trial_number: int,
    params: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Run one trial to its end and publish its row.

    Args:
        job: what all trials share.
        payload: the real images.
        trial_number: the trial's number.
        params: its settings.
        report: called with each rung's metrics; may not return if the scheduler stops the trial.

    Raises:
        Exception: a crash or lack of memory; the caller retries it. A diverged trial does not raise: its
            failed row is published, and `report` gets `failed=True`.
    """
    prepare_worker()
    worker = SearchWorker(job, payload)
    unit = trial_unit(job, trial_number, params, worker.data.dataset.fingerprint)
    ledger = Ledger(Path(job.run_dir))
    row = ledger.row(unit.key)
    if row is None:
        ledger.begin(unit, epoch=job.epoch, number=trial_number, params=dict(params))
        row = _run(worker, unit, report)
        ledger.publish(unit, row, epoch=job.epoch)
        if row.status == "done":
            forget_checkpoint(Path(job.run_dir), unit.key)
    report(_final_metrics(row, job))


def _run(worker: SearchWorker, unit: Unit, report: Callable[[dict[str, Any]], None]) -> Row:
    """Distil, scoring on val at every rung; return the trial's row."""
    job, begin = worker.job, time.perf_counter()
    trial_number, params = unit.spec["number"], unit.spec["params"]
    rungs = Rungs(job.checkpoint(unit.key).with_suffix(".rungs.json"))
    try:
        distillation = _distil(worker, unit, rungs, report)
    except DivergedError as error:
        result = {"number": trial_number, "rungs": rungs.values}
        return Row.failed(unit, error, result=result, wall_s=time.perf_counter() - begin)
    result = trial_result(trial_number, params, rungs.values, stopped_early=False, objective=job.objective)
    first, final = distillation.edge_losses()
    losses = {"first_loss": first, "final_loss": final, "seconds_per_step": distillation.seconds_per_step}
    return Row.done(unit, {**result, **losses}, time.perf_counter() - begin)


def forget_checkpoint(run_dir: Path, key: str) -> None:
    """Remove a unit's checkpoint and rungs once its row is published."""
    for name in (f"{key}.pt", f"{key}.rungs.json"):
        (run_dir / "checkpoints" / name).unlink(missing_ok=True)


def trial_result(
    trial_number: int,
    params: Mapping[str, Any],
    rungs: Mapping[int, float],
    *,
    stopped_early: bool,
    objective: str,
) -> dict[str, Any]:
    """Return a trial row's result; its score, under the objective's name, is that of its last rung."""
    return {
        "number": trial_number,
        "params": dict(params),
        "objective": objective,
        objective: rungs[max(rungs)],
        "rungs": {str(budget): value for budget, value in sorted(rungs.items())},
        "stopped_early": stopped_early,
    }


def _distil(
    worker: SearchWorker, unit: Unit, rungs: Rungs, report: Callable[[dict[str, Any]], None]
) -> Distillation:
    """Distil, scoring on val at every rung; the last rung is the end."""
    job, plan = worker.job, worker.plan(unit.spec["params"])
    distiller = make_distiller(plan)
    steps = rung_steps(plan.config.steps, job.budgets)

    def score_rung(step: int, loss: float) -> None:
        budget = steps.get(step)
        if budget is None or budget == job.budgets[-1]:
            return
        if budget not in rungs.values:
            rungs.add(budget, worker.val_score(plan, distiller.snapshot()))
        report(_metrics(job, unit.spec["number"], budget, rungs.values, failed=False))

    distillation = distil_plan(
        plan,
        worker.context(plan),
        job.checkpoint(unit.key),
        distiller=distiller,
        eval_steps=tuple(steps),
        on_step=score_rung,
    )
    if job.budgets[-1] not in rungs.values:
        rungs.add(job.budgets[-1], worker.val_score(plan, distillation.distilled))
    return distillation


def _final_metrics(row: Row, job: SearchJob) -> dict[str, Any]:
    """Return the metrics that the scheduler gets at the end."""
    failed = row.status == "failed"
    rungs = {job.budgets[-1]: _WORST} if failed else {int(b): v for b, v in row.result["rungs"].items()}
    return _metrics(job, row.result["number"], job.budgets[-1], rungs, failed=failed)


def _metrics(
    job: SearchJob, trial_number: int, budget: int, rungs: Mapping[int, float], *, failed: bool
) -> dict[str, Any]:
    """Return the metrics of a rung; a failed trial ranks below every other."""
    return {
        METRIC: _WORST if failed else rungs[max(rungs)],
        "objective": job.objective,
        "budget": budget,
        "number": trial_number,
        "failed": failed,
        "rungs": {str(b): v for b, v in rungs.items()},
    }
