"""Running tasks: in this process, or on a cluster (`ddray/cluster/executor.py`); both retry alike."""

import logging
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ddray.errors import DeviceError, DeviceMemoryError, DivergedError, InputError, StorageError, one_line
from ddray.runs.recovery import recovering
from ddray.system.progress import remove_report, report_of

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
_FINAL = (DivergedError, InputError, StorageError)


@dataclass(frozen=True)
class Outcome:
    """How a task ended: what its function returned, or why it failed, and how often it was tried."""

    key: str
    value: Any
    error: Exception | None
    attempts: int


@dataclass(frozen=True)
class Task:
    """One function call.

    Attributes:
        key: names the task in outcomes.
        function: a module-level function.
        arguments: its arguments; what `WorkerPool.share` returned is resolved in the worker.
        title: names the task in messages; default the start of the key.
    """

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    title: str = ""

    def is_tried_again(self, attempt: int, error: Exception) -> bool:
        """Return whether to try again, and log it: a diverged run, bad input or a full disk is final.

        A crash, a killed worker, a device that fails or a task that hangs is tried three times in all.
        """
        if attempt >= MAX_ATTEMPTS or isinstance(error, _FINAL):
            return False
        log.warning("%s failed (%s): trying again", self.title or self.key[:12], one_line(error, 120))
        return True


class WorkerPool(ABC):
    """Workers that are ready for tasks."""

    _running: Collection[Any]

    def is_tried_again(self, task: Task, outcome: Outcome) -> bool:
        """Return whether a task that ended so is tried again, and log it."""
        return outcome.error is not None and task.is_tried_again(outcome.attempts, outcome.error)

    @abstractmethod
    def share(self, value: Any) -> Any:
        """Return what stands for `value` among the arguments of tasks: it reaches each node once."""

    @abstractmethod
    def limit(self) -> int:
        """Return how many tasks may run now."""

    @abstractmethod
    def _start(self, task: Task, attempt: int) -> None:
        """Add a task to the running ones."""

    @abstractmethod
    def _next(self, timeout_s: float | None) -> tuple[Task, Outcome] | None:
        """Remove a task that has ended, or run too long, from the running ones; None if none has yet."""

    def run(
        self,
        tasks: Sequence[Task],
        *,
        timeout_s: float | None = None,
        on_start: Callable[[str, int], None] | None = None,
        follow: Callable[[Outcome], Sequence[Task]] | None = None,
    ) -> Iterator[Outcome]:
        """Run tasks; yield their outcomes as they come.

        Args:
            tasks: what to run, in order of start.
            timeout_s: seconds after which a task counts as hung and its worker is killed; None waits forever,
                as this process does for its own tasks.
            on_start: called with (key, attempt) when a task starts.
            follow: called with every outcome before it is yielded; returns the tasks that it unblocks.
        """
        waiting = deque((task, 1) for task in tasks)
        while waiting or self._running:
            while waiting and len(self._running) < self.limit():
                task, attempt = waiting.popleft()
                if on_start is not None:
                    on_start(task.key, attempt)
                self._start(task, attempt)
            if (ended := self._next(timeout_s)) is None:
                continue  # nodes may have joined
            task, outcome = ended
            if (report := report_of(task.key)) is not None:
                remove_report(report)  # of a worker that was killed
            if self.is_tried_again(task, outcome):
                waiting.append((task, outcome.attempts + 1))
                continue
            if follow is not None:
                waiting.extend((task, 1) for task in follow(outcome))
            yield outcome


class Executor(Protocol):
    """Where tasks are run."""

    def workers(self) -> AbstractContextManager[WorkerPool]:
        """Return a context in which workers run tasks; they end with it."""
        ...


class LocalExecutor(WorkerPool):
    """Runs tasks one after another in this process, which is its only worker.

    A DeviceError, other than for lack of memory, ends the run: no other worker could take over.
    """

    def __init__(self) -> None:
        self._running: list[tuple[Task, int]] = []

    @contextmanager
    def workers(self) -> Iterator[WorkerPool]:
        """Return a context with this process as worker."""
        yield self

    def is_tried_again(self, task: Task, outcome: Outcome) -> bool:
        """Return whether to try again: not for lack of memory, which no other worker has more of."""
        return not isinstance(outcome.error, DeviceMemoryError) and super().is_tried_again(task, outcome)

    def share(self, value: Any) -> Any:
        """Return the value."""
        return value

    def limit(self) -> int:
        """Return 1."""
        return 1

    def _start(self, task: Task, attempt: int) -> None:
        self._running.append((task, attempt))

    def _next(self, timeout_s: float | None) -> tuple[Task, Outcome]:
        task, attempt = self._running.pop()
        try:
            return task, Outcome(task.key, recovering(task.function, *task.arguments), None, attempt)
        except Exception as error:
            if isinstance(error, DeviceError) and not isinstance(error, DeviceMemoryError):
                raise
            # Its frames hold the task's tensors, which the next task has no room for.
            traceback.clear_frames(error.__traceback__)
            return task, Outcome(task.key, None, error, attempt)
