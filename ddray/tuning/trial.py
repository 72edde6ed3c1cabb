"""One trial in a worker: distil, score on val at every rung, publish one row. Independent of Tune."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.data import SplitName
from ddray.distillation.loop import Distillation, run_distillation
from ddray.drawing.images import save_grid
from ddray.errors import DivergedError
from ddray.jobs.context import make_distiller
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.system.files import write_text
from ddray.system.memory import peak_bytes
from ddray.system.worker import prepare_worker
from ddray.tuning.payload import Payload
from ddray.tuning.worker import SearchJob, SearchWorker

METRIC: Final = "score"
"""The name under which Tune gets the score, whatever the objective is."""
_WORST: Final = -1.0  # of a failed trial: the lowest rank correlation, below every accuracy
ACCURACY_PERCENT: Final = "val_accuracy_percent"
"""The name under which loggers get it."""
ETA: Final = 3
"""ASHA's reduction factor: a third of the trials go on at each rung."""


def trial_unit(job: SearchJob, trial_number: int, params: Mapping[str, Any], fingerprint: str) -> Unit:
    """Return the ledger unit of a trial; its number is part of it."""
    spec = {
        "number": trial_number,
        "params": dict(params),
        **job.describe(job.seed, fingerprint),
        "split": str(SplitName(job.seed)),
        "budgets": list(job.budgets),
        "config": job.settings.dump(params),
    }
    if job.nas is not None:
        spec["objective"] = job.nas.describe()
    return Unit(kind="trial", spec=spec)


def run_trial(
    job: SearchJob,
    payload: Payload,
    trial_number: int,
    params: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Run one trial to its end and publish its row; arguments and errors as for `publish_trial`."""
    prepare_worker()
    worker = SearchWorker(job, payload)
    unit = trial_unit(job, trial_number, params, worker.data.dataset.fingerprint)
    publish_trial(job, unit, report, lambda: _run(worker, unit, report))


def publish_trial(
    job: SearchJob, unit: Unit, report: Callable[[dict[str, Any]], None], run: Callable[[], Row]
) -> None:
    """Publish the row that `run` returns for a trial, unless it has one.

    `report` is called with each rung's metrics; it may not return if the scheduler stops the trial.

    Raises:
        Exception: a crash or lack of memory; the caller retries it. A diverged trial does not raise: its
            failed row is published, and `report` gets `failed=True`.
    """
    ledger, spec = Ledger(Path(job.run_dir)), unit.spec
    row = ledger.row(unit.key)
    if row is None:
        ledger.begin(unit, epoch=job.epoch, number=spec["number"], params=dict(spec["params"]))
        row = run()
        ledger.publish(unit, row, epoch=job.epoch)
        if row.status == "done":
            job.forget_checkpoint(unit.key)
    failed, last = row.status == "failed", job.budgets[-1]
    rungs = {last: _WORST} if failed else {int(b): v for b, v in row.result["rungs"].items()}
    step, loss = spec["config"]["steps"], row.result.get("final_loss")
    report(rung_metrics(job, unit, last, rungs, step, loss, failed=failed))


def rung_picture(run_dir: str, trial_number: int, step: int) -> Path:
    """Return the picture of a trial's set at a rung."""
    return Path(run_dir) / "rungs" / f"trial-{trial_number:04d}" / f"{step:07d}.png"


def save_picture(job: SearchJob, unit: Unit, step: int, distilled: DistilledSet) -> None:
    """Write the picture of a trial's set at a rung."""
    save_grid(distilled, rung_picture(job.run_dir, unit.spec["number"], step))


def read_rungs(job: SearchJob, unit: Unit) -> tuple[dict[int, float], Path]:
    """Return a trial's scores by budget so far, and their file: a resume scores no rung twice."""
    path = job.checkpoint(unit.key).with_suffix(".rungs.json")
    text = path.read_text(encoding="utf-8") if path.exists() else "{}"
    return {int(budget): float(value) for budget, value in json.loads(text).items()}, path


def rung_steps(job: SearchJob, steps: int) -> dict[int, int]:
    """Return the budgets by the step at which they are used up; a method without steps has no rung."""
    return {max(1, steps * budget // job.budgets[-1]): budget for budget in job.budgets if steps}


def _run(worker: SearchWorker, unit: Unit, report: Callable[[dict[str, Any]], None]) -> Row:
    """Distil, scoring on val at every rung, the last of which is the end; return the trial's row."""
    job, begin = worker.job, time.perf_counter()
    plan = worker.plan(unit.spec["params"])
    distiller = make_distiller(plan)
    rungs, path = read_rungs(job, unit)
    steps = rung_steps(job, plan.config.steps)

    def score(budget: int, step: int, distil: Callable[[], DistilledSet]) -> None:
        if budget not in rungs:
            distilled = distil()
            rungs[budget] = worker.val_score(plan, distilled)
            save_picture(job, unit, step, distilled)
            write_text(path, json.dumps(rungs))

    def score_rung(step: int, loss: float) -> None:
        budget = steps.get(step, job.budgets[-1])
        if budget != job.budgets[-1]:
            score(budget, step, distiller.snapshot)
            report(rung_metrics(job, unit, budget, rungs, step, loss))

    try:
        distillation = run_distillation(
            distiller,
            worker.context(plan),
            checkpoint=job.checkpoint(unit.key),
            eval_steps=tuple(steps),
            on_step=score_rung,
        )
        score(job.budgets[-1], plan.config.steps, lambda: distillation.distilled)
    except DivergedError as error:
        return failed_row(unit, error, rungs, time.perf_counter() - begin)
    costs = unit_costs(distillation, worker.device, time.perf_counter() - begin)
    return done_row(job, unit, rungs, distillation, costs, time.perf_counter() - begin)


def done_row(
    job: SearchJob,
    unit: Unit,
    rungs: Mapping[int, float],
    distillation: Distillation,
    costs: Mapping[str, Any],
    wall_s: float,
) -> Row:
    """Return the row of a trial that has ended."""
    first, final = distillation.edge_losses()
    losses = {"first_loss": first, "final_loss": final, "seconds_per_step": distillation.seconds_per_step}
    return Row.done(unit, {**trial_result(unit, rungs, job.objective), **losses, **costs}, wall_s)


def failed_row(unit: Unit, error: DivergedError, rungs: Mapping[int, float], wall_s: float) -> Row:
    """Return the row of a trial that has diverged."""
    return Row.failed(unit, error, result={"number": unit.spec["number"], "rungs": rungs}, wall_s=wall_s)


def unit_costs(distillation: Distillation, device: torch.device, wall_s: float) -> dict[str, Any]:
    """Return what a unit took that distilled, and then scored, in `wall_s` seconds of this process.

    `device_seconds` are those of earlier processes too; `resumed_from_step` is there if there were some.
    """
    earlier = max(0.0, (distillation.seconds or 0.0) - distillation.wall_s)
    resumed = {"resumed_from_step": step} if (step := distillation.resumed_from_step) else {}
    peak = max(distillation.peak_memory_bytes or 0, peak_bytes(device))
    return {"device_seconds": wall_s + earlier, "peak_memory_bytes": peak, **resumed}


def trial_result(
    unit: Unit, rungs: Mapping[int, float], objective: str, *, stopped_early: bool = False
) -> dict[str, Any]:
    """Return a trial row's result; its score, under the objective's name, is that of its last rung."""
    return {
        "number": unit.spec["number"],
        "params": unit.spec["params"],
        "objective": objective,
        objective: rungs[max(rungs)],
        "rungs": {str(budget): value for budget, value in sorted(rungs.items())},
        "stopped_early": stopped_early,
    }


def rung_metrics(
    job: SearchJob,
    unit: Unit,
    budget: int,
    rungs: Mapping[int, float],
    step: int,
    loss: float | None,
    *,
    failed: bool = False,
) -> dict[str, Any]:
    """Return the metrics of a trial's rung for Tune's scheduler, and for loggers.

    `loss` is that of the rung's step, if it is known.
    """
    score = rungs[max(rungs)]
    percent = {ACCURACY_PERCENT: 100 * score} if job.nas is None and not failed else {}
    return {
        METRIC: score,
        **percent,
        **({} if loss is None else {"loss": loss}),
        "step": step,
        "objective": job.objective,
        "budget": budget,
        "number": unit.spec["number"],
        "failed": failed,
        "rungs": {str(b): v for b, v in rungs.items()},
    }
