"""`ddray distill --shards` as a function: a run folder, shards on an executor, their set."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ddray.data import Split, SplitName
from ddray.distillation.method import coupling_of
from ddray.errors import DdrayError, InputError
from ddray.jobs.context import check_plan, check_size, make_distiller
from ddray.jobs.distill import DistillResult, check_out, distill_unit, finish_run, start_run
from ddray.jobs.options import DistillOptions, ShardOptions
from ddray.jobs.plan import Plan
from ddray.jobs.shard_worker import (
    ShardJob,
    drop_unsound,
    joined,
    prepare,
    run_shard,
    shard_job,
    shard_units,
    train_entry,
)
from ddray.methods import get_method
from ddray.methods.families.matching.initial import check_copies
from ddray.runs.executor import Executor, LocalExecutor, Task, WorkerPool
from ddray.runs.folder import Run
from ddray.runs.ledger import Unit, classes_of
from ddray.system.progress import Show, progress


def distill_shards(
    plan: Plan,
    how: DistillOptions,
    shards: ShardOptions,
    executor: Executor,
    *,
    device: str,
    more_steps: bool = False,
) -> DistillResult:
    """Distil contiguous classes as units of an executor, and join them to the set of the unsharded run.

    `device` is the kind of device of the workers; `how` and `more_steps` are as for `jobs.distill.distill`.
    Finished shards are not run again, others go on from their checkpoints. Pool entries are trained before
    the first shard, once.

    Raises:
        InputError: classes are not independent, as `check_shards` says, or as for `distill`.
        DivergedError: a loss became NaN.
        StorageError: a file can't be written.
        InterruptedRunError: a signal ended the run; says how to resume.
    """
    begin, num_shards = time.perf_counter(), shards.shards or 1
    if how.out is not None:
        check_out(how.out)
    make_distiller(plan)
    name = SplitName(how.val_seed, how.val_images)
    split = name.carve(plan.dataset.train())[0]
    check_shards(plan, num_shards, split)
    check_plan(plan)
    config = {**plan.describe(), "device": device, "split": str(name), "shards": num_shards}

    def units_of(plan: Plan) -> list[Unit]:
        unit = distill_unit(plan, str(name))
        return [*shard_units(unit, plan.dataset.num_classes, num_shards), unit]

    run, (*units, unit) = start_run(
        plan,
        {**config, **({"gpus_per_shard": shards.gpus} if shards.gpus else {})},
        units_of,
        run_dir=how.run_dir,
        resume=how.resume,
        more_steps=more_steps,
    )
    here = isinstance(executor, LocalExecutor)
    job = shard_job(plan, name, run, device=device, data_dir=shards.data_dir, here=here)
    _run_missing(job, run, executor, units)
    run.ledger.begin(unit, epoch=run.epoch)
    takes_steps = plan.config.steps > 0
    distillation = joined(run.ledger, units, time.perf_counter() - begin, takes_steps=takes_steps)
    return finish_run(plan, run, unit, distillation, how.out, shards=num_shards)


def check_shards(plan: Plan, num_shards: int, split: Split | None, *, option: str = "--shards") -> None:
    """Reject shards that would not give the unsharded run's bytes: the InputError says why.

    `split` is what is distilled; None, without reading it: as far as the plan says. `option` names the
    shards in messages.
    """
    num_classes, config = plan.dataset.num_classes, plan.config
    check_independent(plan, option)
    if split is not None:
        check_size(plan, split)
    if not 1 <= num_shards <= num_classes:
        name = plan.dataset.name
        raise InputError(f"{option} must be in 1..{num_classes} (the classes of {name}), got {num_shards}")
    if config.evaluate.every is not None:
        raise InputError(f"evaluate.every must be left out with {option}: sets are joined at their end")
    if config.precision == "auto":
        raise InputError(
            f"precision must be tf32, fp32 or bf16 with {option}: auto may differ between shards"
        )
    init = getattr(config.method, "init", None)
    if init is not None and split is not None:
        counts = torch.bincount(split.labels, minlength=num_classes).tolist()
        check_copies(counts, plan.ipc, init, option)


def check_independent(plan: Plan, option: str = "--shards") -> None:
    """Reject shards of a method, with its settings and network, whose classes are not independent."""
    if (reason := coupling_of(get_method(plan.method), plan.config.method, plan.arch)) is not None:
        raise InputError(
            f"{option} needs independent classes, {plan.method}'s are not: {reason}; leave it out"
        )


def _run_missing(job: ShardJob, run: Run, executor: Executor, units: Sequence[Unit]) -> None:
    """Run the shards that have no sound row."""
    missing = drop_unsound(run.ledger, units)
    if not missing:
        return
    title = f"{job.plan['method']} on {job.dataset}, shards"
    try:
        with (
            run.continued("the run"),
            progress(title, len(units), start=len(units) - len(missing), watch=run.reports) as show,
            executor.workers() as workers,
        ):
            _run_all(job, run, workers, missing, show, len(units) - len(missing))
    except InputError:
        if not run.resumed and not run.ledger.rows():
            run.discard()  # nothing was computed
        raise


def _run_all(
    job: ShardJob, run: Run, workers: WorkerPool, units: Sequence[Unit], show: Show, num_done: int
) -> None:
    """Prepare what all shards need, train what their pool lacks, then run them; the first error ends it."""
    titles = {unit.key: classes_of(unit.spec) for unit in units}
    (prepared,) = _values(workers, [Task("prepare", prepare, (job,), "preparing the shards")])
    specs = enumerate(prepared.missing)
    list(_values(workers, [Task(str(i), train_entry, (job, spec), "a pool entry") for i, spec in specs]))
    shared = workers.share(prepared)
    tasks = [Task(unit.key, run_shard, (job, shared, unit), titles[unit.key]) for unit in units]

    def on_start(key: str, attempt: int) -> None:
        run.ledger.event("start" if attempt == 1 else "retry", key, run.epoch)

    for outcome in workers.run(tasks, on_start=on_start):
        if outcome.error is not None:
            if isinstance(outcome.error, DdrayError):
                run.ledger.event("fail", outcome.key, run.epoch, error=str(outcome.error))
            raise outcome.error
        num_done += 1
        show(num_done, titles[outcome.key])


def _values(workers: WorkerPool, tasks: Sequence[Task]) -> Iterator[Any]:
    """Run tasks, and yield what they return as they end; the first error ends it."""
    for outcome in workers.run(tasks):
        if outcome.error is not None:
            raise outcome.error
        yield outcome.value
