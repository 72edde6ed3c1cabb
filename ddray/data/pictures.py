"""Encoded pictures: their headers, and their pixels upright, on white, with 8 bits, in one size."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

from ddray.errors import DdrayError, InputError, one_line
from ddray.system.files import reading_error

if TYPE_CHECKING:
    from PIL import Image

GREY_MODES: Final = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
_DEEP_FORMATS: Final = ("PNG", "PPM")  # their mode I means 16 bits per channel
_EXIF: Final = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"))
_SPECIAL: Final = _EXIF | {"transparency"}
_BROKEN: Final = (OSError, SyntaxError, ValueError)  # and Image.DecompressionBombError
_ORIENTATION: Final = 0x0112

TURNED: Final = "turned upright, as their orientation tag says"
ON_WHITE: Final = "laid on white where they are transparent"
SCALED: Final = "scaled from 16 bits per channel to 8"
FIRST_FRAME: Final = "read by their first frame only"
GREYED: Final = "coloured, and read as grey like the rest of their dataset"
RESIZED: Final = "resized, and cropped at the centre if they aren't square"


Change = tuple[str, str]
"""What was done to a picture, and where it is (with its size, if that changed)."""


@dataclass(frozen=True)
class Item:
    """One encoded image."""

    where: str  # its file (and row), for messages
    label: int
    data: bytes | Path  # the encoded bytes, or the file that holds them
    changes: tuple[str, ...] = ()  # what was done to it already, to be counted

    def read(self) -> bytes:
        """Return the encoded bytes."""
        if isinstance(self.data, bytes):
            return self.data
        with self.opened() as file:
            return file.read()

    def opened(self) -> BinaryIO:
        """Return the encoded bytes as an open file, of which a header is read alone."""
        if isinstance(self.data, bytes):
            return io.BytesIO(self.data)
        try:
            return self.data.open("rb")
        except OSError as error:
            message = f"image file must be readable, got {self.where}: {error.strerror}"
            raise reading_error(message, error) from error


@dataclass(frozen=True)
class Geometry:
    """What decoded images look like."""

    shape: tuple[int, int, int]  # (C, H, W)
    # Whether other sizes are resized to it (short side, antialiased bilinear, centre crop) or refused.
    resize: bool
    rule: str = field(default="", compare=False, repr=False)  # how it was chosen


def header(item: Item) -> tuple[tuple[int, int], bool]:
    """Return an image's (width, height), upright, and whether it is grey, without decoding it."""
    from PIL import Image

    try:
        with item.opened() as file, Image.open(file) as image:
            turned = image.format != "TIFF" and _orientation(image) > 4  # Pillow turns TIFF files itself
            is_grey = image.mode in GREY_MODES or (image.mode == "RGBA" and _raw_mode(image) == "LA;16B")
            return image.size[::-1] if turned else image.size, is_grey
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(item, error) from error


def decode(item: Item, geometry: Geometry) -> tuple[np.ndarray, list[Change]]:
    """Return an image as uint8 [C, H, W], and what was done to it.

    Raises:
        InputError: it can't be decoded, has more than 16 bits per channel, or a size that `geometry` refuses.
        StorageError: the disk fails.
    """
    from PIL import Image

    channels, height, width = geometry.shape
    mode, where = "L" if channels == 1 else "RGB", item.where
    changes: list[str] = []
    try:
        with Image.open(io.BytesIO(item.read())) as image:
            pixels = _prepared(image, item, mode, changes)
            if pixels.size != (width, height):
                where = f"{where} ({pixels.width}x{pixels.height})"
                if not geometry.resize:
                    raise InputError(
                        f"images must be {width}x{height} like the rest of their dataset, got "
                        f"{pixels.width}x{pixels.height} in {item.where}; --image-size N brings all to N x N"
                    )
                pixels = _fit(pixels, width, height)
                changes.append(RESIZED)
            array = np.array(pixels)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise _unreadable(item, error) from error
    return array[None] if channels == 1 else array.transpose(2, 0, 1), [(kind, where) for kind in changes]


def _prepared(image: Image.Image, item: Item, mode: str, changes: list[str]) -> Image.Image:
    """Return an image in a mode (L, RGB): upright, opaque, 8 bits; add what was done to `changes`."""
    from PIL import Image, ImageOps

    tiles = getattr(image, "tile", None)
    is_plain = image.mode == mode and tiles and tiles[0][3] in (mode, (mode, ""))
    is_deep, orientation = not is_plain and _is_deep(image), _orientation(image)
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photograph and its thumbnails
        changes.append(FIRST_FRAME)
    image.load()
    if is_plain and _SPECIAL.isdisjoint(image.info):
        return image
    if image.format == "PNG":  # its tag may follow the pixels
        orientation = _orientation(image)
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
        changes.append(TURNED)
    if is_deep:
        changes.append(SCALED)
    if image.mode.startswith(("I", "F")):
        if not is_deep:
            raise InputError(
                f"images must have 8 or 16 bits per channel, got mode {image.mode} in {item.where}; convert "
                "them to 8"
            )
        deep, hidden = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((deep >> 8).astype(np.uint8))
        if isinstance(hidden, int) and (deep == hidden).any():
            image.paste(255, mask=Image.fromarray(deep == hidden))
            changes.append(ON_WHITE)
    elif image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            changes.append(ON_WHITE)
    if mode == "L" and image.mode not in GREY_MODES:
        colours = np.asarray(image.convert("RGB"))
        if (colours != colours[..., :1]).any():
            changes.append(GREYED)
    return image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """Return the orientation tag of an image, 1 (upright) to 8; its pixels are not decoded for it."""
    if _EXIF.isdisjoint(image.info) and image.format != "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken tag turns nothing
        return 1
    return value if value in range(1, 9) else 1


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image that isn't decoded yet has 16 bits per channel."""
    if image.mode == "I":
        return image.format in _DEEP_FORMATS
    tiles = getattr(image, "tile", None)
    if image.format == "PPM" and tiles and isinstance(tiles[0][3], tuple):
        return isinstance(tiles[0][3][-1], int) and tiles[0][3][-1] > 255
    return image.mode.startswith("I;16") or ";16" in _raw_mode(image)


def _raw_mode(image: Image.Image) -> str:
    """Return how the file of an image that isn't decoded yet has its pixels, such as `RGB;16B`."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _unreadable(item: Item, error: Exception) -> DdrayError:
    """Return the error for an image that Pillow can't read."""
    reason = one_line(error)
    reason = "no image format that Pillow knows" if "identify" in reason else reason
    return reading_error(f"image must be readable, got {item.where}: {reason}", error)


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale until the frame is just covered, then crop its centre."""
    from PIL import Image

    ratio = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * ratio)), max(height, round(image.height * ratio)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def resized(images: Tensor, side: int) -> Tensor:
    """Return uint8 images [N, C, H, W] as squares [N, C, side, side], resized as encoded ones are."""
    from PIL import Image

    output = torch.empty(*images.shape[:2], side, side, dtype=torch.uint8)
    for image, target in zip(images.flatten(0, 1).numpy(), output.flatten(0, 1), strict=True):
        target.copy_(torch.from_numpy(np.array(_fit(Image.fromarray(image), side, side))))
    return output
