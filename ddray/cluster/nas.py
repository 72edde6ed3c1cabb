"""NAS sweeps on long-lived Ray Core actors: one per CPU core, GPU or fraction of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ddray.cluster.runtime import check_capacity, ray_runtime, sigterm_as_sigint
from ddray.ranking.sweep import MAX_ATTEMPTS, NasOptions, patience
from ddray.ranking.worker import NasTask, SweepData, SweepJob, run_task
from ddray.system.worker import worker_device


@dataclass(frozen=True)
class RayExecutor:
    """Runs a sweep's tasks on a cluster; the object store sends the data once to each node.

    Attributes:
        options: address, resources, timeout.
    """

    options: NasOptions

    def __call__(
        self, job: SweepJob, data: SweepData, tasks: Sequence[NasTask], on_start: Callable[[str, int], None]
    ) -> Iterator[tuple[str, Exception | None, int]]:
        """Yield (task's key, exception or None, attempts) as tasks end.

        Raises:
            InputError: no worker of this size fits the cluster, or no cluster answers.
        """
        with sigterm_as_sigint(), ray_runtime(self.options.address):
            import ray

            from ddray.cluster.fanout import Task, fan_out

            fits = check_capacity(job.cpus, job.gpus, per="worker")
            data_ref = ray.put(data)
            cluster_tasks = [Task(task.key, in_worker, (job, data_ref, task)) for task in tasks]
            for outcome in fan_out(
                cluster_tasks,
                num_workers=min(fits, self.options.num_workers or fits, len(cluster_tasks)),
                cpus=job.cpus,
                gpus=job.gpus,
                max_attempts=MAX_ATTEMPTS,
                timeout_s=patience(self.options, tasks),
                on_start=on_start,
            ):
                yield outcome.key, outcome.error, outcome.attempts


def in_worker(job: SweepJob, data: SweepData, task: NasTask) -> None:
    """Run one task on the worker's device."""
    run_task(job, data, task, torch.device(worker_device(job.gpus)))
