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
    """Run one trial to its end and publish its row.

    `report` is called with each rung's metrics; it may not return if the scheduler stops the trial.

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
            job.forget_checkpoint(unit.key)
    failed, last = row.status == "failed", job.budgets[-1]
    rungs = {last: _WORST} if failed else {int(b): v for b, v in row.result["rungs"].items()}
    report(_metrics(job, row.result["number"], last, rungs, failed=failed))


def _run(worker: SearchWorker, unit: Unit, report: Callable[[dict[str, Any]], None]) -> Row:
    """Distil, scoring on val at every rung, the last of which is the end; return the trial's row."""
    job, begin = worker.job, time.perf_counter()
    trial_number, plan = unit.spec["number"], worker.plan(unit.spec["params"])
    distiller = make_distiller(plan)
    checkpoint = job.checkpoint(unit.key)
    rungs: dict[int, float] = {}
    path = checkpoint.with_suffix(".rungs.json")  # beside the checkpoint: a resume scores no rung twice
    if path.exists():
        rungs = {int(k): float(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
    # Step -> budget; a method without steps has no rung on its way.
    steps = {max(1, plan.config.steps * b // job.budgets[-1]): b for b in job.budgets if plan.config.steps}

    def score(budget: int, distil: Callable[[], DistilledSet]) -> None:
        if budget not in rungs:
            rungs[budget] = worker.val_score(plan, distil())
            write_text(path, json.dumps(rungs))

    def score_rung(step: int, loss: float) -> None:
        budget = steps.get(step, job.budgets[-1])
        if budget != job.budgets[-1]:
            score(budget, distiller.snapshot)
            report(_metrics(job, trial_number, budget, rungs, failed=False))

    try:
        distillation = run_distillation(
            distiller,
            worker.context(plan),
            checkpoint=checkpoint,
            eval_steps=tuple(steps),
            on_step=score_rung,
        )
        score(job.budgets[-1], lambda: distillation.distilled)
    except DivergedError as error:
        result = {"number": trial_number, "rungs": rungs}
        return Row.failed(unit, error, result=result, wall_s=time.perf_counter() - begin)
    first, final = distillation.edge_losses()
    losses = {"first_loss": first, "final_loss": final, "seconds_per_step": distillation.seconds_per_step}
    costs = unit_costs(distillation, worker.device, time.perf_counter() - begin)
    result = {**trial_result(unit, rungs, job.objective), **losses, **costs}
    return Row.done(unit, result, time.perf_counter() - begin)


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


def _metrics(
    job: SearchJob, trial_number: int, budget: int, rungs: Mapping[int, float], *, failed: bool
) -> dict[str, Any]:
    """Return the metrics of a rung for Tune's scheduler."""
    return {
        METRIC: rungs[max(rungs)],
        "objective": job.objective,
        "budget": budget,
        "number": trial_number,
        "failed": failed,
        "rungs": {str(b): v for b, v in rungs.items()},
    }
