"""open_dataset: find a dataset by name or path, and open it without reading its test half."""

import logging
import os
from collections.abc import Iterator
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
from ddray.data.folders import layout_of_cub, layout_of_dogs, layout_of_folder, layout_of_lists
from ddray.data.listing import subfolders
from ddray.data.npz import layout_of_npz
from ddray.data.pictures import Geometry
from ddray.data.pixels import channel_statistics, check_contrast
from ddray.data.reference import DatasetRef
from ddray.data.sources import Layout, Size, fixed_test
from ddray.data.speech import layout_of_clips
from ddray.data.tars import layout_of_tars
from ddray.errors import InputError, did_you_mean

log = logging.getLogger(__name__)


def dataset_names() -> list[str]:
    """Return the names that `open_dataset` knows."""
    return list(KNOWN)


def open_dataset(
    reference: str, *, data_dir: Path | None = None, download: bool = False, **content: Any
) -> Dataset:
    """Open a dataset; train is read on first use (a PATH's at once, to measure it), test on first use.

    A known name is looked for under the data directory: in its own folder as parquet shards, as an image
    folder or in its official layout, and in torchvision's layout. An ImageNet subset is also carved out of an
    `imagenet` folder. A path is an .npz file or a tar, or a folder of these, of parquet or Arrow shards, or
    of images or sound files by class or in a CSV list; its image size is chosen by `sources.survey`.

    Args:
        reference: one of `dataset_names()`, or a path; options may follow, as `DatasetRef` writes them.
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
    if not (path.is_dir() or (path.is_file() and path.suffix.lower() in (".npz", ".tar"))):
        hint = did_you_mean(ref.base, KNOWN)
        raise InputError(
            f"dataset must be one of {', '.join(KNOWN)}, an .npz or .tar file, or a folder, "
            f"got {ref.base!r}{hint}"
        )
    layout = _layout_of_path(path.absolute(), ref)
    split, geometry = layout.train(ref.image_size)
    is_image = split.images.dtype == torch.uint8  # spectrograms have a direction
    read = replace(layout, train=lambda _: (split, geometry))
    return _dataset(ref.absolute(), read, geometry, channel_statistics(split.images), can_flip=is_image)


def _layout_of_path(path: Path, ref: DatasetRef) -> Layout:
    """Return the layout of a folder, or of the only one in it, as archives unpack to.

    Raises:
        InputError: there is none, it has one class, or an option does not apply to it.
    """
    for folder in _levels(path):
        layout = (
            parquet.layout_of_parquet(folder, label_column=ref.label_column)
            or layout_of_lists(folder, ref.label_column)
            or layout_of_clips(folder, ref)
            or layout_of_folder(folder)
            or layout_of_npz(folder)
            or layout_of_tars(folder, ref.label_column)
        )
        if layout is not None:
            break
    else:
        raise InputError(
            "a dataset folder must hold train-*.parquet shards, what save_to_disk wrote, an .npz file, "
            "WebDataset tars, a folder of images or sound files per class (2 or more, also below train/ and "
            f"test/), or a CSV file that labels its files, got {path}"
        )
    if len(layout.class_names) < 2:
        raise InputError(f"a dataset must have 2 classes or more, got {layout.class_names} in {folder}")
    return _checked(layout, ref, path)


def _levels(path: Path) -> Iterator[Path]:
    """Yield a folder, then the only folder in it, and so on."""
    yield path
    while len(names := subfolders(path)) == 1:
        path = path / names[0]
        yield path


def _checked(layout: Layout, ref: DatasetRef, root: Path | None = None) -> Layout:
    """Return a layout that reads only train images with contrast; warn of what it leaves out below a root.

    Raises:
        InputError: its reader does not take an option of the reference.
    """
    for option, value in ref.content().items():
        if option not in ("image_size", "can_flip", *layout.options):
            raise InputError(f"{option} must be left out for {ref.base}, whose files have none, got {value}")
    if (skipped := layout.skipped) is not None:
        skipped.root = root or skipped.root
        skipped.add_rest()
        skipped.warn()

    def train(size: Size) -> tuple[Split, Geometry]:
        split, geometry = layout.train(size)
        check_contrast(split, ref.base)
        return split, geometry

    return replace(layout, train=train)


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
    layout, statistics = _checked(layout, ref), (spec.mean, spec.std)
    if not spec.mean:
        split = layout.train(geometry)[0]
        layout = replace(layout, train=lambda _: (split, geometry))
        statistics = channel_statistics(split.images)
    return _dataset(ref, layout, geometry, statistics, can_flip=spec.can_flip)


def _digits(spec: KnownDataset, geometry: Geometry) -> Layout:
    """Return scikit-learn's 8x8 digits (0..16), up-sampled, to 16x16; test is a fixed stratified 20%."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    if geometry.shape != spec.shape:
        line = "%d images of digits are resized from 8x8 to %dx%d, not to 16x16"
        log.warning(line, len(bunch.images), *geometry.shape[1:])
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
    if spec.class_names and not ref.label_column and len(layout.class_names) != len(spec.class_names):
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
        return layout_of_clips(folder, ref)
    official = None
    if spec.layout == "cub":
        official = layout_of_cub(folder) or layout_of_cub(folder / "CUB_200_2011")
    elif spec.layout == "dogs":
        official = layout_of_dogs(folder)
    return (
        official
        or parquet.layout_of_parquet(folder, spec.class_names, ref.label_column)
        or layout_of_folder(folder, spec.wnids, spec.class_names)
    )


class DatasetInfo(Result):
    """What `ddray data info` returns."""

    name: str
    num_classes: int
    num_train: int
    num_test: int
    image_shape: list[int]
    size_rule: str
    """How the size was chosen."""
    mean: list[float]
    """Per channel, in [0, 1] units."""
    std: list[float]
    can_flip: bool
    """Whether mirrored images keep their class."""
    fingerprint: str
    class_names: list[str]
    per_class: dict[str, list[int]]
    """Number of images of each class, in `train` and in `test`."""
    warnings: list[str]
    """What was left out, turned, resized or otherwise changed, counted."""


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
    recorder = _Recorder()
    logger = logging.getLogger("ddray.data")
    logger.addHandler(recorder)
    try:
        dataset = open_dataset(name, **options)
        halves = {"train": dataset.train(), "test": dataset.test()}
    finally:
        logger.removeHandler(recorder)
    num = dataset.num_classes
    return DatasetInfo(
        name=dataset.name,
        num_classes=num,
        num_train=len(halves["train"]),
        num_test=len(halves["test"]),
        image_shape=list(dataset.image_shape),
        size_rule=dataset.size_rule,
        mean=list(dataset.mean),
        std=list(dataset.std),
        can_flip=dataset.can_flip,
        fingerprint=dataset.fingerprint,
        class_names=list(dataset.class_names),
        per_class={k: torch.bincount(half.labels, minlength=num).tolist() for k, half in halves.items()},
        warnings=recorder.lines,
    )


class _Recorder(logging.Handler):
    """Keeps the warnings that reading a dataset gives."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
