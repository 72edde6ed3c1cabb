"""Randomness: every generator is derived from (seed, labels); nothing touches the clock or global state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """Return a 63-bit seed that depends on the run's `seed`, what the draw is for, and on nothing else.

    The labels say what it is for: `derive_seed(seed, "step", 12, "batch")`.
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(label).__name__}:{label}" for label in labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def derive(seed: int, *labels: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a fresh torch generator on `device`, seeded by `derive_seed(seed, *labels)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *labels))


def derive_numpy(seed: int, *labels: str | int) -> np.random.Generator:
    """Return a fresh NumPy generator, seeded by `derive_seed(seed, *labels)`."""
    return np.random.default_rng(derive_seed(seed, *labels))


@contextmanager
def forked_numpy(seed: int) -> Iterator[None]:
    """Run a block that insists on NumPy's global generator (Ray's PB2) with it seeded, then restore it."""
    before = np.random.get_state()  # noqa: NPY002 - the legacy generator is what has to be wrapped
    np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002 - takes 32 bits
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextmanager
def forked_global(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Run a block that insists on torch's global generators with those seeded, then restore them.

    They are the CPU's, and the CUDA device's if `device` is one. The one place where ddray touches global
    random state: library layers initialise themselves from it, and torchvision's augmentation draws from it.
    """
    device = torch.device(device)
    cuda: list[int] = []
    if device.type == "cuda":
        cuda = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=cuda):
        torch.random.manual_seed(seed)
        yield
