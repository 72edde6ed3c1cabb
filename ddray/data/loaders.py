"""open_dataset: find a dataset by name or path, and open it without reading its test half."""

import os
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ddray.config import Result
from ddray.data import parquet, vision
from ddray.data.catalog import KNOWN, KnownDataset
from ddray.data.dataset import Dataset, Split
from ddray.data.folders import layout_of_cub, layout_of_dogs, layout_of_folder
from ddray.data.pixels import channel_statistics
from ddray.data.sources import Geometry, Layout, fixed_test
from ddray.data.speech import layout_of_wavs
from ddray.errors import InputError, did_you_mean


def dataset_names() -> list[str]:
    """Return the names that `open_dataset` knows."""
    return list(KNOWN)


def open_dataset(name_or_path: str, *, data_dir: Path | None = None, download: bool = False) -> Dataset:
    """Open a dataset; train is read on first use (a PATH's at once, to measure it), test on first use.

    A known name is looked for under the data directory: in its own folder as parquet shards, as an image
    folder or in its official layout, and in torchvision's layout. An ImageNet subset is also carved out of an
    `imagenet` folder. A path is any folder of parquet shards, of images by class, or of wav files by class;
    its image size is chosen by `sources.survey`.

    Args:
        name_or_path: one of `dataset_names()`, or a folder.
        data_dir: the data directory; None: `$DDRAY_DATA`.
        download: whether torchvision may download what is not found.

    Raises:
        InputError: the name is unknown and no folder; nothing is found; a train file is corrupt.
        DdrayError: the download failed.
    """
    if name_or_path in KNOWN:
        return _open_named(name_or_path, data_dir, download=download)
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        hint = did_you_mean(name_or_path, KNOWN)
        raise InputError(
            f"dataset must be one of {', '.join(KNOWN)}, or a folder, got {name_or_path!r}{hint}"
        )
    path = path.absolute()
    layout = parquet.layout_of_parquet(path) or layout_of_wavs(path) or layout_of_folder(path)
    if layout is None:
        raise InputError(
            "a dataset folder must hold train-*.parquet shards, or a folder of images or wav files per class "
            f"(also below train/ and test/), got {path}"
        )
    split, geometry = layout.train(None)
    mean, std = channel_statistics(split.images)
    return Dataset(
        name=str(path),
        class_names=layout.class_names,
        image_shape=geometry.shape,
        mean=mean,
        std=std,
        can_flip=split.images.dtype == torch.uint8,  # spectrograms have a direction
        load_train=lambda: split,
        load_test=lambda: layout.test(geometry),
    )


def _open_named(name: str, data_dir: Path | None, *, download: bool) -> Dataset:
    spec = KNOWN[name]
    layout = _digits(spec) if spec.layout == "sklearn" else _find_named(name, data_dir, download=download)
    geometry = Geometry(spec.shape, spec.resize)
    mean, std = spec.mean, spec.std
    if not mean:
        mean, std = channel_statistics(layout.train(geometry)[0].images)
    return Dataset(
        name=name,
        class_names=layout.class_names,
        image_shape=spec.shape,
        mean=mean,
        std=std,
        can_flip=spec.can_flip,
        load_train=lambda: layout.train(geometry)[0],
        load_test=lambda: layout.test(geometry),
    )


def _digits(spec: KnownDataset) -> Layout:
    """Return scikit-learn's 8x8 digits (0..16), up-sampled to 16x16; test is a fixed stratified 20%."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images)[:, None] * (255 / 16)
    large = F.interpolate(pixels, size=(16, 16), mode="bilinear", align_corners=False)
    whole = Split(large.round().to(torch.uint8), torch.from_numpy(bunch.target).long())
    in_test = fixed_test(whole.labels)
    train = whole.select(~in_test), Geometry(spec.shape, spec.resize)
    return Layout(spec.class_names, lambda _: train, lambda _: whole.select(in_test))


def _find_named(name: str, data_dir: Path | None, *, download: bool) -> Layout:
    """Return the layout of a dataset below the data directory.

    Raises:
        InputError: there is none, or it has another number of classes.
        DdrayError: the download failed.
    """
    spec = KNOWN[name]
    advice = "give --data-dir or set $DDRAY_DATA" + (", or add --download" if spec.torchvision else "")
    directory = data_dir or os.environ.get("DDRAY_DATA")
    if not directory:
        raise InputError(f"dataset {name} needs a data directory, got none; {advice}")
    root = Path(directory).expanduser().absolute()
    layout = _find(name, root)
    if layout is None and download and spec.torchvision:
        vision.download(root, spec)
        layout = _find(name, root)
    if layout is None:
        searched = _folders(name, root)
        if spec.marker:
            searched.append(root / spec.marker)
        if spec.wnids:
            searched += _folders("imagenet", root)
        raise InputError(
            f"dataset {name} must lie under the data directory, "
            f"found none of {', '.join(map(str, searched))}; {advice}"
        )
    if spec.class_names and len(layout.class_names) != len(spec.class_names):
        raise InputError(
            f"dataset {name} must have {len(spec.class_names)} classes, "
            f"got {len(layout.class_names)} under {root}"
        )
    return layout


def _folders(name: str, root: Path) -> list[Path]:
    """Return the folders that a named dataset may be in."""
    return [root / name, *(root / folder for folder in KNOWN[name].folders)]


def _find(name: str, root: Path) -> Layout | None:
    """Return the layout of a named dataset: in a folder of its own, torchvision's, a subset of ImageNet's."""
    spec, folders = KNOWN[name], _folders(name, root)
    bases = [base for base in (root, *folders) if spec.marker and (base / spec.marker).exists()]
    layouts = chain(
        (_layout_of_named(spec, folder) for folder in folders),
        (vision.layout_of_torchvision(base, spec) for base in bases),
        (
            layout_of_folder(folder, spec.wnids, spec.class_names)
            for folder in (_folders("imagenet", root) if spec.wnids else [])
        ),
    )
    return next(filter(None, layouts), None)


def _layout_of_named(spec: KnownDataset, folder: Path) -> Layout | None:
    """Return the layout of a named dataset in a folder of its own, or None."""
    if spec.layout == "wavs":
        return layout_of_wavs(folder)
    official = None
    if spec.layout == "cub":
        official = layout_of_cub(folder) or layout_of_cub(folder / "CUB_200_2011")
    elif spec.layout == "dogs":
        official = layout_of_dogs(folder)
    return (
        official
        or parquet.layout_of_parquet(folder, spec.class_names)
        or layout_of_folder(folder, spec.wnids, spec.class_names)
    )


class DatasetInfo(Result):
    """What `ddray data info` returns."""

    name: str
    num_classes: int
    num_train: int
    num_test: int
    image_shape: list[int]
    fingerprint: str
    class_names: list[str]


class DatasetList(Result):
    """What `ddray data list` returns: name and whether it was found."""

    datasets: list[dict[str, Any]]


def list_datasets(*, data_dir: Path | None = None) -> DatasetList:
    """Return the catalog's datasets, and which of them are there."""
    there = dict.fromkeys(KNOWN, False)
    for name in there:
        with suppress(InputError):
            open_dataset(name, data_dir=data_dir)
            there[name] = True
    return DatasetList(datasets=[{"name": name, "found": is_there} for name, is_there in there.items()])


def data_info(name: str, *, data_dir: Path | None = None, download: bool = False) -> DatasetInfo:
    """Return what a dataset holds."""
    dataset = open_dataset(name, data_dir=data_dir, download=download)
    return DatasetInfo(
        name=dataset.name,
        num_classes=dataset.num_classes,
        num_train=len(dataset.train()),
        num_test=len(dataset.test()),
        image_shape=list(dataset.image_shape),
        fingerprint=dataset.fingerprint,
        class_names=list(dataset.class_names),
    )
