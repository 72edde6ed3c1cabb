"""What formats share that keep images, labels and a learning rate in files of their own."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import InputError
from ddray.system.tensors import is_plain, read_tensors

log = logging.getLogger(__name__)


def beside(path: Path, kind: str, new_kind: str) -> Path:
    """Return the file beside `path` that has another kind's name in place of the first `kind`."""
    return path.with_name(path.name.replace(kind, new_kind, 1))


def read_labels(path: Path) -> Tensor:
    """Return the tensor of a file of labels; InputError if it is missing, or holds something else."""
    labels = read_tensors(path)
    if not isinstance(labels, Tensor) or not is_plain(labels):
        raise InputError(f"{path} must hold a tensor of labels, got {type(labels).__name__}")
    return labels


def read_rate(path: Path) -> float | None:
    """Return the learning rate in a file; None if there is no such file, InputError if it isn't one."""
    if not path.is_file():
        return None
    value = read_tensors(path)
    try:
        rate = float(value)
    except (TypeError, ValueError, RuntimeError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise InputError(
            f"{path} must hold a learning rate > 0, got {value!r}; move it away to use the default"
        )
    log.info("networks are trained with the learning rate %g of %s", rate, path)
    return rate


def classes_of(path: Path, values: Tensor) -> Tensor:
    """Return int64 [N], the largest of learned values [N, K] per class; a warning if that loses something."""
    classes = values.argmax(1)
    is_own = F.one_hot(classes, values.shape[1]).bool()
    if any(
        float(part.max() - part.min()) > 1e-5 for part in (values[is_own], values[~is_own]) if part.numel()
    ):
        log.warning("%s has a value per class: each image gets the class of its largest one", path)
    return classes


def is_tensor(path: Path, contents: Any, *, start: str = "", end: str = "") -> bool:
    """Return whether a file is a tensor alone, and its name (without `.pt`) starts and ends so."""
    return (
        is_plain(contents)
        and path.suffix == ".pt"
        and path.stem.startswith(start)
        and path.stem.endswith(end)
    )


def whole(parts: list[Path]) -> Tensor:
    """Return the tensors of several files as one."""
    return torch.cat([read_labels(part) for part in parts])
