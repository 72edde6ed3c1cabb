"""Labelled files below a folder: by class folders, in the arrangements that people have."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ddray.data.listing import (
    Skipped,
    files_below,
    find_parts,
    halves_of,
    has_files,
    part_of,
    subfolders,
)
from ddray.errors import InputError

log = logging.getLogger(__name__)

WORD_LISTS: Final = ("words.txt", "LOC_synset_mapping.txt")
_VAL_LIST: Final = "val_annotations.txt"
Labelled = list[tuple[Path, int]]


@dataclass(frozen=True)
class Tree:
    """Labelled files below a folder.

    Attributes:
        classes: the names of the labels, as folders or lists have them.
        train: the files to train on; all of them, if there is no split.
        test: lists the files to test on; None without a split.
        skipped: what is left out, except of test.
    """

    classes: list[str]
    train: Labelled
    test: Callable[[], Labelled] | None
    skipped: Skipped


def tree_of(
    root: Path, suffixes: tuple[str, ...], wnids: Sequence[str] = (), names: Sequence[str] = ()
) -> Tree | None:
    """Return the files by class below a folder, or None if they aren't arranged by class.

    A folder for train and perhaps others for test and val (`part_of` knows their names) have a folder per
    class each; or there are class folders only; or each class folder has one for train and one for test.
    Test is the first of test and val with classes of train's.

    Args:
        root: the folder.
        suffixes: of the files, in lower case.
        wnids: class folders to use, in this order; none: all, sorted (in `names`' order if they match).
        names: expected names of the class folders.

    Raises:
        InputError: a class folder is missing or empty, or it isn't clear what is a class.
    """
    parts, base, present = _train_classes(root, suffixes)
    if not present:
        return None
    classes = list(wnids) or (list(names) if set(names) == set(present) else present)
    if missing := sorted(set(classes) - set(present)):
        raise InputError(
            f"image folder must have a folder for every class, got none for {missing[0]} in {base}"
        )
    if len(classes) < 2 and base == root:
        return None  # perhaps the only folder of an archive
    skipped = Skipped(root, suffixes)
    inner = _parts_of_classes(base, present, is_split=bool(parts))
    train = by_class(base, classes, suffixes, inner=inner.get("train", ""), skipped=skipped)
    test: Callable[[], Labelled] | None = None
    covered = [base / name / half for name in present for half in (inner.values() or [""])]
    if inner:
        log.warning("%s: each class holds %s and %s: the latter is test", root, *inner.values())
        test = partial(_listed_test, base, base, classes, suffixes, inner["test"])
    elif parts:
        folders = {kind: root / name for kind, name in parts.items()}
        _, kind = halves_of(
            {kind: [folder] for kind, folder in folders.items()},
            skipped,
            "folders",
            lambda kind: _has_classes(folders[kind], classes),
        )
        if kind is not None:
            covered.append(folders[kind])
            test = partial(_test_of, folders[kind], classes, suffixes, subset=bool(wnids))
    skipped.covered = [*covered, *(folder / name for folder in {root, base} for name in WORD_LISTS)]
    return Tree(classes, train, test, skipped)


def _train_classes(root: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, str], Path, list[str]]:
    """Return the parts of a folder, the folder with train's classes, and these; no classes if there are none.

    Raises:
        InputError: train has files but no class folders, or there is no train beside test or val.
    """
    visible = subfolders(root)
    parts = find_parts(root, visible)
    base = inner_folder(root / parts["train"]) if parts else root
    present = subfolders(base) if parts else visible
    if parts and not present and has_files(base, suffixes):
        others = [name for name in visible if name not in parts.values()]
        if len(parts) > 1 or not any(has_files(root / name, suffixes) for name in others):
            raise InputError(
                f"train must have a folder per class, or a CSV file of labels beside it, got files in {base}"
            )
        parts, base, present = {}, root, visible  # a class is called train
    if not any(has_files(base / name, suffixes) for name in present):
        return {}, root, []
    if not parts and all(part_of(name) for name in present):
        raise InputError(
            f"a dataset folder must have a train part, got only {', '.join(present)} in {root}; rename one"
        )
    return parts, base, present


def inner_folder(folder: Path) -> Path:
    """Return the folder with classes: inside one that archives repeat, such as `seg_train/seg_train`."""
    names = subfolders(folder)
    while len(names) == 1 and len(inside := subfolders(folder / names[0])) > 1:
        folder, names = folder / names[0], inside
    return folder


def _parts_of_classes(base: Path, present: Sequence[str], *, is_split: bool) -> dict[str, str]:
    """Return the parts that every class folder has as subfolders; empty if they don't all have the same.

    Raises:
        InputError: all have the same subfolders, which are no parts: they may be the classes.
    """
    names = subfolders(base / present[0])
    if len(names) < 2 or len(present) < 2 or any(subfolders(base / name) != names for name in present[1:]):
        return {}
    parts = find_parts(base / present[0], names)
    if len(parts) < 2 or is_split:
        raise InputError(
            f"it must be clear what a class is, got the same folders ({', '.join(names[:5])}) in each of "
            f"{', '.join(present[:5])} in {base}; if these are splits, rename them to train and test, else "
            "move the files up"
        )
    return {"train": parts["train"], "test": parts.get("test") or parts["val"]}


def by_class(
    folder: Path,
    classes: Sequence[str],
    suffixes: tuple[str, ...],
    *,
    inner: str = "",
    empty_ok: bool = False,
    skipped: Skipped | None = None,
) -> Labelled:
    """Return (file, label) of the files of every class folder, or of its subfolder `inner`.

    Raises:
        InputError: a class has no file, unless `empty_ok`.
    """
    labelled: Labelled = []
    for label, name in enumerate(classes):
        files = list(files_below(folder / name / inner, suffixes, skipped))
        if not files and not empty_ok:
            raise InputError(
                f"class folder must hold files ({' '.join(suffixes)}), got none in {folder / name / inner}"
            )
        labelled += [(file, label) for file in files]
    return labelled


def _listed_test(
    part: Path, folder: Path, classes: Sequence[str], suffixes: tuple[str, ...], inner: str = ""
) -> Labelled:
    """Return the files of the class folders of a test part; classes may have none."""
    skipped = Skipped(part, suffixes)
    labelled = by_class(folder, classes, suffixes, inner=inner, empty_ok=True, skipped=skipped)
    if not inner:
        skipped.covered = [folder / name for name in subfolders(folder)]
        skipped.add_rest()
    skipped.warn()
    return labelled


def _has_classes(part: Path, classes: Sequence[str]) -> bool:
    """Return whether a part has classes of train's; Tiny-ImageNet's test does not."""
    folder = inner_folder(part)
    return (folder / _VAL_LIST).is_file() or not set(subfolders(folder)).isdisjoint(classes)


def _test_of(part: Path, classes: Sequence[str], suffixes: tuple[str, ...], *, subset: bool) -> Labelled:
    """Return the files of a test part; classes beyond train's are an error unless `subset`."""
    folder = inner_folder(part)
    if (folder / _VAL_LIST).is_file():
        return _tiny_imagenet_val(part, folder, classes, suffixes)
    strange = sorted(set(subfolders(folder)) - set(classes))
    if strange and not subset:
        raise InputError(f"class folders of {folder} must be among those of train, got {strange[0]!r}")
    return _listed_test(part, folder, classes, suffixes)


def _tiny_imagenet_val(
    part: Path, folder: Path, classes: Sequence[str], suffixes: tuple[str, ...]
) -> Labelled:
    """Return Tiny-ImageNet's val: images/ and a tab-separated list of file name, WordNet id and a box."""
    label_of = {name: label for label, name in enumerate(classes)}
    file, labelled = folder / _VAL_LIST, []
    for name, wnid, *_ in read_table(file, "\t"):
        if wnid not in label_of:
            raise InputError(f"classes in {file} must be among train's, got {wnid!r}")
        labelled.append((folder / "images" / name, label_of[wnid]))
    skipped = Skipped(part, suffixes, "files that no list names", [file, *(image for image, _ in labelled)])
    skipped.add_rest()
    skipped.warn()
    return labelled


def read_table(file: Path, separator: str | None = None) -> list[list[str]]:
    """Return a text file's lines, split into at least two fields.

    Raises:
        InputError: the file can't be read, or a line has one field.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"dataset list must be readable, got {file}: {error}") from error
    rows = [line.split(separator) for line in lines if line.strip()]
    short = next((row for row in rows if len(row) < 2), None)
    if short is not None:
        raise InputError(f"lines of {file} must have 2 fields, got {' '.join(short)!r}")
    return rows
