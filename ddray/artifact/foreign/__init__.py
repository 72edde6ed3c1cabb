"""Distilled sets of other projects: one file per format, tried in the order of their names.

A format's module ends in `FORMAT: Final = ForeignFormat(...)`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor

from ddray.data import Dataset, PixelSpace
from ddray.errors import InputError
from ddray.system.registry import Registry

_FORMATS: Final = Registry("format", __name__, "FORMAT", "ddray.formats")


@dataclass(frozen=True)
class ForeignRequest:
    """What a file is read as.

    Attributes:
        dataset: what the set is of (most files do not say).
        pixel_space: returns the space that its pixels are said to be in, which may take a fit; it is called
            once the file is known to fit. None: as its project writes them.
        factor: parts along each side of a stored image that may hold several; None: not said.
    """

    dataset: Dataset
    pixel_space: Callable[[], PixelSpace] | None = None
    factor: int | None = None


@dataclass(frozen=True)
class ForeignSet:
    """A set as it lies in a file.

    Attributes:
        images: [N, C, H, W] as networks are trained on them, or pixels (uint8; floats in 0..1 if `is_unit`).
        labels: class numbers [N], soft labels [N, K] (probabilities or logits), or targets [N, D].
        are_targets: whether `labels` are targets of a self-supervised set.
        is_unit: whether `images` are pixels in 0..1.
        is_divided: whether an image may hold several, so that the request's factor is for it.
        space: what networks are trained in; default: normalised by the dataset's mean and std.
        lr: the learned rate, which networks are trained at, if the file has one.
        facts: fields of `Meta` that the file knows.
    """

    images: Tensor
    labels: Tensor
    are_targets: bool = False
    is_unit: bool = False
    is_divided: bool = False
    space: PixelSpace | None = None
    lr: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ForeignFile:
    """The sets of a file; `scored` says which count: `all`, one per run, or the `last` of one run.

    None: the file does not say, so that a user must.
    """

    sets: Sequence[ForeignSet]
    scored: Literal["all", "last"] | None = "all"


@dataclass(frozen=True)
class ForeignFormat:
    """A format; both functions take a file (or folder) and its contents (tensors and plain values).

    Attributes:
        layout: what a file holds, for messages.
        fits: whether a file has this format.
        read: returns the sets of a file that fits; InputError if it can't be meant, with what is missing.
    """

    layout: str
    fits: Callable[[Path, Any], bool]
    read: Callable[[Path, Any, ForeignRequest], ForeignFile]


def format_of(path: Path, contents: Any) -> ForeignFormat:
    """Return the format of another project's file, by its contents; InputError if no format fits."""
    formats: list[ForeignFormat] = [_FORMATS.get(name) for name in _FORMATS.names()]
    fitting = next((one for one in formats if one.fits(path, contents)), None)
    if fitting is None:
        layouts = ", or ".join(one.layout for one in formats)
        raise InputError(f"{path} must be ddray's own file, {layouts}")
    return fitting
