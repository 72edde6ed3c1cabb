"""Folders of image files: by class, ImageNet subsets, CUB-200-2011, Stanford Dogs."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, Final

import torch

from ddray.data.listing import IMAGE_SUFFIXES
from ddray.data.lists import tree_of_lists
from ddray.data.packing import chunks
from ddray.data.pictures import Item
from ddray.data.sources import Layout, Source, fixed_test, from_sources
from ddray.data.tree import WORD_LISTS, Labelled, Tree, read_table, tree_of
from ddray.errors import InputError

_BATCH: Final = 1024


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


def layout_of_tree(tree: Tree, class_names: Sequence[str] = ()) -> Layout:
    """Return the layout of listed images; without a split, test is a fixed, stratified 20%."""
    names, listed_test = tuple(class_names or tree.classes), tree.test
    if listed_test is not None:
        layout = from_sources(names, image_source(tree.train), lambda: image_source(listed_test()))
    else:
        in_test = fixed_test(torch.tensor([label for _, label in tree.train]))
        train, test = (list(compress(tree.train, half.tolist())) for half in (~in_test, in_test))
        layout = from_sources(names, image_source(train), lambda: image_source(test))
    return replace(layout, skipped=tree.skipped)


def layout_of_lists(root: Path, label_column: str | None = None) -> Layout | None:
    """Return the layout of images that CSV files label (`tree_of_lists`), or None; InputError as there."""
    tree = tree_of_lists(root, IMAGE_SUFFIXES, label_column)
    return None if tree is None else replace(layout_of_tree(tree), options=("label_column",))


def layout_of_folder(root: Path, wnids: Sequence[str] = (), names: Sequence[str] = ()) -> Layout | None:
    """Return the layout of a folder of images by class (`tree_of`), or None.

    `wnids` and `names` are the class folders to use and their names; without names, words.txt or the folders
    name them. InputError as for `tree_of`.
    """
    tree = tree_of(root, IMAGE_SUFFIXES, wnids, names)
    if tree is None:
        return None
    is_named = len(names) == len(tree.classes)
    return layout_of_tree(tree, names if is_named else _human_names(root, tree.classes))


def _human_names(root: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return what words.txt (or ImageNet's synset mapping) calls each class, else its folder's name."""
    files = (root / name for name in WORD_LISTS)
    file = next(filter(Path.is_file, files), None)
    rows = read_table(file) if file else []
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
        {row[0]: row[1] for row in read_table(root / file)}
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
