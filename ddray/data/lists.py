"""CSV files that label the files of a folder: in each row the name of a file, and its class."""

import csv
import io
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ddray.data.listing import UNLISTED, Skipped, files_below, loose_files, part_of, subfolders
from ddray.data.tree import FIFTH, Labelled, Tree
from ddray.errors import InputError, one_line

log = logging.getLogger(__name__)

LABEL_COLUMNS: Final = ("label", "fine_label", "labels", "target", "class")
_PART_COLUMNS: Final = ("split", "set", "subset", "partition", "data set")
_PROBED: Final = 50  # rows by which the column of files is recognised
Row = tuple[Path, str, str]
"""A file, its class, and its part: train, test, val, or empty if nothing says."""


def tree_of_lists(root: Path, suffixes: tuple[str, ...], label_column: str | None) -> Tree | None:
    """Return the files that CSV files in a folder, or in those of its parts, label; None without such lists.

    A row's part is said by a column (`split`), the CSV file's name (`train.csv`) or its folder. Lists that
    repeat the names of class folders are left to these.

    Raises:
        InputError: a list names a missing file or no class, or two lists are one part.
    """
    folders = {name: root / name for name in subfolders(root)}
    candidates = loose_files(root) + [
        path for name, folder in folders.items() if part_of(name) for path in loose_files(folder)
    ]
    tables = [path for path in candidates if path.suffix.lower() in (".csv", ".tsv")]
    if not tables:
        return None
    index = _Index(root, suffixes)
    lists = {path: rows for path in tables if (rows := _rows(path, index, label_column))}
    if not lists or all(file.parent.name == label for rows in lists.values() for file, label, _ in rows):
        return None
    parts = _by_part(lists)
    train = parts.get("train") or parts.get("", [])
    test = parts.get("test") or parts.get("val")
    if not train:
        raise InputError(f"a CSV file must list train, got only {next(iter(lists))}; name one train.csv")
    if test is None and "train" in parts:
        log.warning("%s has no labelled list of a test part: %s", root, FIFTH)
    used = {file for file, _, _ in [*train, *(test or ())]}
    skipped = Skipped(root)
    for file in index.files:
        if file not in used:
            skipped.add(UNLISTED, file)
    skipped.warn()
    classes = sorted({label for _, label, _ in train}, key=in_order)
    lister = None if test is None else partial(_labelled, test, classes)
    return Tree(classes, _labelled(train, classes), lister)


def in_order(label: str) -> tuple[bool, int, str]:
    """Return the key by which the names of classes are sorted: numbers by value, then texts."""
    return (False, int(label), "") if label.isdecimal() else (True, 0, label)


class _Index:
    """The files below a folder, found by what a list may call them."""

    def __init__(self, root: Path, suffixes: tuple[str, ...]) -> None:
        self.root = root
        self.files = list(files_below(root, suffixes))
        self._by_name: dict[str, Path | None] = {}
        for file in self.files:
            relative = file.relative_to(root)
            for name in {str(relative), str(relative.with_suffix("")), file.name, file.stem}:
                # A name that several files have stands for none.
                self._by_name[name] = None if name in self._by_name else file

    def find(self, name: str, folders: Sequence[str]) -> Path | None:
        """Return the file of that name, looked for in the folders first; None for none or several."""
        name = name.strip().replace("\\", "/").removeprefix("./")
        names = [*(f"{folder}/{name}" for folder in folders), name, name.rpartition("/")[2]]
        return next((file for each in names if (file := self._by_name.get(each)) is not None), None)


def _rows(path: Path, index: _Index, label_column: str | None) -> list[Row]:
    """Return the rows of a list; none if it is no list of these files, or has no classes.

    Raises:
        InputError: a row names a missing file or no class.
    """
    table = _read(path, index)
    places = [path.stem, *([path.parent.name] if path.parent != index.root else [])]
    kind = next(filter(None, map(part_of, places)), ("", ""))[0]
    folders = [name for name in subfolders(index.root) if kind and (part_of(name) or ("",))[0] == kind]
    folders += [] if path.parent == index.root else [path.parent.name]
    unique = [name for name, values in table.items() if values and len(set(values)) == len(values)]
    named = (n for n in unique if all(index.find(value, folders) for value in table[n][:_PROBED]))
    if (file_column := next(named, None)) is None:
        return []
    others = {name.lower(): name for name in table if name != file_column}
    part_column = next((others.pop(name) for name in _PART_COLUMNS if name in others), None)
    column = label_column or next((others[name] for name in LABEL_COLUMNS if name in others), None)
    if column is None and len(others) == 1:
        (column,) = others.values()
    if column not in table:
        if others:
            listed = ", ".join(others.values())
            log.warning("%s: none of its columns (%s) is the label; --label-column names one", path, listed)
        return []
    names, labels = table[file_column], table[column]
    parts = (
        [(part_of(value) or (kind,))[0] for value in table[part_column]]
        if part_column
        else [kind] * len(names)
    )
    rows = []
    for name, label, part in zip(names, labels, parts, strict=True):
        if (file := index.find(name, folders)) is None or not label:
            raise InputError(
                f"each row of {path} must name a file of its folder and a class, got {name!r}, {label!r}"
            )
        rows.append((file, label, part))
    return rows


def _read(path: Path, index: _Index) -> dict[str, list[str]]:
    """Return a CSV file's columns, numbered if there is no header; none if it can't be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(",;\t|", key=text.partition("\n")[0].count)
        header, *rows = [row for row in csv.reader(io.StringIO(text), delimiter=separator) if row] or [[]]
        if any(len(row) != len(header) for row in rows):
            raise ValueError(f"its header has {len(header)} columns, a row has others")
    except (ValueError, OSError, csv.Error) as error:
        log.warning("%s can't be read as a list of files: %s", path, one_line(error))
        return {}
    if any(index.find(name, ()) for name in header):
        header, rows = [str(column) for column in range(len(header))], [header, *rows]
    return {name: [row[column].strip() for row in rows] for column, name in enumerate(header)}


def _by_part(lists: dict[Path, list[Row]]) -> dict[str, list[Row]]:
    """Return the rows of each part; lists without a part only count where none is train.

    Raises:
        InputError: two lists have rows of one part.
    """
    parts: dict[str, tuple[Path, list[Row]]] = {}
    for path, rows in lists.items():
        for kind in dict.fromkeys(part for _, _, part in rows):
            if kind in parts:
                raise InputError(
                    f"one CSV file must list {kind or 'the files'}, got {parts[kind][0]} and {path}; move one"
                )
            parts[kind] = path, [row for row in rows if row[2] == kind]
    if "train" in parts and "" in parts:
        log.warning("%s isn't used: it is neither train nor test", parts.pop("")[0])
    return {kind: rows for kind, (_, rows) in parts.items()}


def _labelled(rows: Sequence[Row], classes: Sequence[str]) -> Labelled:
    """Return (file, label) of rows; InputError for a class beyond `classes`."""
    labels = {name: label for label, name in enumerate(classes)}
    for file, name, _ in rows:
        if name not in labels:
            known_classes = ", ".join(classes[:10])
            raise InputError(f"classes must be among train's ({known_classes}), got {name!r} for {file}")
    return [(file, labels[name]) for file, name, _ in rows]
