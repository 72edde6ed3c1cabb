"""open_dataset: find a dataset by name or path, and open it without reading its test half."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from ddray import seeding
from ddray.data import parquet, sources
from ddray.data.catalog import KNOWN, KnownDataset
from ddray.data.dataset import Dataset, Split, stratified_holdout
from ddray.data.pixels import channel_statistics
from ddray.errors import InputError, did_you_mean

TEST_FRACTION = 0.2  # of datasets that come without a split of their own


def dataset_names() -> list[str]:
    """Return the names that `open_dataset` knows."""
    return list(KNOWN)


def open_dataset(name_or_path: str, *, data_dir: Path | None = None, download: bool = False) -> Dataset:
    if name_or_path == "digits":
        return _digits()
    if name_or_path in KNOWN:
        root = data_dir or Path(os.environ.get("DDRAY_DATA", "."))
        known = KNOWN[name_or_path]
        train, test = parquet.shards(root / name_or_path)
        return _from_parquet(name_or_path, known, train, test)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        train, test = parquet.shards(path)
        return _from_parquet(str(path.resolve()), KnownDataset((0, 0, 0)), train, test)
    raise InputError(f"dataset must be one of {', '.join(KNOWN)}, or a folder, got {name_or_path!r}{did_you_mean(name_or_path, KNOWN)}")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    held = load_digits()
    images = torch.from_numpy(held.images)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False).round().to(torch.uint8)
    whole = Split(images, torch.from_numpy(held.target).long())
    test = stratified_holdout(whole.labels, TEST_FRACTION, seeding.derive(0, "data", "test"))
    train = whole.select((~test).nonzero()[:, 0])
    mean, std = channel_statistics(train.images)
    return Dataset("digits", KNOWN["digits"].class_names, (1, 16, 16), mean, std, False, lambda: train, lambda: whole.select(test.nonzero()[:, 0]))


def _from_parquet(name, known, train, test):  # type: ignore[no-untyped-def]
    geometry = sources.Geometry(known.shape, known.resize) if known.shape[0] else None
    names = parquet.class_names(train)
    split, geometry = sources.load(parquet.parquet_source(train), geometry) if geometry is None else (None, geometry)
    load = lambda files: sources.load(parquet.parquet_source(files), geometry)[0]
    mean, std = (known.mean, known.std) if known.mean else channel_statistics(split.images)
    return Dataset(name, names, geometry.shape, mean, std, known.can_flip, (lambda: split) if split else partial(load, train), partial(load, test))
