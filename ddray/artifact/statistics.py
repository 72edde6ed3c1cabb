"""Decoder `d3hr`: a set holds statistics of latents; a generator makes any number of images from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ddray.errors import InputError

NAMES: Final = ("mean", "variance")


def check(tensors: Mapping[str, Tensor], num_classes: int, storage_floats: int) -> None:
    """Check that statistics are complete and valid.

    Args:
        tensors: `mean` and `variance`, float32 [K, D].
        num_classes: K.
        storage_floats: the number of floats the set claims to store.

    Raises:
        InputError: naming the first broken rule.
    """
    if set(tensors) != set(NAMES) or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise InputError(f"decoder d3hr must come with float32 mean and variance, got {sorted(tensors)}")
    mean, variance = (tensors[name] for name in NAMES)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (mean, variance))
    if mean.ndim != 2 or len(mean) != num_classes or variance.shape != mean.shape or not finite:
        raise InputError(
            f"mean and variance must be finite [{num_classes}, D], got {list(mean.shape)} and "
            f"{list(variance.shape)}"
        )
    if bool((variance < 0).any()):
        raise InputError(f"variance must be >= 0, got {float(variance.min())}")
    if storage_floats != 2 * mean.numel():
        raise InputError(f"storage_floats must be {2 * mean.numel()}, got {storage_floats}")
