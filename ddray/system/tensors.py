"""Files of tensors and plain values, as torch writes them, read without running any code in them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddray.errors import InputError, one_line

log = logging.getLogger(__name__)


def numpy_scalars() -> list[Any]:
    """Return the safe globals for other projects' files, whose numbers may be NumPy scalars."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    return [
        *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    ]


def load_plain(path: Path) -> Any:
    """Load what torch wrote of tensors, plain values and NumPy scalars, on the CPU, and run no code in it.

    A ValueError says whether the file is torn, or holds something else.
    """
    try:
        with torch.serialization.safe_globals(numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, all of which mean: not such a file
        reason = one_line(error, 160)
        if "weights_only" in str(error):  # torch's message advises turning the protection off
            reason = "it holds objects that could run code, which are never loaded"
        raise ValueError(reason) from error


def read_tensors(path: Path) -> Any:
    """Load a distilled set's file; InputError if it is missing, torn, or asks for code to be run."""
    if not path.is_file():
        raise InputError(f"a distilled set must be an existing file, got {path}")
    try:
        return load_plain(path)
    except ValueError as error:
        rule = "must be an undamaged distilled set of tensors and plain values"
        raise InputError(f"{path} {rule}: {error}; copy it again") from error


def is_plain(value: Any) -> bool:
    """Return whether a value is a dense CPU tensor (not sparse, not on the meta device)."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
