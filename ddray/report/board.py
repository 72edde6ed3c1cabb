"""The page's leaderboards: a matrix of methods by datasets and sizes, and a table with every figure."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from ddray.drawing.html import text_uri
from ddray.drawing.text import size_of
from ddray.system.grouping import grouped
from ddray.tables.columns import Column, Entry, columns_of, csv_row
from ddray.tables.table import is_tied

_FIRST: Final = ("method", "accuracy_mean")
"""The table's first columns: what is read on a phone."""
_PLACE: Final = ("dataset", "target", "size")
_CONDITIONS: Final = ("arch", "teacher", "augment", "settings", "generator")
"""What may tell two columns of one dataset and size apart."""
_ALIKE: Final = ("method", *_CONDITIONS)


@dataclass(frozen=True)
class Mark:
    """A cell of the matrix."""

    entry: Entry
    is_best: bool  # no other cell of its column is better by more than the standard error of their difference


@dataclass(frozen=True)
class Matrix:
    """Accuracies of methods by dataset, size and conditions (columns).

    Rows with most columns come first, among them those that are least behind the best of each.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Mark | None, ...]], ...]

    def leaders(self) -> list[str]:
        """Return the methods with each column's highest mean, as often as they have it."""
        columns = [
            [mark for _, marks in self.rows if (mark := marks[index])] for index in range(len(self.heads))
        ]
        best = [max(float(mark.entry["accuracy_mean"]) for mark in column) for column in columns]
        return [
            str(mark.entry["method"])
            for column, mean in zip(columns, best, strict=True)
            for mark in column
            if mark.entry["accuracy_mean"] == mean
        ]

    @property
    def has_cuts(self) -> bool:
        """Whether a cell was cut to less than its preset's budget."""
        return any(mark is not None and mark.entry.get("cut") for _, marks in self.rows for mark in marks)


def of_most_sets(entries: Sequence[Entry]) -> list[Entry]:
    """Return the cells without those of a method that has one of more sets under the same conditions.

    One of a table's sets may have been scored again by `ddray evaluate`.
    """
    alike = grouped(entries, lambda entry: (*_place(entry), *(_text(entry, name) for name in _ALIKE)))
    return [max(group, key=lambda entry: int(entry.get("num_sets") or 0)) for group in alike.values()]


def matrix_of(entries: Sequence[Entry]) -> Matrix:
    """Return the matrix of one protocol's cells; those without an accuracy are left out."""
    entries = of_most_sets([entry for entry in entries if entry.get("accuracy_mean") is not None])
    places = grouped(entries, _place)
    telling = [name for name in _CONDITIONS if any(_varies(group, name) for group in places.values())]
    varying = [name for name in _PLACE if _varies(entries, name)]
    return matrix_by(
        entries,
        lambda entry: (*_place(entry), *(_text(entry, name) for name in telling)),
        lambda entry: _head(entry, [*varying, *telling]),
    )


def matrix_by(
    entries: Sequence[Entry], column_of: Callable[[Entry], Any], head_of: Callable[[Entry], str]
) -> Matrix:
    """Return the matrix of cells that all have an accuracy, by method and a column of one's own."""
    columns = grouped(entries, column_of)
    marks: dict[str, list[Mark | None]] = {str(entry["method"]): [None] * len(columns) for entry in entries}
    behind: dict[str, list[float]] = {method: [] for method in marks}
    for index, group in enumerate(columns.values()):
        best = max(group, key=lambda entry: float(entry["accuracy_mean"]))
        for entry in group:
            marks[str(entry["method"])][index] = Mark(entry, is_tied(entry, best))
            behind[str(entry["method"])].append(best["accuracy_mean"] - entry["accuracy_mean"])
    ranked = sorted(marks, key=lambda method: (-len(behind[method]), math.fsum(behind[method])))
    heads = tuple(head_of(group[0]) for group in columns.values())
    return Matrix(heads, tuple((method, tuple(marks[method])) for method in ranked))


def _place(entry: Entry) -> tuple[str, ...]:
    return tuple(_text(entry, name) for name in _PLACE)


def _text(entry: Entry, name: str) -> str:
    if name == "size":
        return size_of(entry)
    return f"on {entry[name]}" if name == "target" and name in entry else str(entry.get(name) or "")


def _varies(entries: Sequence[Entry], name: str) -> bool:
    return len({_text(entry, name) for entry in entries}) > 1


def _head(entry: Entry, names: Sequence[str]) -> str:
    parts = list(filter(None, (_text(entry, name) for name in names)))
    if not parts and "target" in names:
        parts = [f"on {entry['dataset']}"]
    return ", ".join(parts) or ("default settings" if {*names} & {*_CONDITIONS} else "accuracy")


def table_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return one protocol's table: its columns, what all lines share in words, and its CSV as a link.

    Columns that all lines share are told once: they would push numbers off the page.
    """
    columns = [column for column in columns_of(entries) if column.header != "protocol"]
    shared = [column for column in columns if column.name not in _FIRST and _is_shared(column, entries)]
    left = [column for column in columns if column not in shared]
    left.sort(key=lambda column: _FIRST.index(column.name) if column.name in _FIRST else len(_FIRST))
    return {
        "entries": entries,
        "columns": left,
        "shared": "; ".join(f"{column.header} {column.text_of(entries[0])}" for column in shared),
        "csv": text_uri(_csv(entries), "csv"),
    }


def _is_shared(column: Column, entries: Sequence[Entry]) -> bool:
    return len({column.text_of(entry) for entry in entries}) == 1 < len(entries)


def _csv(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as CSV, with the columns of a bench's table.csv."""
    text = io.StringIO()
    frame = pd.DataFrame([csv_row(entry) for entry in entries])
    frame.dropna(axis=1, how="all").convert_dtypes().to_csv(text, index=False)
    return text.getvalue()
