"""Copies from the CPU to another device that the CPU does not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INLINE: Final = 64 * 2**10  # bytes up to which CUDA puts a copy into its queue as it is


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`, itself if it is there already; nothing waits for a copy to a GPU.

    CUDA copies in the background from pinned memory alone: from other memory, larger tensors can wait for
    all work that was queued before.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > _INLINE:
        tensor = tensor.pin_memory()
    # The other way it is waited for: values that are not there yet could be read.
    return tensor.to(device, non_blocking=device.type == "cuda")
