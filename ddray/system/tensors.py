"""Files of tensors and plain values, as torch writes them, read without running any code in them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddray.errors import InputError

log = logging.getLogger(__name__)


def numpy_scalars() -> list[Any]:
    """Return the safe globals for the DC family's files: their accuracies are NumPy float scalars."""
    import numpy as np

    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    return [
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        (multiarray.scalar, "numpy._core.multiarray.scalar"),
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
    ]


def read_tensors(path: Path) -> Any:
    """Load a file of tensors and plain values, and nothing else.

    Raises:
        InputError: the file is missing, torn, or asks for code to be run.
    """
    if not path.is_file():
        raise InputError(f"a distilled set must be an existing file, got {path}")
    try:
        with torch.serialization.safe_globals(numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, all of which mean: not a file of tensors
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if "weights_only" in str(error):  # torch's message advises turning the protection off
            reason = "it holds objects that could run code, which are never loaded"
        raise InputError(
            f"{path} must be an undamaged distilled set of tensors and plain values: {reason}; copy it again"
        ) from error


def is_plain(value: Any) -> bool:
    """Return whether a value is a dense CPU tensor (not sparse, not on the meta device)."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
