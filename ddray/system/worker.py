"""Set-up of a process that computes: cores, threads, device, logging, memory."""

import logging
import os
import sys

from ddray.system.memory import reuse_freed_memory


def cpu_count() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(cpus: float) -> None:
    """Give this worker's torch its share of cores (docs/ray.md, 7: by default one thread)."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))


def worker_device(gpus: float) -> str:
    """Return the device of a worker: CUDA only if it was assigned a GPU (docs/ray.md, 10)."""
    import torch

    return "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"


def prepare_worker() -> None:
    """Set up a worker's process: log warnings and above to stderr, reuse freed memory."""
    reuse_freed_memory()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
