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


def read_foreign(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    """Return images [N, C, H, W] and labels [N] of another project's file.

    Args:
        path: the file; MTT's labels are in one beside it.
        contents: what `read_tensors` returned for it.

    Raises:
        InputError: its layout is unknown.
    """
    if isinstance(contents, dict) and isinstance(contents.get("data"), list) and contents["data"]:
        if len(contents["data"]) > 1:
            log.info("%s holds %d sets: reading the first", path, len(contents["data"]))
        pair = contents["data"][0]
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(is_plain(tensor) for tensor in pair):
            return _shaped(path, *pair)
    if is_plain(contents) and path.name.startswith("images_"):
        labels_path = path.with_name(path.name.replace("images_", "labels_", 1))
        labels = read_tensors(labels_path)
        if is_plain(labels):
            return _shaped(path, contents, labels)
    raise InputError(
        f'{path} must be ddray\'s own file, {{"data": [[images, labels], ...]}} (DC family), or images_*.pt '
        "beside labels_*.pt (MTT)"
    )


def _shaped(path: Path, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(labels) == 0 or labels.min() < 0:
        raise InputError(
            f"{path} must hold images [N, C, H, W] and labels [N] >= 0, "
            f"got {list(images.shape)}, {list(labels.shape)}"
        )
    return images, labels
