"""Distilled sets of other projects: one file per format, tried in the order of their names.

A format's module defines `LAYOUT` (what its files hold, for messages), `fits` and `read`.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from ddray.errors import InputError


class ForeignFormat(Protocol):
    """What a format's module defines."""

    LAYOUT: str

    def fits(self, path: Path, contents: Any) -> bool:
        """Return whether a file, which holds `contents` (tensors and plain values), has this format."""
        ...

    def read(self, path: Path, contents: Any) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] and labels [N] of a file that fits."""
        ...


def read_foreign(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    """Return images [N, C, H, W] and labels [N] of another project's file.

    Args:
        path: the file.
        contents: what `read_tensors` returned for it.

    Raises:
        InputError: its layout is unknown, or images and labels do not fit each other.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    formats = [cast("ForeignFormat", importlib.import_module(f"{__name__}.{name}")) for name in names]
    fitting = next((one for one in formats if one.fits(path, contents)), None)
    if fitting is None:
        layouts = ", or ".join(one.LAYOUT for one in formats)
        raise InputError(f"{path} must be ddray's own file, {layouts}")
    images, labels = fitting.read(path, contents)
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(labels) == 0 or labels.min() < 0:
        raise InputError(
            f"{path} must hold images [N, C, H, W] and labels [N] >= 0, "
            f"got {list(images.shape)}, {list(labels.shape)}"
        )
    return images, labels
