"""What a reader of a folder returns: a Layout of two Sources, which are decoded into cached arrays."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from ddray import seeding
from ddray.data import cache
from ddray.data.dataset import Split, stratified_holdout
from ddray.data.listing import Skipped
from ddray.data.pictures import RESIZED, Change, decode, header
from ddray.errors import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")

_TASK = 64  # images per task of the thread pool: fewer would be all bookkeeping
_EXAMPLES = 2  # images that a warning names
STANDARD_SIZES = (128, 64, 32)
MAX_KEPT = 256


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
    and `can_flip`, which every reader does. `skipped` is what is left out, except of test.
    """

    class_names: tuple[str, ...]
    train: Callable[[Size], tuple[Split, Geometry]]
    test: Callable[[Geometry], Split]
    options: tuple[str, ...] = ()
    skipped: Skipped | None = None


def fixed_test(labels: Tensor) -> Tensor:
    """Return bool [N]: the fixed, stratified 20% that are test where a dataset has no split."""
    return stratified_holdout(labels, 0.2, seeding.derive(0, "data", "test"))


def from_sources(class_names: tuple[str, ...], train: Source, test: Callable[[], Source]) -> Layout:
    """Return the layout of two halves; `test` lists its files when it is read."""
    return Layout(class_names, functools.partial(load, train), lambda geometry: load(test(), geometry)[0])


def from_one_source(class_names: tuple[str, ...], whole: Source) -> Layout:
    """Return the layout of a source without a split: 20% of it is test."""
    splits: dict[Geometry, Split] = {}  # what is read for train gives test too

    def train(size: Size) -> tuple[Split, Geometry]:
        split, used_geometry = load(whole, size)
        splits[used_geometry] = split
        return split.select(~fixed_test(split.labels)), used_geometry

    def test(geometry: Geometry) -> Split:
        split = splits[geometry] if geometry in splits else load(whole, geometry)[0]
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
        notes = _decode_into(source, used_geometry, folder)
        return {**dataclasses.asdict(used_geometry), "notes": notes}

    split, facts = cache.fetch(source.files, f"images v3 {size} {source.labelling}", build)
    for note in facts["notes"]:
        log.warning("%s", note)
    return split, Geometry(
        (facts["shape"][0], facts["shape"][1], facts["shape"][2]), facts["resize"], facts["rule"]
    )


def survey(source: Source, side: int | None = None) -> Geometry:
    """Choose the geometry of a folder without a catalog entry, from its images' headers; `side` if it is set.

    The size of most images, if they are square and have up to 256 px: such a folder was prepared at that size
    (imagenette at 224), and the others are resized to it. Otherwise all are resized to the largest of 128,
    64, 32 px that the median short side reaches (to 32 below that). One channel if all images are grey, else
    three.
    """
    headers = [
        pair for task in _in_threads(lambda _, items: list(map(header, items)), source) for pair in task
    ]
    sizes = [size for size, _ in headers]
    channels = 1 if all(is_grey for _, is_grey in headers) else 3
    if side is not None:
        return Geometry((channels, side, side), resize=True, rule="image_size")
    ((width, height), num), *_ = Counter(sizes).most_common(1)
    if width == height <= MAX_KEPT and 2 * num > len(sizes):
        rule = f"that of {num} of {len(sizes)} train images"
        return Geometry((channels, height, width), resize=True, rule=rule)
    median = float(np.median([min(size) for size in sizes]))
    side = next((size for size in STANDARD_SIZES if size <= median), STANDARD_SIZES[-1])
    rule = f"the largest of 128, 64, 32 up to train's median short side, {median:g}"
    return Geometry((channels, side, side), resize=True, rule=rule)


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


def _decode_into(source: Source, geometry: Geometry, folder: Path) -> list[str]:
    """Write images.npy (through a memory map, so it may exceed the memory) and labels.npy.

    Return a line for each kind of change that images went through.
    """
    file, num = folder / cache.IMAGES, source.count()
    images = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(num, *geometry.shape))
    with file.open("r+b") as opened:
        # Without it a full disk shows up inside the memory map, as a fatal SIGBUS.
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    labels = np.empty(num, dtype=np.int64)

    def fill(start: int, items: Sequence[Item]) -> list[Change]:
        changes: list[Change] = []
        for row, item in enumerate(items, start):
            images[row], of_item = decode(item, geometry)
            labels[row] = item.label
            changes += [*((kind, item.where) for kind in item.changes), *of_item]
        return changes

    examples: dict[str, list[str]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for kind, where in chain.from_iterable(_in_threads(fill, source)):
        counts[kind] += 1
        if counts[kind] <= _EXAMPLES:
            examples[kind].append(where)
    images.flush()
    np.save(folder / cache.LABELS, labels)
    size = f" (to {geometry.shape[2]}x{geometry.shape[1]})"
    return [
        f"{counts[kind]} of {num} images are {kind}{size * (kind == RESIZED)}, such as {', '.join(places)}"
        for kind, places in examples.items()
    ]
