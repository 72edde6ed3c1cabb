"""A search's pool: the networks its method declares are trained before the first trial, then served."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ddray.cluster.pool import PoolAddress, pool_service
from ddray.errors import DdrayError
from ddray.pool.files import DamagedEntryError, PoolFiles
from ddray.pool.spec import PoolSpec
from ddray.system.files import home
from ddray.system.progress import progress
from ddray.system.worker import worker_device
from ddray.tuning.payload import Payload, unpack
from ddray.tuning.trial import SearchJob, trial_pool

log = logging.getLogger(__name__)


@contextmanager
def shared_pool(
    job: SearchJob, payload: Payload, specs: Sequence[PoolSpec], num_workers: int
) -> Iterator[SearchJob]:
    """Serve a pool to the workers while the block runs; `specs` are trained first.

    Without `specs` there is no service: workers that still need a network share the files.

    Args:
        job: what the workers share.
        payload: the real images.
        specs: networks that are certain to be needed.
        num_workers: how many are trained at a time.

    Yields:
        The job, with the service's address.

    Raises:
        DdrayError: a network could not be trained.
    """
    if not specs:
        yield job
        return
    folder = home() / "pool"
    name = hashlib.sha256(f"{job.run_dir} {job.epoch}".encode()).hexdigest()[:16]
    address = PoolAddress(f"ddray-pool-{name}", str(folder))
    with pool_service(address):
        served = replace(job, pool=address)
        missing = [spec for spec in specs if not _is_intact(PoolFiles(folder), spec.key)]
        if missing:
            _train(served, payload, missing, num_workers)
        yield served


def _is_intact(files: PoolFiles, key: str) -> bool:
    """Return whether an entry is intact; a damaged one is set aside here, so that the driver logs it."""
    try:
        return files.read(key) is not None
    except DamagedEntryError:
        lock = files.try_lock(key)
        if lock is None:
            return False
        with lock:
            return files.mend(key, lock) is not None


def _train(job: SearchJob, payload: Payload, specs: Sequence[PoolSpec], num_workers: int) -> None:
    """Train networks, `num_workers` at a time."""
    import ray

    from ddray.cluster.fanout import Task, fan_out

    shared = ray.put(payload)
    tasks = [Task(spec.key, train_member, (job, shared, spec)) for spec in specs]
    workers = min(num_workers, len(tasks))
    log.info("pool: training %d networks (%s), %d at a time", len(tasks), specs[0].arch, workers)
    with progress("training the pool", len(tasks)) as show:
        outcomes = fan_out(tasks, num_workers=workers, cpus=job.cpus, gpus=job.gpus)
        for done, outcome in enumerate(outcomes, start=1):
            if isinstance(outcome.error, DdrayError):
                raise outcome.error
            if outcome.error is not None:
                reason = " ".join(str(outcome.error).split())[:200]
                raise DdrayError(
                    f"pool network {outcome.key[:12]} failed {outcome.attempts} times: {reason}; "
                    "run again with --resume"
                )
            show(done, "")


def train_member(job: SearchJob, payload: Payload, spec: PoolSpec) -> None:
    """Train one network; runs in a worker, on that worker's device."""
    unpacked = unpack(payload)
    device = torch.device(worker_device(job.gpus))
    trial_pool(job, unpacked, device).get([spec.model_copy(update={"device": device.type})])
