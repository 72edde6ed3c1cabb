"""Fan-out of tasks over long-lived Ray actors; a crashed worker is replaced and its task tried again."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ddray.errors import DivergedError, InputError, StorageError
from ddray.runs.outcome import Outcome
from ddray.system.worker import prepare_worker, set_threads

log = logging.getLogger(__name__)

_LOOK_S = 5.0  # between checks for hung tasks, and for workers that wait for cores
_FINAL = (DivergedError, InputError, StorageError)


@dataclass(frozen=True)
class Task:
    """One call in a worker.

    Attributes:
        key: names the task in results and messages.
        function: a module-level function.
        arguments: its arguments; object references are resolved in the worker.
    """

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@ray.remote(max_restarts=0)
class _Worker:
    """Runs tasks one after another; torch is imported once."""

    def __init__(self, cpus: float) -> None:
        prepare_worker()
        set_threads(cpus)

    def awake(self) -> None:
        """Return once the process has started."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function."""
        return function(*arguments)


def fan_out(
    tasks: Sequence[Task],
    *,
    num_workers: int | Callable[[], int],
    cpus: float,
    gpus: float,
    max_attempts: int = 3,
    timeout_s: float | None = None,
    on_start: Callable[[str, int], None] | None = None,
    follow: Callable[[Outcome], Sequence[Task]] | None = None,
    idle: list[Any] | None = None,
) -> Iterator[Outcome]:
    """Run tasks on up to `num_workers` actors; yield outcomes as they come.

    A diverged run, bad input or a full disk is final; a crash, a killed worker, lack of memory or a task that
    hangs is tried again.

    Args:
        tasks: what to run, in order of start.
        num_workers: actors at a time; a function is called before every start, since nodes come and go.
        cpus: cores of each.
        gpus: GPUs of each.
        max_attempts: tries of one task.
        timeout_s: seconds after which a task counts as hung and its worker is killed; None waits forever.
        on_start: called with (key, attempt) when a task is handed to a worker.
        follow: called with every outcome before it is yielded; returns the tasks that it unblocks.
        idle: workers of an earlier call with the same cores and GPUs, to reuse; this call adds its own.
    """
    waiting = deque((task, 1) for task in tasks)
    running: dict[Any, _Running] = {}
    idle = [] if idle is None else idle
    while waiting or running:
        limit = num_workers() if callable(num_workers) else num_workers
        while waiting and len(running) < limit:
            task, attempt = waiting.popleft()
            actor = idle.pop() if idle else _Worker.options(num_cpus=cpus, num_gpus=gpus).remote(cpus)  # type: ignore[attr-defined]
            if on_start is not None:
                on_start(task.key, attempt)
            awake = actor.awake.remote()  # before the task: process start-up is not part of its time
            running[actor.run.remote(task.function, *task.arguments)] = _Running(task, attempt, actor, awake)
        if (done := _next(running, idle, timeout_s)) is None:
            continue  # nodes may have joined
        entry = running.pop(done)
        value, error = _result(done, entry, idle, timeout_s)
        if error is not None and not isinstance(error, _FINAL) and entry.attempt < max_attempts:
            log.warning("task %s failed (%s): trying again", entry.task.key[:12], _short(error))
            waiting.append((entry.task, entry.attempt + 1))
            continue
        outcome = Outcome(entry.task.key, value, error, entry.attempt)
        if follow is not None:
            waiting.extend((task, 1) for task in follow(outcome))
        yield outcome


def _short(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())[:120]


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
        if self.since is None:
            if not ray.wait([self.awake], timeout=0)[0]:
                return 0.0
            self.since = time.monotonic()
        return time.monotonic() - self.since


def _next(running: dict[Any, _Running], idle: list[Any], timeout_s: float | None) -> Any | None:
    """Return the reference of a task that has ended or run too long; None if none has in some seconds."""
    wait_s = _LOOK_S
    if timeout_s is not None:
        longest = max(entry.seconds() for entry in running.values())
        wait_s = min(_LOOK_S, max(0.1, timeout_s - longest))
    ready, _ = ray.wait(list(running), num_returns=1, timeout=wait_s)
    if ready:
        return ready[0]
    # A node that died took cores with it: a new worker may be waiting for an idle one's.
    for actor in idle:
        ray.kill(actor)
    idle.clear()
    late = max(running, key=lambda reference: running[reference].seconds())
    return late if timeout_s is not None and running[late].seconds() >= timeout_s else None


def _result(
    reference: Any, entry: _Running, idle: list[Any], timeout_s: float | None
) -> tuple[Any, Exception | None]:
    """Return (value, None) or (None, why it failed); a surviving worker becomes idle."""
    ready, _ = ray.wait([reference], timeout=0)
    if not ready:
        ray.kill(entry.actor)
        return None, TimeoutError(f"no result within {timeout_s:g} s")
    try:
        value = ray.get(reference)
    except Exception as error:  # what the task raised, or Ray's error that its worker died
        if isinstance(error, ray.exceptions.RayActorError):
            idle.clear()  # they may have died with the same node; each would cost a task an attempt
        else:
            idle.append(entry.actor)
        cause = getattr(error, "cause", None)
        return None, cause if isinstance(cause, Exception) else error
    idle.append(entry.actor)
    return value, None
