"""open_dataset: find a dataset by name or path, and open it without reading its test half."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F

from ddray.data import layouts, parquet, vision
from ddray.data.catalog import KNOWN, KnownDataset
from ddray.data.dataset import Dataset, Split
from ddray.data.folders import layout_of_cub, layout_of_dogs, layout_of_folder
from ddray.data.layouts import Layout
from ddray.data.pixels import channel_statistics
from ddray.data.sources import Geometry
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
    the size that its images are given is chosen by `sources.survey`.

    Args:
        name_or_path: one of `dataset_names()`, or a folder.
        data_dir: the data directory; None: `$DDRAY_DATA`.
        download: whether torchvision may download what is not found.

    Raises:
        InputError: the name is unknown and no folder; nothing is found; a train file is corrupt.
        DdrayError: the download failed.
    """
    if name_or_path == "digits":
        return _digits()
    if name_or_path in KNOWN:
        return _open_known(name_or_path, data_dir, download=download)
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


def _digits() -> Dataset:
    """Open scikit-learn's 8x8 digits (0..16), up-sampled to 16x16; test is a fixed stratified 20%."""
    from sklearn.datasets import load_digits

    held = load_digits()
    pixels = torch.from_numpy(held.images)[:, None] * (255 / 16)
    large = F.interpolate(pixels, size=(16, 16), mode="bilinear", align_corners=False)
    whole = Split(large.round().to(torch.uint8), torch.from_numpy(held.target).long())
    in_test = layouts.fixed_test(whole.labels)
    train = whole.select((~in_test).nonzero()[:, 0])
    mean, std = channel_statistics(train.images)
    known = KNOWN["digits"]
    return Dataset(
        name="digits",
        class_names=known.class_names,
        image_shape=known.shape,
        mean=mean,
        std=std,
        can_flip=known.can_flip,
        load_train=lambda: train,
        load_test=lambda: whole.select(in_test.nonzero()[:, 0]),
    )


def _open_known(name: str, data_dir: Path | None, *, download: bool) -> Dataset:
    """Open a named dataset from the data directory."""
    known = KNOWN[name]
    root = data_dir or (Path(os.environ["DDRAY_DATA"]) if os.environ.get("DDRAY_DATA") else None)
    if root is None:
        raise InputError(f"dataset {name} needs a data directory, got none; {_fix(known)}")
    root = root.expanduser().absolute()
    layout = _find(name, known, root)
    if layout is None and download and known.torchvision:
        vision.download(root, known)
        layout = _find(name, known, root)
    if layout is None:
        looked = [str(folder) for folder in _folders(name, root)]
        if known.marker:
            looked.append(str(root / known.marker))
        if known.wnids:
            looked += [str(folder) for folder in _folders("imagenet", root)]
        raise InputError(
            f"dataset {name} must lie under the data directory, found none of {', '.join(looked)}; "
            f"{_fix(known)}"
        )
    names = layout.class_names
    geometry = Geometry(known.shape, known.resize)
    if known.class_names and len(names) != len(known.class_names):
        raise InputError(
            f"dataset {name} must have {len(known.class_names)} classes, got {len(names)} under {root}"
        )
    mean, std = known.mean, known.std
    if not mean:
        mean, std = channel_statistics(layout.train(geometry)[0].images)
    return Dataset(
        name=name,
        class_names=names,
        image_shape=known.shape,
        mean=mean,
        std=std,
        can_flip=known.can_flip,
        load_train=lambda: layout.train(geometry)[0],
        load_test=lambda: layout.test(geometry),
    )


def _fix(known: KnownDataset) -> str:
    """Return how to help a dataset that is not found."""
    return "give --data-dir or set $DDRAY_DATA" + (", or add --download" if known.torchvision else "")


def _folders(name: str, root: Path) -> list[Path]:
    """Return where a named dataset may lie."""
    return [root / name, *(root / folder for folder in KNOWN[name].folders)]


def _find(name: str, known: KnownDataset, root: Path) -> Layout | None:
    """Return the layout of a named dataset under the data directory, or None."""
    for folder in _folders(name, root):
        layout = _layout_of_known(name, known, folder) if folder.is_dir() else None
        if layout is not None:
            return layout
    for place in (root, *_folders(name, root)):
        if known.marker and (place / known.marker).exists():
            return vision.layout_of_torchvision(place, known)
    for folder in _folders("imagenet", root) if known.wnids else []:
        layout = layout_of_folder(folder, known.wnids, known.class_names)
        if layout is not None:
            return layout
    return None


def _layout_of_known(name: str, known: KnownDataset, folder: Path) -> Layout | None:
    """Return the layout of a named dataset in a folder of its own, or None."""
    if name == "speech_commands_mini":
        return layout_of_wavs(folder)
    if name == "cub200":
        official = layout_of_cub(folder) or layout_of_cub(folder / "CUB_200_2011")
    else:
        official = layout_of_dogs(folder) if name == "stanford_dogs" else None
    return (
        official
        or parquet.layout_of_parquet(folder, known.class_names)
        or layout_of_folder(folder, known.wnids, known.class_names)
    )
