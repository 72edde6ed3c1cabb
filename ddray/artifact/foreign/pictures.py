"""Folders of pictures by class: SRe2L, RDED, D3HR, Minimax, and what `ddray export` writes.

Class folders bear the dataset's class names, WordNet ids (Minimax, D3HR), numbers (RDED's `00007`, SRe2L's
`new007`), or number and name (ours, `7_frog`). Numbers count the classes by sorted folder name.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

from ddray.artifact.distilled_set import Meta
from ddray.artifact.export import folder_names
from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet
from ddray.data import Dataset
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

META: Final = "meta.json"
_WNID: Final = re.compile(r"n\d{8}")
_NUMBER: Final = re.compile(r"(?:new|class_?)?(\d+)")
_BY_WNID: Final = ("imagenet", "tiny_imagenet")
"""Datasets whose labels count the sorted WordNet ids, which their class names do not tell."""
_COPIED: Final = (
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


def exported_meta(path: Path) -> Meta | None:
    """Return the meta that `ddray export` wrote into a folder of pictures; None if there is none."""
    file = path / META
    if not file.is_file():
        return None
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file} must be a JSON object that ddray export wrote; remove it") from error
    return Meta.parse(values, prefix="meta.", source=str(file))


def labels_of(path: Path, folders: list[str], dataset: Dataset) -> list[int]:
    """Return each class folder's label in a dataset; InputError if the names don't tell."""
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
    labels = labels_of(path, folders, dataset)
    pictures = [
        (file, label)
        for label, name in sorted(zip(labels, folders, strict=True))
        for file in files_below(path / name, IMAGE_SUFFIXES, skipped)
    ]
    for file in loose_files(path):
        if file.name != META:
            skipped.add(LOOSE, file)
    skipped.warn()
    split, _ = load(image_source(pictures), Geometry(dataset.image_shape, resize=True))
    meta = exported_meta(path)
    if meta is None:
        return ForeignFile([ForeignSet(split.images, split.labels, is_unit=True)])
    space = pixel_space(meta.pixel_space, dataset, dataset.train())
    facts = {name: getattr(meta, name) for name in _COPIED}
    return ForeignFile([ForeignSet(split.images, split.labels, is_unit=True, space=space, facts=facts)])


def _fits(path: Path, contents: Any) -> bool:
    return any(has_files(path / name, IMAGE_SUFFIXES) for name in subfolders(path))


FORMAT: Final = ForeignFormat("a folder of pictures by class", _fits, _read)
