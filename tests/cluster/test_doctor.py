"""`ddray doctor` on devices: what it says of GPUs, and that a driver which hangs does not hang it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ddray.cluster import doctor

DRIVER = ("580.65", "13.1")


@pytest.mark.parametrize(
    ("seen", "status", "words"),
    [
        (
            {"driver": None, "cuda": "13.0", "gpus": []},
            "ok",
            ["no GPU that torch can", "no NVIDIA driver"],
        ),
        (
            {"driver": DRIVER, "cuda": "13.0", "gpus": [["H200", None], ["H200", None]]},
            "ok",
            ["; H200, H200: driver 580.65 (up to CUDA 13.1), torch for CUDA 13.0"],
        ),
        (
            {"driver": DRIVER, "cuda": None, "gpus": []},
            "warning",
            ["no GPU that torch can", "without CUDA"],
        ),
        (
            {"driver": ("535.1", "12.2"), "cuda": "13.0", "gpus": [["H200", "the driver is too old"]]},
            "failed",
            ["H200 (the driver is too old): driver 535.1 (up to CUDA 12.2), torch for CUDA 13.0"],
        ),
        (None, "failed", ["crashed"]),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, seen: Any, status: str, words: list[str]) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda: seen)
    told, detail = doctor._devices()
    assert told == status, detail
    assert "CPU cores; " in detail
    assert all(word in detail for word in words), detail


def test_this_machine_is_described() -> None:
    seen = doctor._probe()
    assert seen is not None
    assert seen.keys() == {"driver", "cuda", "gpus"}


def test_a_driver_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PATIENCE_S", 0.2)
    begin = time.monotonic()
    assert doctor._devices()[0] == "failed"
    assert "no answer from the GPU's driver within 0.2 s" in doctor._devices()[1]
    assert time.monotonic() - begin < 30


@pytest.mark.ray
@pytest.mark.usefixtures("no_ray")
def test_a_worker_on_every_node_tries_its_gpu() -> None:
    import ray

    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        (failure,), num_untested = doctor._gpu_nodes()
        assert "NVIDIA" in failure or "CUDA" in failure
        assert num_untested == 0
        assert ray.get(ray.remote(num_gpus=1)(lambda: 1).remote()) == 1, "the GPU is free again"
    finally:
        ray.shutdown()
