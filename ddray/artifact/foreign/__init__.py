"""Distilled sets of other projects: one file per format, tried in the order of their names.

A format's module ends in `FORMAT: Final = ForeignFormat(...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ddray.errors import InputError
from ddray.system.registry import Registry

_FORMATS: Final = Registry("format", __name__, "FORMAT", "ddray.formats")


@dataclass(frozen=True)
class ForeignFormat:
    """A format; both functions take a file and its contents (tensors and plain values).

    Attributes:
        layout: what a file holds, for messages.
        fits: whether a file has this format.
        read: returns images [N, C, H, W] and labels [N] of a file that fits.
    """

    layout: str
    fits: Callable[[Path, Any], bool]
    read: Callable[[Path, Any], tuple[Tensor, Tensor]]


def read_foreign(path: Path, contents: Any) -> tuple[Tensor, Tensor]:
    """Return images [N, C, H, W] and labels [N] of another project's file, from what `read_tensors` returned.

    InputError if its layout is unknown, or images and labels do not fit each other.
    """
    formats: list[ForeignFormat] = [_FORMATS.get(name) for name in _FORMATS.names()]
    fitting = next((one for one in formats if one.fits(path, contents)), None)
    if fitting is None:
        layouts = ", or ".join(one.layout for one in formats)
        raise InputError(f"{path} must be ddray's own file, {layouts}")
    images, labels = fitting.read(path, contents)
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(labels) == 0 or labels.min() < 0:
        raise InputError(
            f"{path} must hold images [N, C, H, W] and labels [N] >= 0, "
            f"got {list(images.shape)}, {list(labels.shape)}"
        )
    return images, labels
