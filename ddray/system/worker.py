"""Set-up of a process that computes: cores, threads, device, logging, memory."""

from __future__ import annotations

import logging
import os
import platform
import sys
from typing import TYPE_CHECKING

from ddray.errors import DeviceMissingError, one_line
from ddray.system.gpus import num_gpus
from ddray.system.memory import reuse_freed_memory

if TYPE_CHECKING:
    import torch


def cpu_count() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_here(cpus: float, gpus: float, most: int | None = None) -> int:
    """Return how many workers with so many cores and GPUs this machine holds at a time, at most `most`."""
    fits = [cpu_count() / cpus, *([num_gpus() / gpus] if gpus else [])]
    return max(1, min(int(min(fits) + 1e-9), most or sys.maxsize))


def set_threads(cpus: float) -> None:
    """Give this worker's torch its share of cores (docs/ray.md, 7: by default one thread)."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))


def device_kind(gpus: float) -> str:
    """Return the kind of device of a worker with so many GPUs: only with one is it CUDA (docs/ray.md, 10)."""
    return "cuda" if gpus > 0 else "cpu"


def worker_device(kind: str) -> torch.device:
    """Return the device of a worker, of the kind that its results are recorded under.

    Raises:
        DeviceMissingError: CUDA does not work here; it names the node and the reason.
    """
    import torch

    if kind == "cuda" and (reason := cuda_failure()) is not None:
        raise DeviceMissingError(f"{platform.node()}: torch can't use the GPU of this worker: {reason}")
    return torch.device(kind)


def cuda_failure(device: str = "cuda") -> str | None:
    """Return why a CUDA device can't compute, None if it does; opens a CUDA context.

    RuntimeError as torch raises it if the device's memory is full.
    """
    import torch

    try:
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:  # without a driver; torch without CUDA
        if "out of memory" in str(error):  # it works, for others
            raise
        return one_line(error, 160)
    return None


def prepare_worker() -> None:
    """Set up a worker's process: log warnings and above to stderr, reuse freed memory."""
    reuse_freed_memory()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
