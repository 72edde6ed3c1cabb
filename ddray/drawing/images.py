"""Pictures of distilled sets: PNG grids with normalisation and whitening undone, t-SNE planes."""

import base64
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.export import encode_picture
from ddray.drawing.plots import save_tsne
from ddray.system.files import write_atomically

if TYPE_CHECKING:
    from PIL import ImageFont

_MAX_PER_CLASS = 10
_MAX_CLASSES = 50
_MAX_UNLABELLED = 100
_LOSSLESS_BYTES = 6_000
_SMALLEST = 32  # pixels of an image's side on a page
_LARGEST = 64
_CLASSES_ALONG = 10
_PER_CLASS_ALONG = 2
_LINE = 16  # pixels of a line of text
_MAX_MARGIN = 160  # pixels beside a grid for the names of its rows
_MAX_BASES = 64  # as many as the paper's figure shows


def save_pictures(distilled: DistilledSet, artifact: Path, *, representations: Tensor | None = None) -> None:
    """Write `<artifact>.png`; for self-supervised sets also `.bases.png`, and `.tsne.png` of representations.

    These are the teacher's of real images [N, D]. StorageError if a file can't be written.
    """
    save_grid(distilled, artifact.with_suffix(".png"))
    bases = distilled.compact.get("image_bases")
    if bases is not None:
        picture = png(bases_grid(bases))
        write_atomically(artifact.with_suffix(".bases.png"), lambda file: file.write(picture))
    if distilled.targets is not None and representations is not None:
        path, seed = artifact.with_suffix(".tsne.png"), distilled.meta.seed or 0
        save_tsne(representations, distilled.targets, path, seed=seed)


def save_grid(distilled: DistilledSet, path: Path) -> bool:
    """Write `grid(distilled)` as a PNG, if there is one, and say so; StorageError if it can't be written."""
    picture = grid(distilled)
    return picture is not None and write_atomically(path, lambda file: file.write(png(picture)))


def grid(distilled: DistilledSet) -> Tensor | None:
    """Return the set as one picture, float32 [3, H, W] in [0, 1]: a class per row, at most 10 by 50 images.

    None for a set that stores no images (D3HR's statistics): sampling them needs the generator, which the
    viewer may not have.

    Names of classes stand left of their rows. With one image per class, each row shows ten classes, with
    their names below; a set without labels shows its first 100 images, ten per row.

    De-whitened images lie far outside [0, 1], and so do log-spectrograms. These are stretched between each
    image's 1st and 99th percentile to make their structure visible.
    """
    if not len(distilled.images):
        return None
    cells, columns = _cells(distilled)
    names = [" ".join(name.split()) for name in _class_names(distilled)]  # a font draws one line
    if not names:
        return _tiled(cells, columns if columns > 1 else _MAX_PER_CLASS)
    cells = _enlarged(cells)
    height, width = (side + 2 for side in cells.shape[-2:])
    if columns > 1:
        margin = min(round(max(map(_font().getlength, names))) + _LINE, _MAX_MARGIN)
        picture = F.pad(_tiled(cells, columns), (margin, 0), value=1.0)
        lines = [(2, 2 + row * height + (height - _LINE) // 2, margin - 2) for row in range(len(names))]
    else:
        picture = _tiled(F.pad(cells, (0, 0, 0, _LINE), value=1.0), _MAX_PER_CLASS)
        places = [divmod(index, _MAX_PER_CLASS) for index in range(len(names))]
        lines = [(2 + x * width, (y + 1) * height + y * _LINE, width - 2) for y, x in places]
    return _with_text(picture, names, lines)


def _with_text(picture: Tensor, texts: Sequence[str], places: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return a picture [3, H, W] with texts at places (x, y, width); one that is too wide ends with "…"."""
    from PIL import ImageDraw
    from torchvision.transforms.functional import to_pil_image, to_tensor

    image, font = to_pil_image(picture), _font()
    draw = ImageDraw.Draw(image)
    for text, (x, y, width) in zip(texts, places, strict=True):
        fits = text
        while len(fits) > 1 and font.getlength(fits) > width:
            fits = fits.removesuffix("…")[:-1] + "…"
        draw.text((x, y), fits, fill="black", font=font)
    drawn: Tensor = to_tensor(image)
    return drawn


@functools.cache
def _font() -> "ImageFont.FreeTypeFont":
    """Return matplotlib's own font, which has Latin, Greek and Cyrillic letters."""
    from matplotlib.font_manager import findfont
    from PIL import ImageFont

    return ImageFont.truetype(findfont("DejaVu Sans"), _LINE - 4)


def _class_names(distilled: DistilledSet) -> tuple[str, ...]:
    """Return the names of the classes that are drawn; empty for a set without labels."""
    names = distilled.meta.class_names
    return tuple(names[label] if label < len(names) else str(label) for label in _classes(distilled))


def _classes(distilled: DistilledSet) -> list[int]:
    """Return the classes that are drawn; empty for a set without labels."""
    return [] if distilled.targets is not None else torch.unique(distilled.labels)[:_MAX_CLASSES].tolist()


def _cells(distilled: DistilledSet) -> tuple[Tensor, int]:
    """Return a set's images by row, white where a row is shorter [R * M, C, H, W], and M, the columns."""
    rows = [
        torch.nonzero(distilled.labels == label).flatten()[:_MAX_PER_CLASS] for label in _classes(distilled)
    ]
    if not rows:
        rows = list(torch.split(torch.arange(min(_MAX_UNLABELLED, len(distilled.images))), _MAX_PER_CLASS))
    columns = max(len(row) for row in rows)
    pixels = _visible(distilled, torch.cat(rows))
    cells = torch.ones(len(rows) * columns, *pixels.shape[1:])
    positions = torch.cat([torch.arange(len(row)) + index * columns for index, row in enumerate(rows)])
    cells[positions] = pixels
    return cells, columns


@dataclass(frozen=True)
class PagePicture:
    """A set's images for a page, a class per row."""

    uri: str
    width: int  # pixels on the page
    names: tuple[str, ...]  # of the rows' classes; empty for a set without labels
    num_classes: int  # of the set; some may not be drawn


def page_picture(distilled: DistilledSet) -> PagePicture | None:
    """Return a set's picture for a page, no larger than it is shown; None for a set that stores no images."""
    if not len(distilled.images):
        return None
    return PagePicture(
        *grid_uri(*_cells(distilled)),
        _class_names(distilled),
        num_classes=len(torch.unique(distilled.labels)),
    )


def grid_uri(cells: Tensor, columns: int) -> tuple[str, int]:
    """Return images [N, C, H, W] in [0, 1] as a grid's data URI and its width on a page in pixels.

    It holds no more pixels than are shown: large images are made smaller, browsers enlarge small ones.
    """
    from torchvision.utils import make_grid

    side = max(cells.shape[-2:])
    if side > _LARGEST:
        cells = F.interpolate(cells, scale_factor=_LARGEST / side, mode="area").clamp(0, 1)
    zoom = max(1, _SMALLEST // cells.shape[-1])
    picture: Tensor = make_grid(cells, nrow=columns, padding=1, pad_value=1.0)
    return data_uri(picture), zoom * picture.shape[-1]


def _visible(distilled: DistilledSet, index: Tensor) -> Tensor:
    """Return images of a set at `index` [n] as pixels in [0, 1], stretched where they lie far outside."""
    pixels = distilled.space().decode(distilled.images[index])
    if distilled.meta.pixel_space == "zca" or min(distilled.meta.mean) < 0:  # no picture's mean is below 0
        low, high = (torch.quantile(pixels.flatten(1), q, dim=1)[:, None, None, None] for q in (0.01, 0.99))
        pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    return pixels.clamp(0, 1)


def images_along(sets: Sequence[DistilledSet]) -> Tensor | None:
    """Return the same images at every step, [N, steps, C, H, W] in [0, 1] (DataDAM's supplement, Fig 3).

    `sets` are those of one run, by step: the first two images of each of the first ten classes, or the first
    twenty of a set without labels. None without images.
    """
    if not sets or not len(sets[0].images):
        return None
    labels = sets[0].labels
    if sets[0].targets is None:
        classes = torch.unique(labels)[:_CLASSES_ALONG]
        index = torch.cat([torch.nonzero(labels == label).flatten()[:_PER_CLASS_ALONG] for label in classes])
    else:
        index = torch.arange(min(len(sets[0].images), _CLASSES_ALONG * _PER_CLASS_ALONG))
    return torch.stack([_visible(distilled, index) for distilled in sets], dim=1)


def bases_grid(bases: Tensor) -> Tensor:
    """Return the first 64 bases [U, C, H, W] in a grid, each stretched to its range (Boost-SSDD Fig 2a)."""
    first_bases = bases[:_MAX_BASES]
    low, high = (f(first_bases.flatten(1), 1)[:, None, None, None] for f in (torch.amin, torch.amax))
    return _tiled((first_bases - low) / (high - low).clamp_min(1e-6), 8)


def _tiled(cells: Tensor, columns: int) -> Tensor:
    """Return images [N, C, H, W] in [0, 1] as one grid; small images are enlarged."""
    from torchvision.utils import make_grid

    picture: Tensor = make_grid(_enlarged(cells), nrow=columns, padding=2, pad_value=1.0)
    return picture


def _enlarged(cells: Tensor) -> Tensor:
    """Return images [N, C, H, W] enlarged by a whole number to about 64 pixels; large ones as they are."""
    zoom = max(1, 64 // cells.shape[-1])
    return cells.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)


def data_uri(picture: Tensor) -> str:
    """Return a picture as a data URI: PNG, or lossy WebP where the PNG is too large.

    Learned images hardly compress losslessly: a page of many grids would take tens of megabytes.
    """
    encoded, kind = png(picture), "png"
    if len(encoded) > _LOSSLESS_BYTES:
        encoded, kind = encode_picture(picture, "WEBP", quality=70, method=6), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def png(picture: Tensor | None) -> bytes:
    """Return a picture, float [3, H, W] in [0, 1], as PNG bytes; one white pixel for None."""
    return encode_picture(torch.ones(3, 1, 1) if picture is None else picture)
