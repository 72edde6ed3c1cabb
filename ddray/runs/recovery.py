"""What a process does when its device fails it: once more with less memory; else others must take over."""

from __future__ import annotations

import logging
import platform
import re
import sys
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

from ddray.errors import DeviceError, DeviceMemoryError, one_line
from ddray.system.memory import halved_budget, release_cached_memory

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

_AMOUNT: Final = r"([\d.]+ \w+)"
_FIGURES: Final = re.compile(f"Tried to allocate {_AMOUNT}.*?capacity of {_AMOUNT} of which {_AMOUNT}")
# Not torch.OutOfMemoryError: what CUDA itself and its libraries say, and torch's allocator on a CPU.
_NO_MEMORY: Final = re.compile(r"CUDA error: out of memory|_STATUS_ALLOC_FAILED|can't allocate memory")


def recovering(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function; if memory runs out, once more with half the memory budget.

    Raises:
        DeviceMemoryError: it ran out again.
        DeviceError: this process's CUDA context is broken, as after a failed assertion on the device.
        Exception: any other that the function raises.
    """
    try:
        return function(*arguments, **options)
    except Exception as error:
        failure = _logged_failure(error)
        if failure is None:
            raise
    # Only out here have the traceback's frames, and the tensors in them, been let go of.
    if not isinstance(failure, DeviceMemoryError):
        raise failure
    log.warning("%s: trying again with half the memory budget", failure)
    release_cached_memory()
    try:
        with halved_budget():
            return function(*arguments, **options)
    except Exception as error:
        failure = _logged_failure(error)
        if failure is None:
            raise
    release_cached_memory()
    raise failure


def _logged_failure(error: Exception) -> DeviceError | None:
    if (failure := device_failure(error)) is not None:
        log.debug("a device failed", exc_info=error)
    return failure


def device_failure(error: Exception) -> DeviceError | None:
    """Return what an error says of this process's device; None if that goes on working."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return None
    text = one_line(error)
    if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(text):
        return DeviceMemoryError(f"{platform.node()}: out of memory: {_figures(text)}")
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # such errors stay: every later call of CUDA raises them
            return DeviceError(f"{platform.node()}: this process can't use its GPU any more: {text[:160]}")
    return None


def _figures(text: str) -> str:
    """Return how much memory was asked for, and how much there is, of an allocator's message."""
    if (match := _FIGURES.search(text)) is None:
        return text[:160]
    needed, total, free = match.groups()
    return f"asked for {needed}, {free} of {total} free; a smaller memory_budget needs less"
