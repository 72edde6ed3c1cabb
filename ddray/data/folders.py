"""Folders of image files: by class, Tiny-ImageNet's val, ImageNet subsets, CUB-200-2011, Stanford Dogs."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, Final

import torch

from ddray.data.sources import Item, Layout, Source, chunks, fixed_test, from_sources
from ddray.errors import InputError

IMAGE_SUFFIXES: Final = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".tif", ".tiff"),
)
_BATCH: Final = 1024
Labelled = list[tuple[Path, int]]


def class_folders(folder: Path) -> list[str]:
    """Return the names of the subfolders, sorted, without hidden ones and `__MACOSX`."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "._")


def files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files at any depth with one of the suffixes, in sorted order."""
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(directory, name)


def by_class(
    folder: Path, classes: Sequence[str], suffixes: tuple[str, ...], *, empty_ok: bool = False
) -> Labelled:
    """Return (file, label) of every class folder's files; InputError if one has none, unless `empty_ok`."""
    labelled: Labelled = []
    for label, name in enumerate(classes):
        files = list(files_below(folder / name, suffixes))
        if not files and not empty_ok:
            raise InputError(
                f"class folder must hold files ({' '.join(suffixes)}), got none in {folder / name}"
            )
        labelled += [(file, label) for file in files]
    return labelled


def image_source(labelled: Labelled) -> Source:
    """Return the images of listed files, in order."""
    labels = hashlib.sha256(",".join(str(label) for _, label in labelled).encode()).hexdigest()
    batches = chunks(labelled, _BATCH)
    return Source(
        [file for file, _ in labelled],
        lambda: len(labelled),
        lambda: ([Item(str(file), label, file) for file, label in batch] for batch in batches),
        labels,
    )


def layout_of_folder(root: Path, wnids: Sequence[str] = (), names: Sequence[str] = ()) -> Layout | None:
    """Return the layout of an image folder, or None if there are no class folders.

    Known arrangements: train/ and test/ (or val/) by class; train/ and val/ with Tiny-ImageNet's
    val_annotations.txt; class folders only, or train/ only (test: a fixed stratified 20%).

    Args:
        root: the folder.
        wnids: class folders to use, in this order; none: all, sorted (in `names`' order if they match).
        names: class names; none: the folders', or what words.txt calls them.

    Raises:
        InputError: a class folder is missing or empty.
    """
    base = root / "train" if (root / "train").is_dir() else root
    present = class_folders(base)
    if not present or (base == root and next(files_below(root / present[0], IMAGE_SUFFIXES), None) is None):
        return None
    classes = list(wnids) or (list(names) if set(names) == set(present) else present)
    if missing := sorted(set(classes) - set(present)):
        raise InputError(
            f"image folder must have a folder for every class, got none for {missing[0]} in {base}"
        )
    class_names = tuple(names) if len(names) == len(classes) else _human_names(root, classes)
    labelled = by_class(base, classes, IMAGE_SUFFIXES)
    list_test = _held_out(root, classes, subset=bool(wnids)) if base != root else None
    if list_test is not None:
        return from_sources(class_names, image_source(labelled), lambda: image_source(list_test()))
    in_test = fixed_test(torch.tensor([label for _, label in labelled]))
    train, test = (list(compress(labelled, half.tolist())) for half in (~in_test, in_test))
    return from_sources(class_names, image_source(train), lambda: image_source(test))


def _held_out(root: Path, classes: Sequence[str], *, subset: bool) -> Callable[[], Labelled] | None:
    """Return a lister of the test half beside train/: test/ by class, else val/; None without either."""
    for name in ("test", "val", "validation", "valid"):
        folder = root / name
        if (folder / "val_annotations.txt").is_file():
            return partial(_tiny_imagenet_val, folder, classes)
        # An unlabelled test/images, as in Tiny-ImageNet, shares no class with train: use val.
        if set(class_folders(folder)) & set(classes):
            return partial(_held_out_by_class, folder, classes, subset=subset)
    return None


def _held_out_by_class(folder: Path, classes: Sequence[str], *, subset: bool) -> Labelled:
    """Return the files of a test folder; classes beyond train's are an error unless `subset`."""
    strange = sorted(set(class_folders(folder)) - set(classes))
    if strange and not subset:
        raise InputError(f"class folders of {folder} must be among those of train, got {strange[0]!r}")
    return by_class(folder, classes, IMAGE_SUFFIXES, empty_ok=True)


def _tiny_imagenet_val(folder: Path, classes: Sequence[str]) -> Labelled:
    """Return Tiny-ImageNet's val: images/ and a tab-separated list of file name, WordNet id and a box."""
    label_of = {name: label for label, name in enumerate(classes)}
    file, labelled = folder / "val_annotations.txt", []
    for name, wnid, *_ in _table(file, "\t"):
        if wnid not in label_of:
            raise InputError(f"classes in {file} must be among train's, got {wnid!r}")
        labelled.append((folder / "images" / name, label_of[wnid]))
    return labelled


def _table(file: Path, separator: str | None = None) -> list[list[str]]:
    """Return a text file's lines, split into at least two fields."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"dataset list must be readable, got {file}: {error}") from error
    rows = [line.split(separator) for line in lines if line.strip()]
    short = next((row for row in rows if len(row) < 2), None)
    if short is not None:
        raise InputError(f"lines of {file} must have 2 fields, got {' '.join(short)!r}")
    return rows


def _human_names(root: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return what words.txt (or ImageNet's synset mapping) calls each class, else its folder's name."""
    files = (root / name for name in ("words.txt", "LOC_synset_mapping.txt"))
    file = next(filter(Path.is_file, files), None)
    rows = _table(file) if file else []
    words = {row[0]: " ".join(row[1:]).split(",")[0].strip() for row in rows}
    return tuple(words.get(name, name) for name in classes)


def layout_of_cub(root: Path) -> Layout | None:
    """Return the layout of CUB-200-2011 (`images/`, `images.txt` and two more lists), or None.

    Raises:
        InputError: a list is missing or malformed.
    """
    if not (root / "images.txt").is_file():
        return None
    paths, labels, flags = (
        {row[0]: row[1] for row in _table(root / file)}
        for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    for image in paths:
        if image not in flags or not labels.get(image, "").isdecimal():
            raise InputError(
                f"every image of {root / 'images.txt'} must have a label and a train/test flag, got none for "
                f"{image}"
            )
    labelled = {image: (root / "images" / path, int(labels[image]) - 1) for image, path in paths.items()}

    def half(train: bool) -> Source:
        return image_source([labelled[image] for image in paths if (flags[image] == "1") == train])

    return from_sources(_names_of(labelled.values(), "."), half(True), lambda: half(False))


def layout_of_dogs(root: Path) -> Layout | None:
    """Return the layout of Stanford Dogs (`Images/`, and two .mat lists, also in `lists/`), or None.

    Raises:
        InputError: a list cannot be read.
    """
    lists = next((folder for folder in (root, root / "lists") if (folder / "train_list.mat").is_file()), None)
    if lists is None:
        return None
    images, test_list = root / "Images", lists / "test_list.mat"
    train = _dog_list(lists / "train_list.mat", images)
    return from_sources(
        _names_of(train, "-"), image_source(train), lambda: image_source(_dog_list(test_list, images))
    )


def _names_of(labelled: Iterable[tuple[Path, int]], separator: str) -> tuple[str, ...]:
    """Return a name per label: what follows the separator in its folder's name, empty without a file."""
    folder_of = {label: file.parent.name for file, label in labelled}
    labels = range(max(folder_of, default=-1) + 1)
    return tuple(folder_of.get(label, "").partition(separator)[2] for label in labels)


def _dog_list(file: Path, images: Path) -> Labelled:
    """Read Matlab's `file_list` (cells of strings) and `labels` (from 1 on)."""
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(file)
        names = [str(cell[0]) for cell in content["file_list"].ravel()]
        labels = [int(label) - 1 for label in content["labels"].ravel()]
        return [(images / name, label) for name, label in zip(names, labels, strict=True)]
    except Exception as error:  # loadmat raises whatever a broken file leads to
        raise InputError(f"list of images must be a readable .mat file, got {file}: {error}") from error
