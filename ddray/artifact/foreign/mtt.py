"""`images_best.pt` of MTT, with `labels_best.pt` beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ddray.system.tensors import is_plain, read_tensors

LAYOUT: Final = "images_*.pt beside labels_*.pt (MTT)"


def fits(path: Path, contents: Any) -> bool:
    """Return whether a file holds one tensor and is named as MTT names images."""
    return is_plain(contents) and path.name.startswith("images_") and is_plain(_labels(path))


def read(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    """Return the images and the labels of the file beside them."""
    return contents, _labels(path)


def _labels(path: Path) -> Any:
    """Read the labels.

    Raises:
        InputError: their file is missing or damaged.
    """
    return read_tensors(path.with_name(path.name.replace("images_", "labels_", 1)))
