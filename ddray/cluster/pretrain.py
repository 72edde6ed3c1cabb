"""Pool networks that are trained side by side, each on a worker: a search's, and the experts of a command.

The networks that a search's method declares are trained before its first trial, then served.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddray.cluster.executor import RayExecutor
from ddray.cluster.pool import PoolAddress, pool_service
from ddray.cluster.resources import with_gpus
from ddray.data import Dataset
from ddray.errors import DdrayError, one_line
from ddray.jobs.options import PoolOptions
from ddray.jobs.pool_training import EntryJob, PoolResult, expert_specs, train_entry
from ddray.pool.files import DamagedEntryError, PoolFiles
from ddray.pool.spec import PoolSpec
from ddray.runs.executor import Executor, Task, WorkerPool
from ddray.system.files import home
from ddray.system.progress import progress
from ddray.tuning.payload import Payload
from ddray.tuning.worker import SearchJob, train_member

log = logging.getLogger(__name__)


@contextmanager
def shared_pool(
    job: SearchJob, payload: Payload, specs: Sequence[PoolSpec], executor: Executor
) -> Iterator[SearchJob]:
    """Serve a pool to the workers while the block runs; yield the job with the service's address.

    `specs`, networks that are certain to be needed, are trained first, with a DdrayError if one can't be.
    Without any there is no service: workers that still need a network share the files.
    """
    if not specs:
        yield job
        return
    folder = home() / "pool"
    name = hashlib.sha256(f"{job.run_dir} {job.epoch}".encode()).hexdigest()[:16]
    address = PoolAddress(f"ddray-pool-{name}", str(folder))
    with pool_service(address):
        served = replace(job, pool=address)
        if missing := [spec for spec in specs if not _is_intact(PoolFiles(folder), spec.key)]:
            _train(served, payload, missing, executor)
        yield served


def _is_intact(files: PoolFiles, key: str) -> bool:
    """Return whether an entry is intact; a damaged one is set aside here, so that the driver logs it."""
    try:
        return files.read(key) is not None
    except DamagedEntryError:
        if (lock := files.try_lock(key)) is None:
            return False
        with lock:
            return files.mend(key, lock) is not None


def _train(job: SearchJob, payload: Payload, specs: Sequence[PoolSpec], executor: Executor) -> None:
    """Train networks in parallel."""
    log.info("pool: training %d networks (%s)", len(specs), specs[0].arch)
    with executor.workers() as workers:
        shared = workers.share(payload)
        tasks = [Task(spec.key, train_member, (job, shared, spec)) for spec in specs]
        _finish(workers, tasks, "run again with --resume", Path(job.run_dir) / "progress")


def _finish(workers: WorkerPool, tasks: Sequence[Task], fix: str, reports: Path) -> None:
    """Run tasks that train a network each; the first that can't be trained ends them all.

    Workers report what they do to the folder `reports`.
    """
    with progress("pool", len(tasks), watch=reports) as show:
        for done, outcome in enumerate(workers.run(tasks), start=1):
            if isinstance(outcome.error, DdrayError):
                raise outcome.error
            if outcome.error is not None:
                raise DdrayError(
                    f"pool network {outcome.key[:12]} failed {outcome.attempts} times: "
                    f"{one_line(outcome.error, 200)}; {fix}"
                )
            show(done, "networks trained")


def train_experts(dataset: Dataset, options: PoolOptions, recipe: Mapping[str, Any]) -> PoolResult:
    """Train missing experts' trajectories, `options.num_workers` at a time, each on a worker.

    The entries are those of `jobs.pool_training.train_experts`. Those that are trained stay if one fails.

    Raises:
        InputError: as there; no worker fits the cluster.
        DivergedError: a loss is not finite.
        StorageError: an entry can't be written.
        DdrayError: a worker failed again and again.
    """
    options = with_gpus(options)
    device, folder = "cuda" if options.gpus else "cpu", options.out or home() / "pool"
    specs = expert_specs(
        dataset,
        arch=options.arch or "auto",
        recipe=recipe,
        seed=options.seed or 0,
        num_models=1 if options.num_models is None else options.num_models,
        device=device,
    )
    if missing := [spec for spec in specs if not _is_intact(PoolFiles(folder), spec.key)]:
        job = EntryJob(dataset.name, {"data_dir": options.data_dir}, folder, device)
        executor = RayExecutor(options.cpus, options.gpus, options.num_workers, options.address, "worker")
        log.info("pool: training %d experts (%s)", len(missing), missing[0].arch)
        with executor.workers() as workers:
            tasks = [Task(spec.key, train_entry, (job, spec.dump())) for spec in missing]
            _finish(workers, tasks, "run the command again, which continues", folder / "progress")
    keys = [spec.key for spec in specs]
    return PoolResult(key=keys[0], folder=str(folder / keys[0]), keys=keys)
