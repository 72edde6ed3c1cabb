"""A search's pool: the networks its method declares are trained before the first trial, then served."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ddray.cluster.pool import PoolAddress, pool_service
from ddray.errors import DdrayError, one_line
from ddray.pool.files import DamagedEntryError, PoolFiles
from ddray.pool.spec import PoolSpec
from ddray.runs.executor import Executor, Task
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
    with progress("training the pool", len(specs)) as show, executor.workers() as workers:
        shared = workers.share(payload)
        tasks = [Task(spec.key, train_member, (job, shared, spec)) for spec in specs]
        for done, outcome in enumerate(workers.run(tasks), start=1):
            if isinstance(outcome.error, DdrayError):
                raise outcome.error
            if outcome.error is not None:
                raise DdrayError(
                    f"pool network {outcome.key[:12]} failed {outcome.attempts} times: "
                    f"{one_line(outcome.error, 200)}; run again with --resume"
                )
            show(done, "")
