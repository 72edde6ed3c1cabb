"""Partition & expansion (IDC, arXiv:2205.14959; IDM, arXiv:2307.09742, 4.1): several images stored as one.

A stored image is cut into factor x factor parts (spectrograms: factor parts along time), and every part is
up-sampled to the full size. One differentiable function serves the matching and the artifact alike.

Deviation: where the factor does not divide the side, IDC pads the image with grey; here the parts differ by
one pixel, so that no stored pixel is unused.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.errors import InputError

Resize = Literal["bilinear", "nearest"]


class Partition(Config):
    """How a stored image holds its mini-images."""

    factor: int = Field(default=1, ge=1, le=3)
    """Parts along each cut axis."""
    axes: Literal["both", "time"] = "both"
    """Cut height and width, or the width alone (a spectrogram's time)."""

    @property
    def num_parts(self) -> int:
        """Mini-images per stored image."""
        return self.factor**2 if self.axes == "both" else self.factor

    def spans(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """Return (rows, columns) of every part, row by row; InputError if a side has too few pixels."""
        rows = _cuts(height, self.factor if self.axes == "both" else 1)
        return [(row, column) for row in rows for column in _cuts(width, self.factor)]


def _cuts(size: int, parts: int) -> list[slice]:
    """Cut 0..size into parts whose lengths differ by at most one."""
    if parts > size:
        raise InputError(f"factor must be at most the image's side of {size} px, got {parts}")
    return [slice(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


def expand(images: Tensor, partition: Partition) -> Tensor:
    """Return the mini-images [N * P, C, H, W] of stored images [N, C, H, W], up-sampled (bilinear).

    Differentiable; the P parts of one image are consecutive.
    """
    if partition.num_parts == 1:
        return images
    height, width = images.shape[2:]
    parts = [
        F.interpolate(images[:, :, rows, columns], (height, width), mode="bilinear", align_corners=False)
        for rows, columns in partition.spans(height, width)
    ]
    return torch.stack(parts, 1).flatten(0, 1)


def compose(images: Tensor, partition: Partition, resize: Resize = "bilinear") -> Tensor:
    """Return stored images [N, C, H, W] that hold `images` [N * P, C, H, W], in the order of `expand`.

    They are scaled down by `resize`: bilinear (anti-aliased) or nearest.
    """
    if partition.num_parts == 1:
        return images
    grouped = images.reshape(-1, partition.num_parts, *images.shape[1:])
    stored = torch.empty_like(grouped[:, 0])
    for part, (rows, columns) in enumerate(partition.spans(*images.shape[2:])):
        size = (rows.stop - rows.start, columns.stop - columns.start)
        stored[:, :, rows, columns] = F.interpolate(
            grouped[:, part], size, mode=resize, antialias=resize == "bilinear"
        )
    return stored


def default_factor(image_shape: tuple[int, int, int]) -> int:
    """Return the factor for images of `image_shape` (C, H, W)."""
    return 1 if max(image_shape[1:]) <= 64 else 2


def padded_parts(images: Tensor, rows: int, columns: int, grey: float = 0.5) -> Tensor:
    """Return the mini-images [N * rows * columns, C, H, W] of IDC's, DSDM's and IDM's files, up-sampled.

    Where a number does not divide the side, IDC's code pads images with `grey` at the bottom right; the parts
    of one image are consecutive.
    """
    num, channels, height, width = images.shape
    _cuts(height, rows)
    _cuts(width, columns)
    padded = F.pad(images, (0, -width % columns, 0, -height % rows), value=grey)
    size_y, size_x = padded.shape[2] // rows, padded.shape[3] // columns
    grid = padded.view(num, channels, rows, size_y, columns, size_x).permute(0, 2, 4, 1, 3, 5)
    return F.interpolate(grid.flatten(0, 2), (height, width), mode="bilinear", align_corners=False)
