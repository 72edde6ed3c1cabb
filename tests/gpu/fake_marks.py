"""Where a tensor is: marks on storages, the memory that they take, generators, moves between devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
_functorch = torch._C._functorch


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for part in tree for tensor in tensors(part)]


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor below the layers of vmap and torch.func.grad."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def place(tensor: Tensor) -> torch.device:
    """Return where a tensor is; `meta` and other true devices are themselves."""
    tensor = unwrapped(tensor)
    if tensor.device.type != "cpu":
        return tensor.device
    mark = tensor.untyped_storage().__dict__.get("mark")
    return CPU if mark is None else mark.device


class Memory:
    """The memory of one device: `capacity`, `allocated` and `peak`, in bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.allocated, self.peak = capacity, 0, 0

    def take(self, size: int) -> None:
        if self.allocated + size > self.capacity:
            need, free = size / 2**20, (self.capacity - self.allocated) / 2**20
            message = f"CUDA out of memory. Tried to allocate {need:.2f} MiB, {free:.2f} MiB is free."
            raise torch.OutOfMemoryError(message)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)


class _Mark:
    """Says that a storage is on a CUDA device; its bytes count as allocated there while the storage lives."""

    def __init__(self, device: torch.device, size: int, memory: Memory) -> None:
        memory.take(size)
        self.device, self._size, self._memory = device, size, memory

    def __del__(self) -> None:
        if hasattr(self, "_size"):
            self._memory.allocated -= self._size


def mark_storage(storage: Any, device: torch.device, memories: list[Memory]) -> None:
    """Say that a storage is on a device, the CPU's too."""
    mark = storage.__dict__.get("mark")
    if device.type == "cpu":
        storage.__dict__.pop("mark", None)
    elif mark is None or mark.device != device:
        storage.__dict__["mark"] = _Mark(device, storage.nbytes(), memories[device.index])


class Generator(torch._C.Generator):
    """A generator that says which device it is for; the numbers are those of a CPU's."""

    place: torch.device

    def __new__(cls, device: torch.device | str | int = "cpu") -> Generator:
        self = super().__new__(cls, "cpu")
        self.place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if self.place.type == "cuda" and self.place.index is None:
            self.place = torch.device("cuda", torch.cuda.current_device())
        return self

    @property
    def device(self) -> torch.device:
        return self.place

    def get_state(self) -> Tensor:
        """Return a state that a generator of the other kind does not take."""
        state = super().get_state()
        return torch.cat([state, state[:1]]) if self.place.type == "cuda" else state

    def set_state(self, state: Tensor) -> Generator:
        expected = len(super().get_state()) + (self.place.type == "cuda")
        if place(state).type != "cpu" or len(state) != expected:
            raise RuntimeError("RNG state is wrong size, or not on the CPU")
        super().set_state(state[:-1].clone() if self.place.type == "cuda" else state)
        return self
