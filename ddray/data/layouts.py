"""Layout: what every reader of a folder returns to `open_dataset`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import torch
from torch import Tensor

from ddray import seeding
from ddray.data import sources
from ddray.data.dataset import Split, stratified_holdout
from ddray.data.sources import Geometry, Source

TEST_FRACTION: Final = 0.2  # of datasets without their own split


@dataclass(frozen=True)
class Layout:
    """A dataset found on disk, not yet read.

    Attributes:
        class_names: one per label.
        train: reads train in a geometry (None: one it chooses), and returns it with the geometry.
        test: reads test in train's geometry; nothing of test is touched before.
    """

    class_names: tuple[str, ...]
    train: Callable[[Geometry | None], tuple[Split, Geometry]]
    test: Callable[[Geometry], Split]


def fixed_test(labels: Tensor) -> Tensor:
    """Return bool [N]: the fixed, stratified 20% that are test where a dataset has no split."""
    return stratified_holdout(labels, TEST_FRACTION, seeding.derive(0, "data", "test"))


def from_sources(class_names: tuple[str, ...], train: Source, test: Callable[[], Source]) -> Layout:
    """Return the layout of two halves; `test` lists its files when it is read."""
    return Layout(
        class_names, partial(sources.load, train), lambda geometry: sources.load(test(), geometry)[0]
    )


def from_one_source(class_names: tuple[str, ...], whole: Source) -> Layout:
    """Return the layout of a source without a split: 20% of it is test."""

    @cache
    def read(geometry: Geometry | None) -> tuple[Split, Geometry]:
        return sources.load(whole, geometry)

    def train(geometry: Geometry | None) -> tuple[Split, Geometry]:
        split, used_geometry = read(geometry)
        return split.select((~fixed_test(split.labels)).nonzero()[:, 0]), used_geometry

    def test(geometry: Geometry) -> Split:
        split, _ = read(geometry)
        return split.select(fixed_test(split.labels).nonzero()[:, 0])

    return Layout(class_names, train, test)


def halves(labels: list[int]) -> tuple[list[int], list[int]]:
    """Return the positions of (train, test) among samples without their own split."""
    test = fixed_test(torch.tensor(labels, dtype=torch.long)).tolist()
    return [i for i, is_test in enumerate(test) if not is_test], [
        i for i, is_test in enumerate(test) if is_test
    ]
