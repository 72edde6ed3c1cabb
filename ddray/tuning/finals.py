"""The end of a search: distil winner and paper's point from all of train on fresh seeds, score on test."""

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ddray.artifact.distilled_set import RESULT, save_result
from ddray.artifact.reading import load
from ddray.data import PixelSpace, Split
from ddray.data.pixels import pixel_space
from ddray.distillation.loop import Distillation
from ddray.drawing.images import save_grid
from ddray.errors import DdrayError, DivergedError, StorageError, one_line
from ddray.jobs.context import declared_specs, make_context
from ddray.jobs.plan import Plan
from ddray.pool.spec import PoolSpec
from ddray.runs.executor import Executor, Task
from ddray.runs.folder import Run
from ddray.runs.ledger import Ledger, Row, Unit
from ddray.seeding import derive_seed
from ddray.system.progress import progress
from ddray.tuning.payload import Payload, pack
from ddray.tuning.search import Search
from ddray.tuning.shards import Schedule, distil, distil_in_shards
from ddray.tuning.trial import unit_costs
from ddray.tuning.worker import SearchJob, SearchWorker

log = logging.getLogger(__name__)
ServePool = Callable[[SearchJob, Payload, Sequence[PoolSpec], Executor], AbstractContextManager[SearchJob]]
"""Trains a search's shared networks, and serves them while the context is open."""


def run_finals(
    search: Search, points: Mapping[str, Row | None], executor: Executor, serve_pool: ServePool
) -> dict[str, dict[str, Any]]:
    """Distil each point on fresh seeds from all of train, and score the sets on test.

    `points` are the trial rows of `best` and `paper` (None if it failed).

    Returns:
        Per point `{"artifact", "scores": {"test_accuracy_mean", "test_accuracy_std"}}`; mean and sample
        standard deviation are over all networks of all fresh seeds.

    Raises:
        InputError: the test set can't be read.
        DdrayError: every fresh seed of the winner failed.
    """
    run = search.run
    units = {
        name: [final_unit(search, row, seed_index) for seed_index in range(search.options.final_sets)]
        for name, row in points.items()
        if row is not None
    }
    units_by_key = {unit.key: unit for point_units in units.values() for unit in point_units}
    if missing := {key: unit for key, unit in units_by_key.items() if run.ledger.row(key) is None}:
        _run_missing(search, missing, executor, serve_pool)
    for key in {row.key for row in run.ledger.rows("evaluate")} - units_by_key.keys():
        run.ledger.withdraw(key, "extended")  # of the winner before the search was extended
    results = {name: _summary(run, point_units) for name, point_units in units.items()}
    if results["best"]["artifact"] is None:
        row = next(filter(None, (run.ledger.row(unit.key) for unit in units["best"])), None)
        reason = row.error if row is not None else "crashed (see above); run again with --resume"
        raise DdrayError(f"the winner failed on every fresh seed: {reason}")
    final = run.folder / RESULT
    distilled = load(Path(results["best"]["artifact"]))
    save_result(distilled, final)
    save_grid(distilled, final.with_suffix(".png"))
    results["best"]["artifact"] = str(final)
    return results


def final_unit(search: Search, row: Row, seed_index: int) -> Unit:
    """Return the unit of one fresh seed of a trial's settings: distilled from all of train, scored on test.

    Its schedule is what the trial's set was distilled with: its settings throughout, or PB2's schedule.
    """
    plan, job = search.plan, search.job
    config, _ = job.settings.configs(row.spec["params"])
    constant_schedule = [{"until": config.steps, "params": row.spec["params"]}]
    schedule = row.result.get("schedule", constant_schedule)
    seed = derive_seed(job.seed, "final", seed_index) % 2**31
    spec = {
        "schedule": schedule,
        **job.describe(seed, plan.dataset.fingerprint),
        "split": "train",
        "scored_on": "test",
        "config": job.settings.dump(schedule[-1]["params"]),
    }
    return Unit(kind="evaluate", spec=spec)


def _run_missing(search: Search, units: dict[str, Unit], executor: Executor, serve_pool: ServePool) -> None:
    """Run the units that have no row, in parallel; publish the rows of those that diverged."""
    plan, job = search.plan, search.job
    # Opened here and not before: a search must not see test, and a broken test set must not cost a trial.
    test, train = plan.dataset.test(), plan.dataset.train()
    space = pixel_space(plan.config.pixel_space, plan.dataset, train)
    payload = pack(plan.dataset, train, "train", test, space)
    specs = _final_specs(plan, job, units.values(), train, space)
    with (
        progress("final sets", len(units), watch=search.run.reports) as show,
        executor.workers() as workers,
        serve_pool(job, payload, specs, executor) as served,
    ):
        shared = workers.share(payload)
        schedules = {
            key: Schedule(unit.spec["schedule"], unit.spec["seed"], job.checkpoint(key))
            for key, unit in (units.items() if job.shards else ())
        }
        joined = distil_in_shards(workers, served, shared, schedules)
        tasks = [
            Task(key, final_task, (served, shared, unit, joined.get(key))) for key, unit in units.items()
        ]
        for outcome in workers.run(tasks):
            show(show.done + 1, "distilled and scored on test")
            if isinstance(outcome.error, StorageError):
                raise outcome.error  # no row: --resume runs it when there is space again
            if isinstance(outcome.error, DivergedError):
                unit = units[outcome.key]
                row = Row.failed(unit, outcome.error, result={"attempts": outcome.attempts})
                search.run.ledger.publish(unit, row, epoch=job.epoch)
            elif outcome.error is not None:
                # No row either: a crash is worth another try on --resume.
                reason = one_line(outcome.error, 200)
                log.warning("final run %s failed %d times: %s", outcome.key[:12], outcome.attempts, reason)


def _final_specs(
    plan: Plan, job: SearchJob, units: Iterable[Unit], train: Split, space: PixelSpace
) -> list[PoolSpec]:
    """Return the networks that the units' methods declare."""
    device = torch.device(job.device)
    specs: dict[str, PoolSpec] = {}
    for unit in units:
        for segment in unit.spec["schedule"]:
            config, _ = job.settings.configs(segment["params"])
            final_plan = Plan(job.method, plan.dataset, job.ipc, unit.spec["seed"], config, job.budget)
            ctx = make_context(
                final_plan,
                train,
                split_name="train",
                device=device,
                space=space if space.kind == config.pixel_space else None,
                search_seed=job.seed,
            )
            specs |= {spec.key: spec for spec in declared_specs(final_plan, ctx)}
    return list(specs.values())


def final_task(
    job: SearchJob, payload: Payload, unit: Unit, joined: Distillation | Exception | None = None
) -> None:
    """Distil one fresh seed and score it; runs in a worker and publishes its row.

    `joined` is what its shards have distilled, or why one failed, which is raised.
    """
    begin = time.perf_counter()
    worker, ledger = SearchWorker(job, payload), Ledger(Path(job.run_dir))
    if ledger.row(unit.key) is not None:
        return
    if isinstance(joined, Exception):
        raise joined
    ledger.begin(unit, epoch=job.epoch)
    schedule = Schedule(unit.spec["schedule"], unit.spec["seed"], job.checkpoint(unit.key))
    plan = worker.plan(schedule.segments[-1]["params"], schedule.seed)
    distillation = distil(worker, schedule) if joined is None else joined
    distillation.distilled.save(artifact_path(Path(job.run_dir), unit.key), shared=Path(job.run_dir))
    scores = worker.score(plan, distillation.distilled)
    wall_s = time.perf_counter() - begin
    costs = unit_costs(distillation, worker.device, wall_s)
    ledger.publish(unit, Row.done(unit, {**scores, **costs}, wall_s), epoch=job.epoch)
    job.forget_checkpoint(unit.key)


def artifact_path(run_dir: Path, key: str) -> Path:
    """Return the path of a fresh seed's set."""
    return run_dir / "artifacts" / f"{key}.pt"


def _summary(run: Run, units: list[Unit]) -> dict[str, Any]:
    """Return the artifact of the first fresh seed that worked, and the test score over all of them."""
    rows = [row for unit in units if (row := run.ledger.row(unit.key)) is not None and row.status == "done"]
    values = [value for row in rows for value in row.result["per_seed"]]
    return {
        "artifact": str(artifact_path(run.folder, rows[0].key)) if rows else None,
        "scores": {
            "test_accuracy_mean": statistics.fmean(values) if values else None,
            "test_accuracy_std": statistics.stdev(values) if len(values) > 1 else None,
            "test_num_networks": len(values),
        },
    }
