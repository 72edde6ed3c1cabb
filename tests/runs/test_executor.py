"""One contract for both executors: retries, final errors, tasks that follow, shared values."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddray.errors import DivergedError, InputError, StorageError
from ddray.runs.executor import LocalExecutor, Outcome, Task, WorkerPool
from ddray.system.progress import progress, read_reports


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def workers(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    if request.param == "local":
        with LocalExecutor().workers() as pool:
            yield pool
        return
    request.getfixturevalue("ray_here")
    from ddray.cluster.executor import RayExecutor

    with RayExecutor(cpus=0.1, gpus=0, max_workers=2).workers() as pool:
        yield pool


def calls(folder: Path, name: str) -> int:
    """Count this call in a file, and return the number of calls so far."""
    path = folder / name
    with path.open("a") as file:
        file.write("x")
    return len(path.read_text())


def fails(folder: Path, name: str, times: int, error: Exception) -> str:
    if calls(folder, name) <= times:
        raise error
    return name


def works(folder: Path) -> str:
    """Move a row, and return what the driver can read of it meanwhile."""
    with progress("dm on digits", 90) as show:
        show(12, "loss 0.5")
        return " ".join(
            f"{key[:1]}: {row.title} {row.counted()}" for key, row in read_reports(folder).items()
        )


def test_what_a_worker_does_is_read_from_its_report_while_it_runs(
    workers: WorkerPool, tmp_path: Path
) -> None:
    folder = tmp_path / "progress"
    with progress("bench", 1, watch=folder):
        (outcome,) = workers.run([Task("a" * 64, works, (folder,))])
        assert read_reports(folder) == {}
    # This process's own work is a row of its drawing.
    assert outcome.value == ("" if isinstance(workers, LocalExecutor) else "a: dm on digits 12/90")
    assert not folder.exists()
    (outcome,) = workers.run([Task("b" * 64, works, (folder,))])
    assert outcome.value == ""  # nobody would look


def test_a_report_that_can_not_be_removed_fails_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"{path} can't be removed")

    with LocalExecutor().workers() as workers, progress("bench", 1, watch=tmp_path / "progress"):
        monkeypatch.setattr(Path, "unlink", refuse)
        (outcome,) = workers.run([Task("a" * 64, works, (tmp_path,))])
        monkeypatch.undo()
    assert (outcome.value, outcome.error) == ("", None)


@pytest.mark.parametrize(("times", "attempts", "ends_well"), [(0, 1, True), (2, 3, True), (3, 3, False)])
def test_a_crash_is_tried_three_times(
    workers: WorkerPool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    times: int,
    attempts: int,
    ends_well: bool,
) -> None:
    starts: list[tuple[str, int]] = []
    task = Task("a" * 64, fails, (tmp_path, "a", times, MemoryError("no\nmemory")), "unit a")
    with caplog.at_level(logging.WARNING, logger="ddray"):
        (outcome,) = workers.run([task], on_start=lambda key, attempt: starts.append((key, attempt)))
    assert (outcome.key, outcome.attempts, outcome.error is None) == (task.key, attempts, ends_well)
    assert outcome.value == ("a" if ends_well else None)
    assert starts == [(task.key, attempt) for attempt in range(1, attempts + 1)]
    assert caplog.messages.count("unit a failed (no memory): trying again") == attempts - 1
    if not ends_well:
        assert isinstance(outcome.error, MemoryError)


@pytest.mark.parametrize("error", [DivergedError("nan"), InputError("bad"), StorageError("full")])
def test_what_another_try_cannot_help_is_final(workers: WorkerPool, tmp_path: Path, error: Exception) -> None:
    (outcome,) = workers.run([Task("a", fails, (tmp_path, "a", 9, error))])
    assert type(outcome.error) is type(error)
    assert str(outcome.error) == str(error)
    assert outcome.attempts == 1


def test_outcomes_bring_further_tasks(workers: WorkerPool) -> None:
    seen: list[str] = []

    def follow(outcome: Outcome) -> list[Task]:
        seen.append(outcome.key)
        node = int(outcome.key)
        return [Task(str(2 * node + k), pow, (node, 2)) for k in (0, 1)] if node < 8 else []

    outcomes = []
    for outcome in workers.run([Task("1", pow, (0, 2))], follow=follow):
        assert outcome.key in seen, "followed before it is yielded"
        outcomes.append(outcome)
    assert Counter(outcome.key for outcome in outcomes) == Counter(str(node) for node in range(1, 16))
    assert {outcome.value for outcome in outcomes} == {node**2 for node in range(8)}


def test_a_shared_value_reaches_every_task(workers: WorkerPool) -> None:
    shared = workers.share({"a": 1, "b": 2})
    tasks = [Task(name, dict.get, (shared, name)) for name in ("a", "b")]
    assert {outcome.key: outcome.value for outcome in workers.run(tasks)} == {"a": 1, "b": 2}
    assert list(workers.run([])) == []


def test_an_interrupt_is_no_outcome() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with LocalExecutor().workers() as pool, pytest.raises(KeyboardInterrupt):
        list(pool.run([Task("a", interrupted, ())]))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_workers_that_never_fit_are_refused() -> None:
    from ddray.cluster.executor import RayExecutor

    executor = RayExecutor(cpus=10_000, gpus=0, per="unit")
    with pytest.raises(InputError, match=r"--cpus-per-unit must be <= .*got 10000"), executor.workers():
        pass


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_capacity_is_bounded_by_the_limit() -> None:
    from ddray.cluster.executor import RayExecutor

    assert RayExecutor(cpus=0.1, gpus=0, max_workers=1).capacity() == 1
    assert RayExecutor(cpus=0.1, gpus=0).capacity() > 1
