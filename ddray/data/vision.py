"""Datasets in torchvision's own layout, and their download."""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ddray.data import cache
from ddray.data.catalog import KnownDataset
from ddray.data.dataset import Split
from ddray.data.listing import loose_files
from ddray.data.pictures import Geometry, resized
from ddray.data.sources import Layout, Size
from ddray.errors import DdrayError, InputError, one_line

log = logging.getLogger(__name__)

_SPLITS: Final = {"SVHN": ("train", "test"), "Imagenette": ("train", "val")}  # the others take train=True


def layout_of_torchvision(root: Path, spec: KnownDataset) -> Layout:
    """Return the layout of a dataset whose marker lies under `root`."""

    def read(geometry: Geometry, *, train: bool) -> Split:
        if geometry.shape == spec.shape:
            return _read(root, spec, train=train)
        side = geometry.shape[1]

        def build(folder: Path) -> dict[str, Any]:
            split = _read(root, spec, train=train)
            np.save(folder / cache.IMAGES, resized(split.images, side).numpy())
            np.save(folder / cache.LABELS, split.labels.numpy())
            return {}

        split, _ = cache.fetch(_files(root / spec.marker), f"torchvision v1 {spec} {side} {train}", build)
        log.warning("%d images of %s are resized to %dx%d", len(split), spec.torchvision, side, side)
        return split

    def read_train(size: Size) -> tuple[Split, Geometry]:
        geometry = size if isinstance(size, Geometry) else Geometry(spec.shape, resize=False)
        return read(geometry, train=True), geometry

    return Layout(spec.class_names, read_train, lambda geometry: read(geometry, train=False))


def _files(marker: Path) -> list[Path]:
    """Return the files that decide the content of a dataset: in its marker, or beside it."""
    return loose_files(marker) if marker.is_dir() else loose_files(marker.parent, (marker.suffix,))


def download(root: Path, spec: KnownDataset) -> None:
    """Let torchvision download both halves below `root`; what it prints goes to stderr.

    Raises:
        DdrayError: the download failed.
    """
    import torchvision.datasets

    cls = getattr(torchvision.datasets, str(spec.torchvision))
    options: dict[str, Any] = {"size": "320px"} if spec.torchvision == "Imagenette" else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            for train in (True, False):
                cls(root, **_half(spec, train=train), **options, download=True)
    except Exception as error:  # network, disk and archive errors alike
        raise DdrayError(f"torchvision could not download {spec.torchvision} to {root}: {error}") from error


def _half(spec: KnownDataset, *, train: bool) -> dict[str, Any]:
    """Return the argument that chooses the half."""
    names = _SPLITS.get(str(spec.torchvision))
    return {"split": names[0 if train else 1]} if names else {"train": train}


def _one_half(cls: type, *, train: bool) -> type:
    """Return torchvision's class, made to check the files of one half only.

    CIFAR verifies every file and MNIST looks for every file whichever half is read; a broken test half would
    then break train.
    """
    other = "test_list" if train else "train_list"
    changes: dict[str, Any] = {"_check_exists": lambda self: True}
    if hasattr(cls, other):
        changes[other] = []
    # MNIST finds its folder by the name of the class.
    return type(cls.__name__, (cls,), changes)


def _read(root: Path, spec: KnownDataset, *, train: bool) -> Split:
    import torchvision.datasets

    cls = _one_half(getattr(torchvision.datasets, str(spec.torchvision)), train=train)
    try:
        dataset = cls(root, **_half(spec, train=train))
    except Exception as error:  # pickle, struct, assertion and Matlab errors alike
        half = "train" if train else "test"
        raise InputError(
            f"the {half} half of {spec.torchvision} must be readable, got {root}: {one_line(error)}"
        ) from error
    images = torch.as_tensor(dataset.data)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    if images.ndim == 3:  # MNIST: [N, H, W]
        images = images[:, None]
    elif images.shape[1:] != spec.shape:  # CIFAR: [N, H, W, C]
        images = images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(labels, dtype=torch.long))
