"""One trial in a worker: distil, score on val at every rung, publish one row. Independent of Tune."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import merge
from ddray.distillation.loop import Distillation, rate_name, run_distillation
from ddray.errors import DivergedError
from ddray.evaluation.hard import Hard
from ddray.evaluation.linear import Linear
from ddray.evaluation.protocol import EvalContext, Evaluator, evaluate_archs
from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import Plan, RunConfig
from ddray.jobs.trainers import PoolTrainer
from ddray.methods import get_method
from ddray.pool.local import LocalPool
from ddray.pool.spec import ModelPool, PoolSource
from ddray.ranking.objective import SpearmanObjective
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.system.files import write_text
from ddray.system.worker import prepare_worker, set_threads, worker_device
from ddray.tuning.payload import Payload, Unpacked, unpack

METRIC: Final = "score"
"""The name under which Tune gets the score, whatever the objective is."""
_WORST: Final = -1.0  # of a failed trial: the lowest rank correlation, below every accuracy
ETA: Final = 3
"""ASHA's reduction factor: a third of the trials go on at each rung."""


@dataclass(frozen=True)
class SearchJob:
    """What every trial of a search shares.

    Attributes:
        run_dir: absolute path of the run.
        epoch: run epoch to publish under.
        method: the method's name.
        ipc: images per class.
        seed: the search's seed, the same for every trial (common random numbers).
        config: the resolved configuration as plain values; a trial changes `method.*`.
        budgets: rungs as parts of the last one, such as (1, 3, 9); (1,) is scored at the end only.
        cpus: cores of a worker.
        gpus: GPUs of a worker.
        nas: scores sets by how well they rank architectures; None scores them by accuracy.
        pool: where shared networks are served; None: the files under `$DDRAY_HOME`.
        budget: images of storage, for methods whose size is not counted per class.
    """

    run_dir: str
    epoch: int
    method: str
    ipc: int
    seed: int
    config: Mapping[str, Any]
    budgets: tuple[int, ...]
    cpus: float
    gpus: float
    nas: SpearmanObjective | None = None
    pool: PoolSource | None = None
    budget: int | None = None

    @property
    def objective(self) -> str:
        """What the search maximises, by its name in the rows."""
        return "val_accuracy" if self.nas is None else "val_spearman"

    @property
    def size(self) -> dict[str, int]:
        """The part of a unit's spec that says how much is stored: ipc, and the budget where there is one."""
        return {"ipc": self.ipc} if self.budget is None else {"ipc": self.ipc, "budget": self.budget}


def trial_pool(job: SearchJob, unpacked: Unpacked, device: torch.device) -> ModelPool:
    """Return a worker's pool; missing networks are trained on the payload's images."""
    trainer = PoolTrainer(unpacked.dataset, unpacked.split, device)
    return LocalPool(trainer) if job.pool is None else job.pool.connect(trainer)


def trial_config(job: SearchJob, params: Mapping[str, Any]) -> RunConfig[Any]:
    """Return the configuration of a trial.

    Raises:
        InputError: a setting breaks the method's rules.
    """
    config_type = get_method(job.method).config_type
    values = merge(job.config, {"method": dict(params)})
    return RunConfig[config_type].parse(values)  # type: ignore[valid-type]


def trial_unit(job: SearchJob, trial_number: int, params: Mapping[str, Any], fingerprint: str) -> Unit:
    """Return the ledger unit of a trial; its number is part of it."""
    spec = {
        "number": trial_number,
        "params": dict(params),
        "method": job.method,
        **job.size,
        "seed": job.seed,
        "fingerprint": fingerprint,
        "split": split_name(job.seed),
        "budgets": list(job.budgets),
        "config": trial_config(job, params).dump(),
    }
    if job.nas is not None:
        spec["objective"] = job.nas.describe()
    return Unit(kind="trial", spec=spec)


def split_name(seed: int) -> str:
    """Return the name of the nine tenths of train that a search distils from."""
    return f"train-val{seed}"


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


def score(
    plan: Plan,
    distilled: DistilledSet,
    unpacked: Unpacked,
    device: torch.device,
    *,
    seed: int,
    num_seeds: int,
) -> dict[str, Any]:
    """Return the accuracy of a set on the payload's held-out part, over `num_seeds` networks."""
    config, ctx = (
        plan.config.evaluate,
        EvalContext(unpacked.dataset, unpacked.held_out, unpacked.space, device),
    )
    protocol: Evaluator = Hard(config.as_recipe())
    if distilled.targets is not None:
        flip = unpacked.dataset.can_flip
        protocol = Linear(config.as_recipe(), config.probe, real=unpacked.split, can_flip=flip)
    return evaluate_archs(
        protocol, distilled.decode(), ctx, archs=(plan.arch,), num_seeds=num_seeds, seed=seed
    )[0]


def val_score(
    job: SearchJob, plan: Plan, distilled: DistilledSet, unpacked: Unpacked, device: torch.device
) -> float:
    """Return what the search maximises: mean accuracy on val, or rank correlation of architectures.

    Raises:
        DivergedError: an image is NaN or infinite.
    """
    if not distilled.is_finite():
        rate = rate_name(plan.config.method.dump())
        raise DivergedError(f"{plan.method} diverged: an image is NaN or infinite; lower {rate}")
    if job.nas is not None:
        return job.nas.score(distilled, unpacked.dataset, unpacked.held_out, device)
    num_seeds = min(plan.config.evaluate.seeds, plan.config.evaluate.val_seeds)
    return float(
        score(plan, distilled, unpacked, device, seed=plan.seed, num_seeds=num_seeds)["accuracy_mean"]
    )


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
    set_threads(job.cpus)
    device = torch.device(worker_device(job.gpus))
    unpacked = unpack(payload)
    unit = trial_unit(job, trial_number, params, unpacked.dataset.fingerprint)
    ledger = Ledger(Path(job.run_dir))
    published = ledger.row(unit.key)
    if published is not None:
        report(_final_metrics(published, job))
        return
    ledger.begin(unit, epoch=job.epoch, number=trial_number, params=dict(params))
    begin = time.perf_counter()
    rungs = Rungs(Path(job.run_dir) / "checkpoints" / f"{unit.key}.rungs.json")
    plan = Plan(job.method, unpacked.dataset, job.ipc, job.seed, trial_config(job, params), job.budget)
    try:
        distill_result = _distil(plan, job, unpacked, unit, rungs, device, report)
    except DivergedError as error:
        row = _row(unit, "failed", {"number": trial_number, "rungs": rungs.values}, begin, str(error))
        ledger.publish(unit, row, epoch=job.epoch)
        report(_final_metrics(row, job))
        return
    result = trial_result(trial_number, params, rungs.values, stopped_early=False, objective=job.objective)
    first, final = distill_result.edge_losses()
    training_facts = {
        "first_loss": first,
        "final_loss": final,
        "seconds_per_step": distill_result.seconds_per_step,
    }
    row = _row(unit, "done", {**result, **training_facts}, begin, None)
    ledger.publish(unit, row, epoch=job.epoch)
    forget_checkpoint(Path(job.run_dir), unit.key)
    report(_final_metrics(row, job))


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
    plan: Plan,
    job: SearchJob,
    unpacked: Unpacked,
    unit: Unit,
    rungs: Rungs,
    device: torch.device,
    report: Callable[[dict[str, Any]], None],
) -> Distillation:
    """Distil, scoring on val at every rung; the last rung is the end."""
    distiller = make_distiller(plan)
    ctx = make_context(
        plan,
        unpacked.split,
        split_name=split_name(job.seed),
        device=device,
        space=unpacked.space,
        pool=trial_pool(job, unpacked, device),
    )
    steps = rung_steps(plan.config.steps, job.budgets)

    def score_rung(step: int, loss: float) -> None:
        budget = steps.get(step)
        if budget is None or budget == job.budgets[-1]:
            return
        if budget not in rungs.values:
            rungs.add(budget, val_score(job, plan, distiller.snapshot(), unpacked, device))
        report(_metrics(job, unit.spec["number"], budget, rungs.values, failed=False))

    distill_result = run_distillation(
        distiller,
        ctx,
        checkpoint=Path(job.run_dir) / "checkpoints" / f"{unit.key}.pt",
        checkpoint_every=plan.config.checkpoint_every,
        eval_steps=tuple(steps),
        on_step=score_rung,
    )
    if job.budgets[-1] not in rungs.values:
        rungs.add(job.budgets[-1], val_score(job, plan, distill_result.distilled, unpacked, device))
    return distill_result


def _row(unit: Unit, status: Any, result: dict[str, Any], begin: float, error: str | None) -> Row:
    wall_s = time.perf_counter() - begin
    return Row(
        key=unit.key, kind="trial", spec=unit.spec, status=status, result=result, wall_s=wall_s, error=error
    )


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
