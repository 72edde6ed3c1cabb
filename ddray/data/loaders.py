"""open_dataset: find a dataset by name or path, and open it without reading its test half."""

import os
from contextlib import suppress
from dataclasses import replace
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
from ddray.data.reference import DatasetRef
from ddray.data.sources import Geometry, Layout, fixed_test
from ddray.data.speech import layout_of_wavs
from ddray.errors import InputError, did_you_mean


def dataset_names() -> list[str]:
    """Return the names that `open_dataset` knows."""
    return list(KNOWN)


def open_dataset(
    reference: str, *, data_dir: Path | None = None, download: bool = False, **content: Any
) -> Dataset:
    """Open a dataset; train is read on first use (a PATH's at once, to measure it), test on first use.

    A known name is looked for under the data directory: in its own folder as parquet shards, as an image
    folder or in its official layout, and in torchvision's layout. An ImageNet subset is also carved out of an
    `imagenet` folder. A path is any folder of parquet shards, of images by class, or of wav files by class;
    its image size is chosen by `sources.survey`.

    Args:
        reference: one of `dataset_names()`, or a folder; options may follow, as `DatasetRef` writes them.
        data_dir: the data directory; None: `$DDRAY_DATA`.
        download: whether torchvision may download what is not found.
        content: options of content (`ContentOptions`), such as `image_size=64`; they win over those in the
            reference.

    Raises:
        InputError: the name is unknown and no folder; nothing is found; a train file is corrupt; an option
            is bad, or not one of this dataset's kind.
        DdrayError: the download failed.
    """
    ref = DatasetRef.parse(reference).with_options(**content)
    if ref.base in KNOWN:
        return _open_named(ref, data_dir, download=download)
    path = Path(ref.base).expanduser()
    if not path.is_dir():
        hint = did_you_mean(ref.base, KNOWN)
        raise InputError(f"dataset must be one of {', '.join(KNOWN)}, or a folder, got {ref.base!r}{hint}")
    layout = _layout_of_path(path.absolute(), ref)
    split, geometry = layout.train(ref.image_size)
    is_image = split.images.dtype == torch.uint8  # spectrograms have a direction
    read = replace(layout, train=lambda _: (split, geometry))
    return _dataset(ref.absolute(), read, geometry, channel_statistics(split.images), can_flip=is_image)


def _layout_of_path(path: Path, ref: DatasetRef) -> Layout:
    """Return the layout of a folder; InputError if it has none, or one that an option does not apply to."""
    layout = parquet.layout_of_parquet(path) or layout_of_wavs(path, ref) or layout_of_folder(path)
    if layout is None:
        raise InputError(
            "a dataset folder must hold train-*.parquet shards, or a folder of images or wav files per class "
            f"(also below train/ and test/), got {path}"
        )
    return _checked(layout, ref)


def _checked(layout: Layout, ref: DatasetRef) -> Layout:
    """Return a layout whose reader takes every option of the reference; InputError for others."""
    for option, value in ref.content().items():
        if option not in ("image_size", "can_flip", *layout.options):
            raise InputError(f"{option} must be left out for {ref.base}, whose files have none, got {value}")
    return layout


def _dataset(
    ref: DatasetRef,
    layout: Layout,
    geometry: Geometry,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    can_flip: bool,
) -> Dataset:
    """Return a dataset that is read in a geometry."""
    return Dataset(
        name=str(ref),
        class_names=layout.class_names,
        image_shape=geometry.shape,
        mean=statistics[0],
        std=statistics[1],
        can_flip=can_flip if ref.can_flip is None else ref.can_flip,
        load_train=lambda: layout.train(geometry)[0],
        load_test=lambda: layout.test(geometry),
        size_rule=geometry.rule,
    )


def _open_named(ref: DatasetRef, data_dir: Path | None, *, download: bool) -> Dataset:
    spec, size = KNOWN[ref.base], ref.image_size
    geometry = Geometry(spec.shape, spec.resize, f"as {ref.base} is used")
    if size is not None:
        geometry = Geometry((spec.shape[0], size, size), True, "image_size")
    if spec.layout == "sklearn":
        layout = _digits(spec, geometry)
    else:
        layout = _find_named(ref, data_dir, download=download)
    statistics = spec.mean, spec.std
    if not spec.mean:
        statistics = channel_statistics(layout.train(geometry)[0].images)
    return _dataset(ref, _checked(layout, ref), geometry, statistics, can_flip=spec.can_flip)


def _digits(spec: KnownDataset, geometry: Geometry) -> Layout:
    """Return scikit-learn's 8x8 digits (0..16), up-sampled, to 16x16; test is a fixed stratified 20%."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images)[:, None] * (255 / 16)
    large = F.interpolate(pixels, size=geometry.shape[1:], mode="bilinear", align_corners=False)
    whole = Split(large.round().to(torch.uint8), torch.from_numpy(bunch.target).long())
    in_test = fixed_test(whole.labels)
    train = whole.select(~in_test), geometry
    return Layout(spec.class_names, lambda _: train, lambda _: whole.select(in_test))


def _find_named(ref: DatasetRef, data_dir: Path | None, *, download: bool) -> Layout:
    """Return the layout of a dataset below the data directory.

    Raises:
        InputError: there is none, or it has another number of classes.
        DdrayError: the download failed.
    """
    name, spec = ref.base, KNOWN[ref.base]
    advice = "give --data-dir or set $DDRAY_DATA" + (", or add --download" if spec.torchvision else "")
    directory = data_dir or os.environ.get("DDRAY_DATA")
    if not directory:
        raise InputError(f"dataset {name} needs a data directory, got none; {advice}")
    root = Path(directory).expanduser().absolute()
    layout = _find(ref, root)
    if layout is None and download and spec.torchvision:
        vision.download(root, spec)
        layout = _find(ref, root)
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


def _find(ref: DatasetRef, root: Path) -> Layout | None:
    """Return the layout of a named dataset: in a folder of its own, torchvision's, a subset of ImageNet's."""
    spec, folders = KNOWN[ref.base], _folders(ref.base, root)
    bases = [base for base in (root, *folders) if spec.marker and (base / spec.marker).exists()]
    layouts = chain(
        (_layout_of_named(spec, folder, ref) for folder in folders),
        (vision.layout_of_torchvision(base, spec) for base in bases),
        (
            layout_of_folder(folder, spec.wnids, spec.class_names)
            for folder in (_folders("imagenet", root) if spec.wnids else [])
        ),
    )
    return next(filter(None, layouts), None)


def _layout_of_named(spec: KnownDataset, folder: Path, ref: DatasetRef) -> Layout | None:
    """Return the layout of a named dataset in a folder of its own, or None."""
    if spec.layout == "wavs":
        return layout_of_wavs(folder, ref)
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


def data_info(name: str, **options: Any) -> DatasetInfo:
    """Return what a dataset holds; `options` are those of `open_dataset`."""
    dataset = open_dataset(name, **options)
    return DatasetInfo(
        name=dataset.name,
        num_classes=dataset.num_classes,
        num_train=len(dataset.train()),
        num_test=len(dataset.test()),
        image_shape=list(dataset.image_shape),
        fingerprint=dataset.fingerprint,
        class_names=list(dataset.class_names),
    )
