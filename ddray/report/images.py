"""Pictures of distilled sets: one PNG grid, de-normalised and de-whitened."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from ddray.artifact import DistilledSet
from ddray.files import write_atomically

_MAX_PER_CLASS = 10
_MAX_CLASSES = 50


def grid(distilled: DistilledSet) -> Tensor:
    """Return the set as one picture, float32 [3, H, W] in [0, 1]: a class per row, at most 10 by 50 images.

    With one image per class, ten classes stand in a row.

    Whitened images leave [0, 1] widely when they are de-whitened; every image is then stretched between its
    own 1st and 99th percentile, so that its structure can be seen.
    """
    from torchvision.utils import make_grid

    rows = []
    for label in torch.unique(distilled.labels)[:_MAX_CLASSES]:
        rows.append(torch.nonzero(distilled.labels == label).flatten()[:_MAX_PER_CLASS])
    columns = max(len(row) for row in rows)
    pixels = distilled.space().decode(distilled.images[torch.cat(rows)])
    if distilled.meta.pixel_space == "zca":
        low, high = (torch.quantile(pixels.flatten(1), q, dim=1)[:, None, None, None] for q in (0.01, 0.99))
        pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    shape = (len(rows) * columns, *pixels.shape[1:])
    cells = torch.ones(shape)
    place = torch.cat([torch.arange(len(row)) + number * columns for number, row in enumerate(rows)])
    cells[place] = pixels.clamp(0, 1)
    zoom = max(1, 64 // pixels.shape[-1])
    cells = cells.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    picture: Tensor = make_grid(
        cells, nrow=columns if columns > 1 else _MAX_PER_CLASS, padding=2, pad_value=1.0
    )
    return picture


def save_grid(distilled: DistilledSet, path: Path) -> None:
    """Write `grid(distilled)` as a PNG, atomically.

    Raises:
        StorageError: the file can't be written.
    """
    write_atomically(path, lambda file: file.write(png(grid(distilled))))


def png(picture: Tensor) -> bytes:
    """Return a picture, float [3, H, W] in [0, 1], as PNG bytes."""
    from torchvision.transforms.functional import to_pil_image

    held = io.BytesIO()
    to_pil_image(picture).save(held, format="PNG")
    return held.getvalue()
