"""What a reader of a folder returns: a Layout of two Sources, which are decoded once (`packing`)."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ddray import seeding
from ddray.data.dataset import Split, stratified_holdout
from ddray.data.listing import Skipped
from ddray.data.packing import in_threads, packed
from ddray.data.pictures import Geometry, Item, header

log = logging.getLogger(__name__)

STANDARD_SIZES = (128, 64, 32)
MAX_KEPT = 256


@dataclass(frozen=True)
class Source:
    """The images of one half of a dataset, listed but not yet read."""

    files: Sequence[Path]  # every file that decides the content, for the cache's key
    count: Callable[[], int]  # returns the number of images
    batches: Callable[[], Iterator[Sequence[Item]]]  # yields them in order, a batch at a time
    labelling: str = ""  # anything else that determines the labels, such as the order of the classes


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
    split, facts = packed(
        source,
        f"images v3 {size} {source.labelling}",
        lambda: size if isinstance(size, Geometry) else survey(source, size),
    )
    for note in facts["notes"]:
        log.warning("%s", note)
    channels, height, width = facts["shape"]
    return split, Geometry((channels, height, width), facts["resize"], facts["rule"])


def survey(source: Source, side: int | None = None) -> Geometry:
    """Choose the geometry of a folder without a catalog entry, from its images' headers; `side` if it is set.

    The size of most images, if they are square and have up to 256 px: such a folder was prepared at that size
    (imagenette at 224), and the others are resized to it. Otherwise all are resized to the largest of 128,
    64, 32 px that the median short side reaches (to 32 below that). One channel if all images are grey, else
    three.
    """
    batches = ((0, batch) for batch in source.batches())
    tasks = (
        task for _, tasks in in_threads(lambda _, items: list(map(header, items)), batches) for task in tasks
    )
    headers = [pair for task in tasks for pair in task]
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
