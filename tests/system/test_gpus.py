"""GPUs by NVML, and whether torch can use them."""

from __future__ import annotations

import ctypes
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddray.errors import DeviceMissingError
from ddray.runs.environment import environment
from ddray.system import gpus
from ddray.system.worker import cuda_failure, device_kind, worker_device

NAMES = {"0": "A", "1": "B", "GPU-7f": "C"}


class Nvml:
    """Stands in for the driver's library."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = list(NAMES).index(str(index.value)) + 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        if uuid.decode() not in NAMES:
            return 6
        handle._obj.value = list(NAMES).index(uuid.decode()) + 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, length: Any) -> int:
        name.value = list(NAMES.values())[handle.value - 1].encode()
        return 0

    def nvmlSystemGetDriverVersion(self, driver: Any, length: Any) -> int:
        driver.value = b"580.65"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, cuda: Any) -> int:
        cuda._obj.value = 13010
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with two GPUs, on which nothing may start CUDA."""

    def refuse(*_: Any) -> None:
        raise AssertionError("CUDA was started")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    return SimpleNamespace(setenv=monkeypatch.setenv, setattr=monkeypatch.setattr)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["A", "B"]), ("1,0", ["B", "A"]), ("GPU-7f, 0", ["C", "A"]), ("MIG-1,GPU-7f", ["GPU", "C"])],
)
def test_names_are_those_of_the_visible_gpus(
    machine: SimpleNamespace, visible: str | None, names: list[str]
) -> None:
    if visible is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.gpu_names() == environment()["devices"] == names
    assert gpus.driver_versions() == ("580.65", "13.1")


def test_without_nvml_there_are_no_names(machine: SimpleNamespace) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    machine.setattr(ctypes, "CDLL", missing)
    assert gpus.gpu_names() == ["GPU", "GPU"]
    assert gpus.driver_versions() is None
    machine.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus.gpu_names() == []


def test_a_worker_with_a_gpu_computes_on_it_or_fails(machine: SimpleNamespace) -> None:
    assert [device_kind(share) for share in (0, 0.5, 1)] == ["cpu", "cuda", "cuda"]
    assert worker_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceMissingError, match=f"{platform.node()}: torch can't use .* CUDA was started"):
        worker_device("cuda")
    assert cuda_failure("cpu") is None, "the check itself works"
