"""Layout: what every reader of a folder hands back to `open_dataset`."""

from __future__ import annotations

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

TEST_FRACTION: Final = 0.2  # of datasets that come without a split of their own


@dataclass(frozen=True)
class Layout:
    """A dataset found on disk, not yet read.

    Attributes:
        class_names: one per label.
        train: reads train in a geometry, or in one of its choice (None), and returns it with the geometry.
        test: reads test in train's geometry; nothing of test is touched before.
    """

    class_names: tuple[str, ...]
    train: Callable[[Geometry | None], tuple[Split, Geometry]]
    test: Callable[[Geometry], Split]


def fixed_test(labels: Tensor) -> Tensor:
    """Return bool [N]: the stratified 20% that are test where a dataset has no split, always the same."""
    return stratified_holdout(labels, TEST_FRACTION, seeding.derive(0, "data", "test"))


def from_sources(class_names: tuple[str, ...], train: Source, test: Callable[[], Source]) -> Layout:
    """Return the layout of two halves; `test` lists its files when it is read."""
    return Layout(
        class_names, partial(sources.load, train), lambda geometry: sources.load(test(), geometry)[0]
    )


def from_one_source(class_names: tuple[str, ...], whole: Source) -> Layout:
    """Return the layout of a source without a split: 20% of it are test."""

    @cache
    def read(geometry: Geometry | None) -> tuple[Split, Geometry]:
        return sources.load(whole, geometry)

    def train(geometry: Geometry | None) -> tuple[Split, Geometry]:
        split, chosen = read(geometry)
        return split.select((~fixed_test(split.labels)).nonzero()[:, 0]), chosen

    def test(geometry: Geometry) -> Split:
        split, _ = read(geometry)
        return split.select(fixed_test(split.labels).nonzero()[:, 0])

    return Layout(class_names, train, test)


def halves(labels: list[int]) -> tuple[list[int], list[int]]:
    """Return the positions of (train, test) among samples without a split of their own."""
    test = fixed_test(torch.tensor(labels, dtype=torch.long)).tolist()
    return [i for i, held in enumerate(test) if not held], [i for i, held in enumerate(test) if held]
