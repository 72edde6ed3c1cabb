"""CSV files that label the files of a folder: in each row the name of a file, and its class."""

import csv
import io
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ddray.data.listing import Skipped, files_below, halves_of, loose_files, part_in, part_of, subfolders
from ddray.data.tree import Labelled, Tree
from ddray.errors import InputError, one_line

log = logging.getLogger(__name__)

LABEL_COLUMNS: Final = ("label", "fine_label", "labels", "target", "class")
_PART_COLUMNS: Final = ("split", "set", "subset", "partition", "data set")
_NO_LABELS: Final = ("", "-1")
_PROBED: Final = 50  # rows by which the column of files is recognised
Row = tuple[Path, str, str]
"""A file, its class, and its part: train, test, val, or empty if nothing says."""


def tree_of_lists(root: Path, suffixes: tuple[str, ...], label_column: str | None) -> Tree | None:
    """Return the files that CSV files in a folder, or in those of its parts, label; None without such lists.

    A row's part is said by a column (`split`), the CSV file's name (`train.csv`) or its folder. Lists that
    repeat the names of class folders are left to these.

    Raises:
        InputError: a list names a missing file or no class, or two lists are one part; no list has the
            column.
    """
    folders = [root, *(root / name for name in subfolders(root) if part_of(name))]
    tables = [path for folder in folders for path in loose_files(folder, (".csv", ".tsv"))]
    if not tables:
        return None
    index = _Index(root, suffixes)
    lists = {path: rows for path in tables if (rows := _rows(path, index, label_column))}
    if not lists and label_column is not None and index.columns:
        raise InputError(
            f"label_column must be one of {', '.join(index.columns)}, got {label_column!r} for the lists of "
            f"{root}"
        )
    if not lists or all(file.parent.name == label for rows in lists.values() for file, label, _ in rows):
        return None
    if index.has_class_folders:
        listed = ", ".join(path.name for path in lists)
        log.warning("%s: %s labels the files, not the folders that they are in", root, listed)
    parts = _by_part(lists)
    skipped = Skipped(root, suffixes, "files that no list names", deep=True)
    train_kind, test_kind = halves_of(
        {kind: [file for file, _, _ in rows] for kind, rows in parts.items()},
        skipped,
        "files",
        lambda kind: any(label not in _NO_LABELS for _, label, _ in parts[kind]),
    )
    train, test = parts[train_kind], None if test_kind is None else parts[test_kind]
    skipped.covered = [*lists, *(file for file, _, _ in [*train, *(test or ())])]
    classes = sorted({label for _, label, _ in train}.difference(_NO_LABELS), key=in_order)
    lister = None if test is None else partial(_labelled, test, classes)
    return Tree(classes, _labelled(train, classes), lister, skipped)


def in_order(label: str) -> tuple[bool, int, str]:
    """Return the key by which the names of classes are sorted: numbers by value, then texts."""
    return (False, int(label), "") if label.isdecimal() else (True, 0, label)


class _Index:
    """The files below a folder, found by what a list may call them."""

    def __init__(self, root: Path, suffixes: tuple[str, ...]) -> None:
        self.root = root
        self.columns: dict[str, None] = {}  # of lists that name files, but none of whose columns is the label
        self._by_path: dict[str, Path | None] = {}
        self._by_name: dict[str, Path | None] = {}
        parents: set[str] = set()
        start = len(str(root).rstrip("/")) + 1
        for file in files_below(root, suffixes):  # texts: paths would take half the time of a reading
            path = str(file)[start:]
            folder, _, name = path.rpartition("/")
            parents.add(folder)
            for names, index in (
                ({path, os.path.splitext(path)[0]}, self._by_path),
                ({name, os.path.splitext(name)[0]}, self._by_name),
            ):
                for key in names:
                    # A name that several files have stands for none.
                    index[key] = None if key in index else file
        self._folders = {folder.partition("/")[0] for folder in parents - {""}}
        names_of_folders = {folder.rpartition("/")[2] for folder in parents - {""}}
        self.has_class_folders = sum(part_of(name) is None for name in names_of_folders) > 1

    def find(self, name: str, folders: Sequence[str]) -> Path | None:
        """Return the file of that name, looked for in the folders first; None for none or several.

        Folders that a list names but the root lacks (`/home/me/data/...`) are ignored.
        """
        name = name.strip().replace("\\", "/").removeprefix("./")
        for path in (*(f"{folder}/{name}" for folder in folders), name):
            if (file := self._by_path.get(path)) is not None:
                return file
        if "/" not in name:
            return self._by_name.get(name)
        first, _, rest = name.partition("/")
        while rest and first not in self._folders:
            if (file := self._by_path.get(rest)) is not None:
                return file
            first, _, rest = rest.partition("/")
        return None


def _rows(path: Path, index: _Index, label_column: str | None) -> list[Row]:
    """Return the rows of a list; none if it is no list of these files, or has no classes.

    Raises:
        InputError: a row names a missing file or no class.
    """
    table = _read(path, index)
    kind = part_in(path.relative_to(index.root))
    folders = [name for name in subfolders(index.root) if kind and (part_of(name) or ("",))[0] == kind]
    folders += [] if path.parent == index.root else [path.parent.name]
    unique = [name for name, values in table.items() if values and len(set(values)) == len(values)]
    named = (n for n in unique if all(index.find(value, folders) for value in table[n][:_PROBED]))
    if (file_column := next(named, None)) is None:
        return []
    others = {name.lower(): name for name in table if name != file_column}
    part_column = next((others.pop(name) for name in _PART_COLUMNS if name in others), None)
    column = label_column or next((others[name] for name in LABEL_COLUMNS if name in others), None)
    if column is None and len(others) == 1 and not index.has_class_folders:
        (only,) = others.values()
        column = only if 2 * len(set(table[only])) <= len(table[only]) else None
    if column not in table:
        index.columns.update(dict.fromkeys(others.values()))
        if others:
            listed = ", ".join(others.values())
            log.warning("%s: none of its columns (%s) is the label; --label-column names one", path, listed)
        return []
    names, labels = table[file_column], table[column]
    parts: list[tuple[str, str] | None] = [None] * len(names)
    if part_column:
        parts = list(map(part_of, table[part_column]))
    may_be_empty = set(labels) <= set(_NO_LABELS)
    rows = []
    for name, label, part in zip(names, labels, parts, strict=True):
        if (file := index.find(name, folders)) is None or (label in _NO_LABELS and not may_be_empty):
            raise InputError(
                f"each row of {path} must name a file of its folder and a class, got {name!r}, {label!r}"
            )
        rows.append((file, label, (part or (kind,))[0]))
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
    """Return the rows of each part.

    Raises:
        InputError: two lists have rows of one part.
    """
    parts: dict[str, list[Row]] = defaultdict(list)
    source: dict[str, Path] = {}
    for path, rows in lists.items():
        for row in rows:
            if (first := source.setdefault(row[2], path)) != path:
                raise InputError(
                    f"one CSV file must list {row[2] or 'the files'}, got {first} and {path}; move one"
                )
            parts[row[2]].append(row)
    return dict(parts)


def _labelled(rows: Sequence[Row], classes: Sequence[str]) -> Labelled:
    """Return (file, label) of rows; InputError for a class beyond `classes`."""
    labels = {name: label for label, name in enumerate(classes)}
    for file, name, _ in rows:
        if name not in labels:
            known_classes = ", ".join(classes[:10])
            raise InputError(f"classes must be among train's ({known_classes}), got {name!r} for {file}")
    return [(file, labels[name]) for file, name, _ in rows]
