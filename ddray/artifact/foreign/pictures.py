"""Folders of pictures by class: SRe2L, RDED, D3HR, Minimax, and what `ddray export` writes.

Class folders bear the dataset's class names, WordNet ids (Minimax, D3HR), numbers (RDED's `00007`, SRe2L's
`new007`), or number and name (ours, `7_frog`). Numbers count the classes by sorted folder name.
"""

import re
import unicodedata
from pathlib import Path
from typing import Any, Final

from ddray.artifact.distilled_set import Meta
from ddray.artifact.export import CARD, META, folder_names, whitening_file
from ddray.artifact.exported import exported_meta, read_whitening
from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.data import Dataset, PixelSpace
from ddray.data.catalog import KNOWN
from ddray.data.folders import image_source
from ddray.data.listing import (
    IMAGE_SUFFIXES,
    LOOSE,
    Skipped,
    files_below,
    has_files,
    loose_files,
    subfolders,
)
from ddray.data.pictures import Geometry
from ddray.data.pixels import pixel_space
from ddray.data.sources import load
from ddray.errors import InputError

_WNID: Final = re.compile(r"n\d{8}")
_EXPORTED: Final = re.compile(r"(\d+)_.*")
_NUMBER: Final = re.compile(r"(?:new|class_?)?(\d+)")
_BY_WNID: Final = ("imagenet", "tiny_imagenet")
"""Datasets whose labels count the sorted WordNet ids, which their class names do not tell."""
_COPIED: Final = (
    "method",
    "config",
    "arch",
    "norm",
    "seed",
    "split",
    "learned_lr",
    "generator",
    "ipc",
    "ipc_decoded",
    "storage_floats",
)


def _exported_labels(folders: list[str], meta: Meta | None, dataset: Dataset) -> list[int] | None:
    """Return each folder's label in a dataset, by the number before its name; None if they were renamed."""
    labels = {name: label for label, name in enumerate(dataset.class_names)}
    matches = [_EXPORTED.fullmatch(name) for name in folders]
    numbers = [int(match[1]) for match in matches if match is not None]
    if meta is None or len(numbers) < len(folders) or max(numbers) >= len(meta.class_names):
        return None
    names = [meta.class_names[number] for number in numbers]
    return [labels[name] for name in names] if set(names) <= labels.keys() else None


def labels_of(path: Path, folders: list[str], dataset: Dataset) -> list[int]:
    """Return each class folder's label in a dataset; InputError if the names don't tell."""
    folders = [unicodedata.normalize("NFC", name) for name in folders]
    named = {name: label for label, name in enumerate(dataset.class_names)}
    exported = {name: label for label, name in enumerate(folder_names(dataset.class_names))}
    wnids = KNOWN[dataset.base].wnids if dataset.base in KNOWN else ()
    for labels in (named, exported, {wnid: label for label, wnid in enumerate(wnids)}):
        if set(folders) <= labels.keys():
            return [labels[name] for name in folders]
    in_order = sorted(range(dataset.num_classes), key=lambda label: wnids[label] if wnids else label)
    is_complete = dataset.base in _BY_WNID and len(folders) == dataset.num_classes
    if is_complete and all(map(_WNID.fullmatch, folders)):
        return in_order
    matches = [_NUMBER.fullmatch(name) for name in folders]
    numbers = [int(match[1]) for match in matches if match is not None]
    strange = [name for name, match in zip(folders, matches, strict=True) if match is None or name in named]
    if not strange and len(set(numbers)) == len(numbers) and max(numbers) < dataset.num_classes:
        return [in_order[number] for number in numbers]
    raise InputError(
        f"class folders of {path} must bear the names, numbers (0..{dataset.num_classes - 1}) or WordNet ids "
        f"of {dataset.name}'s classes, got {(strange or folders)[-1]!r}"
    )


def _read(path: Path, contents: Any, request: ForeignRequest) -> ForeignFile:
    skipped, dataset = Skipped(path), request.dataset
    folders = subfolders(path, skipped)
    if folders == ["unlabelled"]:
        raise InputError(f"{path} must hold targets too, as self-supervised sets do: use its .pt file")
    meta = exported_meta(path)
    labels = _exported_labels(folders, meta, dataset) or labels_of(path, folders, dataset)
    pictures = [
        (file, label)
        for label, name in sorted(zip(labels, folders, strict=True))
        for file in files_below(path / name, IMAGE_SUFFIXES, skipped)
    ]
    for file in loose_files(path):
        if file.name not in (META, CARD, whitening_file(path).name):
            skipped.add(LOOSE, file)
    skipped.warn()
    split, _ = load(image_source(pictures), Geometry(dataset.image_shape, resize=True))
    if meta is None:
        return ForeignFile([ForeignSet(split.images, split.labels, is_unit=True)])
    space = _space(path, meta, dataset)
    facts = {name: getattr(meta, name) for name in _COPIED}
    return ForeignFile([ForeignSet(split.images, split.labels, is_unit=True, space=space, facts=facts)])


def _space(path: Path, meta: Meta, dataset: Dataset) -> PixelSpace:
    """Return the pixel space of an exported set; whitening is fitted again where a release wrote no file."""
    if meta.pixel_space == "zca" and not whitening_file(path).is_file():
        return pixel_space(meta.pixel_space, dataset, dataset.train())
    return PixelSpace(meta.pixel_space, meta.mean, meta.std, **read_whitening(path, meta))


def _fits(path: Path, contents: Any) -> bool:
    return any(has_files(path / name, IMAGE_SUFFIXES) for name in subfolders(path))


FORMAT: Final = ForeignFormat("a folder of pictures by class", _fits, _read)
