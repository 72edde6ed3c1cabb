"""Labelled files below a folder: by class folders, in the arrangements that people have."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ddray.data.listing import (
    LOOSE,
    NO_FILES,
    UNREAD,
    Skipped,
    files_below,
    find_parts,
    has_files,
    loose_files,
    part_of,
    subfolders,
)
from ddray.errors import InputError

log = logging.getLogger(__name__)

WORD_LISTS: Final = ("words.txt", "LOC_synset_mapping.txt")
_VAL_LIST: Final = "val_annotations.txt"
FIFTH: Final = "a fixed 20% of train is test (of sound: each 8th file of a class)"
Labelled = list[tuple[Path, int]]


@dataclass(frozen=True)
class Tree:
    """Labelled files below a folder.

    Attributes:
        classes: the names of the labels, as folders or lists have them.
        train: the files to train on; all of them, if there is no split.
        test: lists the files to test on; None without a split.
    """

    classes: list[str]
    train: Labelled
    test: Callable[[], Labelled] | None


def tree_of(
    root: Path, suffixes: tuple[str, ...], wnids: Sequence[str] = (), names: Sequence[str] = ()
) -> Tree | None:
    """Return the files by class below a folder, or None if they aren't arranged by class.

    A folder for train and perhaps others for test and val (`part_of` knows their names) have a folder per
    class each; or there are class folders only; or each class folder has one for train and one for test.
    Test is the first of test and val with classes of train's. What is left out is warned of.

    Args:
        root: the folder.
        suffixes: of the files, in lower case.
        wnids: class folders to use, in this order; none: all, sorted (in `names`' order if they match).
        names: expected names of the class folders.

    Raises:
        InputError: a class folder is missing or empty, or it isn't clear what is a class.
    """
    skipped = Skipped(root)
    parts, base, present = _train_classes(root, suffixes, skipped)
    if not present:
        return None
    classes = list(wnids) or (list(names) if set(names) == set(present) else present)
    if missing := sorted(set(classes) - set(present)):
        raise InputError(
            f"image folder must have a folder for every class, got none for {missing[0]} in {base}"
        )
    if len(classes) < 2 and base == root:
        return None  # perhaps the only folder of an archive
    inner = _parts_of_classes(base, present, skipped, is_split=bool(parts))
    train = by_class(base, classes, suffixes, inner=inner.get("train", ""), skipped=skipped)
    if inner:
        log.warning("%s: each class holds %s and %s: the latter is test", root, *inner.values())
        test: Callable[[], Labelled] | None = partial(_listed_test, base, classes, suffixes, inner["test"])
    else:
        test = _test_half(root, parts, classes, suffixes, skipped, subset=bool(wnids))
    for path in [path for folder in dict.fromkeys((root, base)) for path in loose_files(folder)]:
        if path.name not in WORD_LISTS:
            skipped.add(LOOSE if path.name.lower().endswith(suffixes) else NO_FILES, path)
    skipped.warn()
    return Tree(classes, train, test)


def _train_classes(
    root: Path, suffixes: tuple[str, ...], skipped: Skipped
) -> tuple[dict[str, str], Path, list[str]]:
    """Return the parts of a folder, the folder with train's classes, and these; no classes if there are none.

    Raises:
        InputError: train has files but no class folders, or there is no train beside test or val.
    """
    visible = subfolders(root, skipped)
    parts = find_parts(root, visible)
    others = [name for name in visible if name not in parts.values()]
    base = inner_folder(root / parts["train"]) if parts else root
    present = subfolders(base, skipped) if parts else visible
    if parts and not present and has_files(base, suffixes):
        if not any(has_files(root / name, suffixes) for name in others):
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
    if parts:
        for name in others:
            skipped.add(UNREAD, root / name)
    return parts, base, present


def inner_folder(folder: Path) -> Path:
    """Return the folder with classes: inside one that archives repeat, such as `seg_train/seg_train`."""
    names = subfolders(folder)
    while len(names) == 1 and len(inside := subfolders(folder / names[0])) > 1:
        folder, names = folder / names[0], inside
    return folder


def _parts_of_classes(
    base: Path, present: Sequence[str], skipped: Skipped, *, is_split: bool
) -> dict[str, str]:
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
    halves = {"train": parts["train"], "test": parts.get("test") or parts["val"]}
    for path in [base / label / name for name in names if name not in halves.values() for label in present]:
        skipped.add(UNREAD, path)
    return halves


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
    folder: Path, classes: Sequence[str], suffixes: tuple[str, ...], inner: str = ""
) -> Labelled:
    """Return the files of a test part; classes may have none."""
    skipped = Skipped(folder)
    labelled = by_class(folder, classes, suffixes, inner=inner, empty_ok=True, skipped=skipped)
    skipped.warn()
    return labelled


def _test_half(
    root: Path,
    parts: dict[str, str],
    classes: Sequence[str],
    suffixes: tuple[str, ...],
    skipped: Skipped,
    *,
    subset: bool,
) -> Callable[[], Labelled] | None:
    """Return a lister of the test half beside train: test by class, else val; None without either."""
    chosen_part: Callable[[], Labelled] | None = None
    for kind in ("test", "val"):
        if kind not in parts:
            continue
        folder = inner_folder(root / parts[kind])
        if chosen_part is not None:
            skipped.add(UNREAD, root / parts[kind])
        elif (folder / _VAL_LIST).is_file():
            chosen_part = partial(_tiny_imagenet_val, folder, classes)
        elif set(subfolders(folder)) & set(classes):
            chosen_part = partial(_held_out_by_class, folder, classes, suffixes, subset=subset)
        else:  # as in Tiny-ImageNet: an unlabelled test/images
            log.warning("%s has no folder of a class of train's: it isn't used", folder)
    if chosen_part is None and len(parts) > 1:
        log.warning("%s has no labelled test part: %s", root, FIFTH)
    return chosen_part


def _held_out_by_class(
    folder: Path, classes: Sequence[str], suffixes: tuple[str, ...], *, subset: bool
) -> Labelled:
    """Return the files of a test folder; classes beyond train's are an error unless `subset`."""
    strange = sorted(set(subfolders(folder)) - set(classes))
    if strange and not subset:
        raise InputError(f"class folders of {folder} must be among those of train, got {strange[0]!r}")
    return _listed_test(folder, classes, suffixes)


def _tiny_imagenet_val(folder: Path, classes: Sequence[str]) -> Labelled:
    """Return Tiny-ImageNet's val: images/ and a tab-separated list of file name, WordNet id and a box."""
    label_of = {name: label for label, name in enumerate(classes)}
    file, labelled = folder / _VAL_LIST, []
    for name, wnid, *_ in read_table(file, "\t"):
        if wnid not in label_of:
            raise InputError(f"classes in {file} must be among train's, got {wnid!r}")
        labelled.append((folder / "images" / name, label_of[wnid]))
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
