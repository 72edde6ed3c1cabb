"""Memory: how this process's C library allocates it, how much a device has, what a step may take of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_MAX: Final = -4
_M_ARENA_MAX: Final = -8

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]ib|b|)", re.IGNORECASE)
_UNITS: Final = {"": 0, "b": 0, "kib": 10, "mib": 20, "gib": 30, "tib": 40}
# Of a device's memory; the rest is for what is learned, real images, and the libraries' own.
_BUDGET_SHARE: Final = 3
_halvings: list[None] = []  # one for each `halved_budget` that this process is in


def reuse_freed_memory() -> None:
    """Keep freed memory in the process, up to 2 GiB, for the next tensors; call it before threads start.

    glibc maps every block above 32 MiB anew and unmaps it when it is freed, so that each training step on a
    CPU pays for zeroing the pages of its feature maps. A step of a ConvNet-3 with batch norm on 250 images of
    32 px took 0.92 s that way, 0.51 s this way. Does nothing with other C libraries.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 * 2**20)
    mallopt(_M_ARENA_MAX, 1)


def available_bytes(device: torch.device) -> int:
    """Return the memory that a device (for a CPU, the machine) has for new tensors now.

    Memory that torch's allocator caches counts as free, and so do files that Linux caches.
    """
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_bytes(text: str | int) -> int:
    """Return the bytes of a size such as `"64MiB"`, `"1.5 GiB"` or `67108864`.

    Raises:
        ValueError: it is none, or below one byte.
    """
    match = _SIZE.fullmatch(str(text).strip())
    size = int(float(match[1]) * 2 ** _UNITS[match[2].lower()]) if match else 0
    if size < 1:
        raise ValueError("must be a number of bytes, or one with KiB, MiB, GiB or TiB, such as 64MiB")
    return size


def memory_budget(device: torch.device, setting: int | None = None) -> int:
    """Return the bytes that one part of a step, such as a group of classes, may take on `device`.

    They are the run's `setting` or, without one, a third of all the memory that the device has. What is free
    does not count: how a step is cut decides its last digits, and a seed gives the same bytes every time.
    """
    return max(1, (setting or total_bytes(device) // _BUDGET_SHARE) >> len(_halvings))


@contextlib.contextmanager
def halved_budget() -> Iterator[None]:
    """Halve `memory_budget` in a block: a second try after running out of memory.

    Not for longer: how later work is cut, and so its last digits, must not depend on what was done before.
    """
    _halvings.append(None)
    try:
        yield
    finally:
        _halvings.pop()


def is_short() -> bool:
    """Return whether this process is in a `halved_budget`."""
    return bool(_halvings)


def total_bytes(device: torch.device) -> int:
    """Return the memory of a device; for a CPU the machine's, or a container's limit."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


def release_cached_memory() -> None:
    """Give back what torch's allocator caches on GPUs, once unreachable tensors are collected."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of `peak_bytes`, after freed memory was given back to the system.

    Where the system can't reset it (CPU, not Linux), the peak is that of the process's whole life.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)
        return
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use since `reset_peak`, in bytes.

    On a GPU, the tensors on it, of torch's allocator alone. On a CPU, the resident memory of the whole
    process: Python, its libraries and open datasets (some hundred MB) are included.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
