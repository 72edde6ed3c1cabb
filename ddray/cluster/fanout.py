"""Fan-out of tasks over long-lived Ray actors; a crashed worker is replaced and its task tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ddray.cluster.runtime import quiet_workers, set_threads
from ddray.errors import DivergedError, InputError, StorageError

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        key: the task's key.
        value: what the function returned; None if it failed.
        error: why it failed; None if it did not.
        attempts: how often it was tried.
    """

    key: str
    value: Any
    error: Exception | None
    attempts: int


@ray.remote(max_restarts=0)
class _Worker:
    """Runs tasks one after another; torch is imported once."""

    def __init__(self, cpus: float) -> None:
        quiet_workers()
        set_threads(cpus)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function."""
        return function(*arguments)


def fan_out(
    tasks: Sequence[Task], *, num_workers: int, cpus: float, gpus: float, max_attempts: int = 3
) -> Iterator[Outcome]:
    """Run tasks on up to `num_workers` actors; yield outcomes as they come.

    A diverged run, bad input or a full disk is final; a crash, a killed worker or lack of memory is tried
    again.

    Args:
        tasks: what to run, in order of start.
        num_workers: actors at a time.
        cpus: cores of each.
        gpus: GPUs of each.
        max_attempts: tries of one task.
    """
    waiting = [(task, 1) for task in tasks]
    running: dict[Any, tuple[Task, int, Any]] = {}
    idle: list[Any] = []
    while waiting or running:
        while waiting and len(running) < num_workers:
            task, attempt = waiting.pop(0)
            actor = idle.pop() if idle else _Worker.options(num_cpus=cpus, num_gpus=gpus).remote(cpus)  # type: ignore[attr-defined]
            running[actor.run.remote(task.function, *task.arguments)] = (task, attempt, actor)
        ready, _ = ray.wait(list(running), num_returns=1)
        task, attempt, actor = running.pop(ready[0])
        try:
            value = ray.get(ready[0])
        except Exception as error:  # whatever the task raised, or Ray's word that its worker died
            cause = getattr(error, "cause", None)
            reason = cause if isinstance(cause, Exception) else error
            if not isinstance(error, ray.exceptions.RayActorError):
                idle.append(actor)
            if not isinstance(reason, _FINAL) and attempt < max_attempts:
                log.warning(
                    "task %s failed (%s): trying again", task.key[:12], " ".join(str(reason).split())[:120]
                )
                waiting.append((task, attempt + 1))
                continue
            yield Outcome(task.key, None, reason, attempt)
        else:
            idle.append(actor)
            yield Outcome(task.key, value, None, attempt)
