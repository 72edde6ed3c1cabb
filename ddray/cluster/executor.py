"""Tasks on long-lived Ray actors; a crashed worker is replaced and its task tried again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.cluster.runtime import check_capacity, check_temporary_folder, ray_runtime, sigterm_as_sigint
from ddray.errors import DeviceError, DeviceMissingError, InputError
from ddray.runs.executor import Executor, LocalExecutor, Outcome, Task, WorkerPool
from ddray.runs.recovery import recovering
from ddray.system.progress import report_of, reported_to
from ddray.system.worker import prepare_worker, set_threads

if TYPE_CHECKING:
    from ddray.jobs.options import ShardOptions
    from ddray.ranking.options import NasOptions
    from ddray.tables.options import BenchOptions

log = logging.getLogger(__name__)
_LOOK_S = 5.0  # between checks for hung tasks, and for workers that wait for cores
_CAPACITY_S = 1.0  # for which the number of workers that fit is not asked again


@dataclass(frozen=True)
class RayExecutor:
    """Runs tasks on as many workers as the current nodes can hold; Ray starts with the workers."""

    cpus: float  # cores of a worker
    gpus: float  # GPUs of a worker
    max_workers: int | None = None  # at a time; None for as many as fit
    address: str | None = None  # the cluster's; None starts a local one
    per: str = "trial"  # what the command's options call a worker: `--cpus-per-<per>`

    def __post_init__(self) -> None:
        if self.address is None:
            check_temporary_folder()  # before the command makes a run folder

    @contextmanager
    def workers(self) -> Iterator[WorkerPool]:
        """Start Ray if need be, and end the workers with the context.

        InputError if no worker of this size fits the cluster, or no cluster answers.
        """
        with sigterm_as_sigint(), ray_runtime(self.address):
            self.capacity()
            pool = RayWorkers(self)
            try:
                yield pool
            finally:
                pool.end()

    def capacity(self, without: Collection[str] = ()) -> int:
        """Return how many workers fit now, `without` some nodes; InputError if not even one does."""
        fits = check_capacity(self.cpus, self.gpus, per=self.per, without=without)
        return min(fits, self.max_workers or fits)


def bench_executor(options: BenchOptions) -> Executor:
    """Return the executor of a bench."""
    if options.executor == "local":
        return LocalExecutor()
    return RayExecutor(options.cpus_per_unit, options.gpus, options.max_concurrent, options.address, "unit")


def nas_executor(options: NasOptions) -> Executor:
    """Return the executor of a NAS sweep."""
    if options.executor == "local":
        return LocalExecutor()
    return RayExecutor(options.cpus_per_worker, options.gpus, options.num_workers, options.address, "worker")


def shard_executor(options: ShardOptions) -> Executor:
    """Return the executor of a sharded distillation."""
    if options.executor == "local":
        return LocalExecutor()
    return RayExecutor(options.cpus_per_shard, options.gpus, options.max_concurrent, options.address, "shard")


class _Worker:
    """Runs tasks one after another; torch is imported once."""

    def __init__(self, cpus: float) -> None:
        prepare_worker()
        set_threads(cpus)

    def awake(self) -> str:
        """Return the id of this process's node, once it has started."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, report: Path | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function; once more if memory runs out. What it does is reported to a file."""
        with reported_to(report):
            return recovering(function, *arguments)


@dataclass
class _Running:
    """A task in a worker; `since` is when the worker was first seen to be running."""

    task: Task
    attempt: int
    actor: Any
    awake: Any
    since: float | None = None

    def seconds(self) -> float:
        """Return how long the task has run, 0 while its worker starts."""
        import ray

        if self.since is None and ray.wait([self.awake], timeout=0)[0]:
            self.since = time.monotonic()
        return 0.0 if self.since is None else time.monotonic() - self.since


@dataclass
class RayWorkers(WorkerPool):
    """The workers of a `RayExecutor`; idle ones serve later calls."""

    executor: RayExecutor
    _idle: list[Any] = field(default_factory=list)
    _running: dict[Any, _Running] = field(default_factory=dict)
    _left_out: set[str] = field(default_factory=set)  # ids of nodes whose GPUs can't be used
    _limit: int = 1
    _checked: float = -_CAPACITY_S

    def share(self, value: Any) -> Any:
        """Return a reference to the value in the object store."""
        import ray

        return ray.put(value)

    def end(self) -> None:
        """Kill the workers."""
        self._idle += (entry.actor for entry in self._running.values())
        self._kill_idle()
        self._running.clear()

    def _kill_idle(self) -> None:
        import ray

        for actor in self._idle:
            ray.kill(actor)
        self._idle.clear()

    def limit(self) -> int:
        """Return how many workers may run now; nodes may have died or joined since the last check."""
        if time.monotonic() - self._checked >= _CAPACITY_S:
            try:
                self._limit = self.executor.capacity(self._left_out)
            except InputError:  # no node fits a worker any more: tasks wait for a new one
                self._limit = 1
            self._checked = time.monotonic()
        return self._limit

    def _start(self, task: Task, attempt: int) -> None:
        """Hand a task to an idle worker, or to a new one."""
        import ray

        if self._idle:
            actor = self._idle.pop()
        else:
            cpus, gpus = self.executor.cpus, self.executor.gpus
            options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
            if self._left_out:
                options["label_selector"] = {"ray.io/node-id": f"!in({', '.join(sorted(self._left_out))})"}
            actor_class: Any = ray.remote(**options)(_Worker)
            actor = actor_class.remote(cpus)
        awake = actor.awake.remote()  # before the task: process start-up is not part of its time
        reference = actor.run.remote(report_of(task.key), task.function, *task.arguments)
        self._running[reference] = _Running(task, attempt, actor, awake)

    def _next(self, timeout_s: float | None) -> tuple[Task, Outcome] | None:
        """Wait some seconds for a task to end; one that has run too long is ended."""
        import ray

        wait_s = _LOOK_S
        if timeout_s is not None:
            longest = max(entry.seconds() for entry in self._running.values())
            wait_s = min(_LOOK_S, max(0.1, timeout_s - longest))
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=wait_s)
        if not ready:
            self._kill_idle()  # a node that died took cores with it: a new worker may be waiting for theirs
            ready = [max(self._running, key=lambda reference: self._running[reference].seconds())]
            if timeout_s is None or self._running[ready[0]].seconds() < timeout_s:
                return None
        entry = self._running.pop(ready[0])
        value, error = self._result(ready[0], entry.actor, timeout_s)
        if isinstance(error, DeviceMissingError):
            self._leave_out(ray.get(entry.awake), error)
        return entry.task, Outcome(entry.task.key, value, error, entry.attempt)

    def _leave_out(self, node: str, error: DeviceMissingError) -> None:
        """Start no more workers on a node: it would fail one task after another, faster than others work.

        Raises the error if no other node can hold a worker.
        """
        self._left_out.add(node)
        try:
            self._limit = self.executor.capacity(self._left_out)
        except InputError:
            raise error from None
        log.warning("%s; its node gets no more work", error)

    def _result(self, reference: Any, actor: Any, timeout_s: float | None) -> tuple[Any, Exception | None]:
        """Return (value, None) or (None, why it failed); a surviving worker becomes idle."""
        import ray

        if not ray.wait([reference], timeout=0)[0]:
            ray.kill(actor)
            return None, TimeoutError(f"no result within {timeout_s:g} s")
        try:
            value = ray.get(reference)
        except Exception as error:  # what the task raised, or Ray's error that its worker died
            cause = getattr(error, "cause", None)
            failure = cause if isinstance(cause, Exception) else error
            if isinstance(error, ray.exceptions.RayActorError):
                self._idle.clear()  # they may have died with the same node; each would cost a task an attempt
            elif isinstance(failure, DeviceError):
                ray.kill(actor)  # a broken CUDA context stays broken, fragmented memory fragmented
            else:
                self._idle.append(actor)
            return None, failure
        self._idle.append(actor)
        return value, None
