"""What a reader of a folder returns: a Layout of two Sources, which are decoded into cached arrays."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch import Tensor

from ddray import seeding
from ddray.data import cache
from ddray.data.dataset import Split, stratified_holdout
from ddray.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

_TASK = 64  # images per task of the thread pool: fewer would be all bookkeeping
_GREY_MODES = {"1", "L", "LA", "La"}
_DEEP_MODES = ("I", "F")  # 16 or 32 bits per channel
STANDARD_SIZES = (128, 64, 32)
MAX_KEPT = 256


@dataclass(frozen=True)
class Item:
    """One encoded image."""

    where: str  # its file (and row), for messages
    label: int
    data: bytes | Path  # the encoded bytes, or the file that holds them

    def read(self) -> bytes:
        """Return the encoded bytes."""
        if isinstance(self.data, bytes):
            return self.data
        try:
            return self.data.read_bytes()
        except OSError as error:
            raise InputError(f"image file must be readable, got {self.where}: {error.strerror}") from error


@dataclass(frozen=True)
class Source:
    """The images of one half of a dataset, listed but not yet read."""

    files: Sequence[Path]  # every file that decides the content, for the cache's key
    count: Callable[[], int]  # returns the number of images
    batches: Callable[[], Iterator[Sequence[Item]]]  # yields them in order, a batch at a time
    labelling: str = ""  # anything else that determines the labels, such as the order of the classes


@dataclass(frozen=True)
class Geometry:
    """What decoded images look like."""

    shape: tuple[int, int, int]  # (C, H, W)
    # Whether other sizes are resized to it (short side, antialiased bilinear, centre crop) or refused.
    resize: bool
    rule: str = field(default="", compare=False, repr=False)  # how it was chosen


Size = Geometry | int | None
"""What images are read as: a geometry, squares of so many pixels, or whatever the reader chooses."""


@dataclass(frozen=True)
class Layout:
    """A dataset found on disk, not yet read.

    `train` reads train, and returns it with its geometry. `test` reads test in train's geometry; no image of
    it is touched before. `options` are the options of content that its reader takes, besides `image_size`
    and `can_flip`, which every reader does.
    """

    class_names: tuple[str, ...]
    train: Callable[[Size], tuple[Split, Geometry]]
    test: Callable[[Geometry], Split]
    options: tuple[str, ...] = ()


def fixed_test(labels: Tensor) -> Tensor:
    """Return bool [N]: the fixed, stratified 20% that are test where a dataset has no split."""
    return stratified_holdout(labels, 0.2, seeding.derive(0, "data", "test"))


def from_sources(class_names: tuple[str, ...], train: Source, test: Callable[[], Source]) -> Layout:
    """Return the layout of two halves; `test` lists its files when it is read."""
    return Layout(class_names, functools.partial(load, train), lambda geometry: load(test(), geometry)[0])


def from_one_source(class_names: tuple[str, ...], whole: Source) -> Layout:
    """Return the layout of a source without a split: 20% of it is test."""

    @functools.cache
    def read(size: Size) -> tuple[Split, Geometry]:
        return load(whole, size)

    def train(size: Size) -> tuple[Split, Geometry]:
        split, used_geometry = read(size)
        return split.select(~fixed_test(split.labels)), used_geometry

    def test(geometry: Geometry) -> Split:
        split, _ = read(geometry)
        return split.select(fixed_test(split.labels))

    return Layout(class_names, train, test)


def load(source: Source, size: Size) -> tuple[Split, Geometry]:
    """Decode a source in a geometry (not given: chosen by `survey`), or take it from the cache.

    Raises:
        InputError: there is no image, one cannot be read, or has a size that `geometry` refuses.
        StorageError: the cache cannot be written.
    """

    def build(folder: Path) -> dict[str, object]:
        if source.count() == 0:
            raise InputError(
                "a dataset must have images, got none" + (f" in {source.files[0]}" if source.files else "")
            )
        used_geometry = size if isinstance(size, Geometry) else survey(source, size)
        _decode_into(source, used_geometry, folder)
        return {"shape": used_geometry.shape, "resize": used_geometry.resize}

    version = "v1" if isinstance(size, Geometry) else "v2"  # v2: `survey` keeps squares up to 256 px
    settings = f"images {version} {size} {source.labelling}"
    split, facts = cache.fetch(source.files, settings, build)
    return split, Geometry((facts["shape"][0], facts["shape"][1], facts["shape"][2]), facts["resize"])


def survey(source: Source, side: int | None = None) -> Geometry:
    """Choose the geometry of a folder without a catalog entry, from its images' headers; `side` if it is set.

    Square images of one size up to 256 px keep it, and other sizes are then refused: such a folder was
    prepared at that size (imagenette at 224). Everything else is resized to the largest of 128, 64, 32 px
    that the median short side reaches (to 32 below that). One channel if all images are grey, else three.
    """
    headers = [header for task in _in_threads(_headers, source) for header in task]
    sizes = [size for size, _ in headers]
    channels = 1 if all(is_grey for _, is_grey in headers) else 3
    if side is not None:
        return Geometry((channels, side, side), resize=True, rule="image_size")
    width, height = sizes[0]
    if width == height <= MAX_KEPT and len(set(sizes)) == 1:
        return Geometry((channels, height, width), resize=False)
    median = float(np.median([min(size) for size in sizes]))
    side = next((size for size in STANDARD_SIZES if size <= median), STANDARD_SIZES[-1])
    return Geometry((channels, side, side), resize=True)


def _in_threads(function: Callable[[int, Sequence[Item]], T], source: Source) -> Iterator[T]:
    """Yield `function(first row, images)` for every 64 images; Pillow releases the interpreter lock."""
    first = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in source.batches():
            tasks = chunks(batch, _TASK)
            yield from pool.map(function, range(first, first + len(batch), _TASK), tasks)
            first += len(batch)


def chunks(entries: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a sequence into pieces of `size`, the last one shorter."""
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def _headers(_: int, items: Sequence[Item]) -> list[tuple[tuple[int, int], bool]]:
    """Return ((width, height), is grey) of each image without decoding it."""
    headers = []
    for item in items:
        with _opened(item) as image:
            headers.append((image.size, image.mode in _GREY_MODES))
    return headers


def _opened(item: Item) -> Image.Image:
    """Open an image; its pixels are decoded later."""
    from PIL import Image

    with _readable(item):
        return Image.open(io.BytesIO(item.read()))


@contextmanager
def _readable(item: Item) -> Iterator[None]:
    """Turn what Pillow raises for a broken image into an InputError."""
    from PIL import Image

    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        reason = "no image format that Pillow knows" if "identify" in reason else reason
        raise InputError(f"image must be readable, got {item.where}: {reason}") from error


def decode(item: Item, geometry: Geometry) -> np.ndarray:
    """Return an image as uint8 [C, H, W].

    Raises:
        InputError: it cannot be decoded, has more than 8 bits per channel, or a size that `geometry` refuses.
    """
    channels, height, width = geometry.shape
    with _opened(item) as image:
        if image.mode.startswith(_DEEP_MODES):
            raise InputError(f"images must have 8 bits per channel, got mode {image.mode} in {item.where}")
        if image.size != (width, height) and not geometry.resize:
            raise InputError(
                f"images must be {width}x{height} like the rest of their dataset, "
                f"got {image.width}x{image.height} in {item.where}"
            )
        with _readable(item):
            if image.mode == "P":
                image = image.convert("RGBA")  # a palette may hold transparent colours; keep their RGB part
            image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = _fit(image, width, height)
        pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale until the frame is just covered, then crop its centre."""
    from PIL import Image

    ratio = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * ratio)), max(height, round(image.height * ratio)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _decode_into(source: Source, geometry: Geometry, folder: Path) -> None:
    """Write images.npy (through a memory map, so it may exceed the memory) and labels.npy."""
    file, num = folder / cache.IMAGES, source.count()
    images = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(num, *geometry.shape))
    with file.open("r+b") as opened:
        # Without it a full disk shows up inside the memory map, as a fatal SIGBUS.
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    labels = np.empty(num, dtype=np.int64)

    def fill(start: int, items: Sequence[Item]) -> None:
        for row, item in enumerate(items, start):
            images[row] = decode(item, geometry)
            labels[row] = item.label

    for _ in _in_threads(fill, source):
        pass
    images.flush()
    np.save(folder / cache.LABELS, labels)
