"""Out of memory on a device, and a CUDA context that stays broken."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddray.errors import DeviceError, DeviceMemoryError
from ddray.runs import recovery
from ddray.runs.executor import LocalExecutor, Task
from ddray.runs.recovery import recovering
from ddray.system.memory import memory_budget

FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which "
    "1.19 GiB is free. Process 7 has 14.5 GiB memory in use. Of the allocated memory 13.9 GiB"
)
ASSERT = "CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done for want of memory, in order."""
    done: list[str] = []
    monkeypatch.setattr(recovery, "release_cached_memory", lambda: done.append("release"))

    def halved() -> AbstractContextManager[None]:
        done.append("shrink")
        return nullcontext()

    monkeypatch.setattr(recovery, "halved_budget", halved)
    return done


def fails(*errors: Exception) -> Callable[[], str]:
    """Return a function that raises these, call by call, and then works."""
    left = list(errors)

    def function() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return function


def out_of_memory() -> Exception:
    error: Exception = torch.OutOfMemoryError(FULL)
    return error


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_memory_is_freed_and_the_budget_halved_before_the_second_try(
    shrunk: list[str], error: Exception
) -> None:
    assert recovering(fails(error)) == "done"
    assert shrunk == ["release", "shrink"]


def test_a_second_time_it_fails_with_the_figures(shrunk: list[str]) -> None:
    with pytest.raises(
        DeviceMemoryError, match=r"out of memory: asked for 2\.50 GiB, 1\.19 GiB of 15\.77 GiB free"
    ) as caught:
        recovering(fails(out_of_memory(), out_of_memory()))
    assert os.uname().nodename in str(caught.value)
    assert shrunk == ["release", "shrink", "release"], "the budget is halved once"


def test_only_the_second_try_has_half_the_budget() -> None:
    cpu, seen = torch.device("cpu"), list[int]()
    whole = memory_budget(cpu)

    def unit() -> None:
        seen.append(memory_budget(cpu))
        if len(seen) == 1:
            raise out_of_memory()

    recovering(unit)
    recovering(unit)
    assert seen == [whole, whole // 2, whole], "a later unit gives the bytes of a fresh process"


def test_the_first_tries_tensors_are_gone_when_the_second_begins() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def needs_memory() -> bool:
        if seen:
            return seen[0]() is None
        big = torch.zeros(8)
        seen.append(weakref.ref(big))
        raise out_of_memory()

    gc.disable()
    try:
        assert recovering(needs_memory)
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("shapes differ")])
def test_other_errors_pass(shrunk: list[str], error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        recovering(fails(error))
    assert not shrunk


@pytest.fixture
def broken_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA context that answers until its list holds an error."""
    sticky: list[str] = []

    def synchronize() -> None:
        if sticky:
            raise RuntimeError(sticky[0])

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return sticky


def test_a_broken_context_is_told_from_an_error_of_the_unit(broken_device: list[str]) -> None:
    with pytest.raises(RuntimeError, match="device-side") as caught:
        recovering(fails(RuntimeError(ASSERT)))
    assert not isinstance(caught.value, DeviceError)

    broken_device.append(ASSERT)
    with pytest.raises(DeviceError, match="can't use its GPU any more: CUDA error: device-side assert"):
        recovering(fails(RuntimeError(ASSERT)))


class TestLocally:
    def run(self, *functions: Callable[[], Any]) -> dict[str, Any]:
        tasks = [Task(str(index), function, ()) for index, function in enumerate(functions)]
        with LocalExecutor().workers() as pool:
            return {
                outcome.key: (outcome.value, outcome.error, outcome.attempts) for outcome in pool.run(tasks)
            }

    def test_no_other_worker_has_more_memory(self, shrunk: list[str]) -> None:
        outcomes = self.run(fails(*(out_of_memory() for _ in range(2))), fails(out_of_memory()))
        value, error, attempts = outcomes["0"]
        assert (value, type(error), attempts) == (None, DeviceMemoryError, 1)
        assert outcomes["1"] == ("done", None, 1)
        assert shrunk == ["release", "shrink", "release", "release", "shrink"]

    def test_a_broken_context_ends_the_run(self, broken_device: list[str]) -> None:
        broken_device.append(ASSERT)
        with pytest.raises(DeviceError, match="device-side assert"):
            self.run(fails(RuntimeError(ASSERT)), fails())

    def test_what_a_failed_task_held_is_gone_when_the_next_begins(self) -> None:
        holder = SimpleNamespace(ref=None)

        def crashes() -> None:
            big = torch.zeros(8)
            holder.ref = weakref.ref(big)
            raise OSError("disk")

        assert self.run(crashes, lambda: holder.ref() is None)["1"][0] is True


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_worker_whose_device_failed_is_replaced(tmp_path: Any) -> None:
    from ddray.cluster.executor import RayExecutor

    log = tmp_path / "pids"

    def fails_on_its_device(times: int) -> int:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(log.read_text().split()) <= times:
            raise torch.OutOfMemoryError(FULL)
        return os.getpid()

    with RayExecutor(cpus=0.1, gpus=0, max_workers=1).workers() as workers:
        (first,) = workers.run([Task("a", os.getpid, ())])
        (outcome,) = workers.run([Task("b", fails_on_its_device, (2,))])
        (last,) = workers.run([Task("c", fails_on_its_device, (99,))])
    pids = [int(line) for line in log.read_text().split()]
    assert outcome.attempts == 2
    assert pids[:2] == [first.value] * 2, "twice in the same worker"
    assert pids[2] == outcome.value != first.value, "then in another one"
    assert (last.attempts, len(pids), len(set(pids[3:]))) == (3, 9, 3)
    assert isinstance(last.error, DeviceMemoryError)
    assert "asked for 2.50 GiB, 1.19 GiB of 15.77 GiB free" in str(last.error)
