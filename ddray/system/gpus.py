"""GPUs as NVML sees them: that opens no CUDA context, which costs some hundred MB of a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any, Final

_LENGTH: Final = 96  # bytes of NVML's names


def num_gpus() -> int:
    """Return how many GPUs of this machine torch can see (`CUDA_VISIBLE_DEVICES` counts)."""
    import torch

    return torch.cuda.device_count()


def gpu_names() -> list[str]:
    """Return the names of the GPUs that torch can see; `GPU` where NVML can't be asked."""
    num = num_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    tokens = [str(index) for index in range(num)] if visible is None else visible.split(",")[:num]
    library = _nvml() if num else None
    return [_name(library, token.strip()) for token in tokens]


def driver_versions() -> tuple[str, str] | None:
    """Return the driver's version and the newest CUDA version that it supports; None without NVML."""
    if (library := _nvml()) is None:
        return None
    driver, cuda = ctypes.create_string_buffer(_LENGTH), ctypes.c_int()
    failed = library.nvmlSystemGetDriverVersion(driver, ctypes.c_uint(_LENGTH))
    if failed or library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)):
        return None
    return driver.value.decode(), f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"


def _nvml() -> Any:
    """Return NVML, ready to be called; None without an NVIDIA driver."""
    with contextlib.suppress(OSError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            return library
    return None


def _name(library: Any, token: str) -> str:
    """Return the name of the GPU that a part of `CUDA_VISIBLE_DEVICES`, an index or a UUID, stands for."""
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_LENGTH)
    if library is None:
        return "GPU"
    if token.isdecimal():
        failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(token)), ctypes.byref(handle))
    else:
        failed = library.nvmlDeviceGetHandleByUUID(token.encode(), ctypes.byref(handle))
    if failed or library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_LENGTH)):
        return "GPU"
    return name.value.decode()
