"""True accuracies without training: from a CSV file, or from a source that the space brings."""

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from ddray.errors import InputError, unknown
from ddray.ranking import get_definition
from ddray.ranking.options import NasOptions
from ddray.ranking.spaces import NasSpace, owners

log = logging.getLogger(__name__)

_V = TypeVar("_V")

_CSV_COLUMNS: Final = ("accuracy", "val_accuracy")
_CSV_TEST: Final = "test_accuracy"


@dataclass(frozen=True)
class Truth:
    """True accuracies of the requested architectures, in the requested order.

    Attributes:
        source: where they come from.
        values: accuracy in [0, 1] that a ranking is compared with, NaN where unknown [A] (or [T, A] by seed).
        test: accuracy in [0, 1] on test for the table's last column [A]; None if unknown.
    """

    source: str
    values: np.ndarray[Any, Any]
    test: np.ndarray[Any, Any] | None = None


def read_truth(options: NasOptions, space: NasSpace, indices: Sequence[int]) -> Truth:
    """Return the truth of `indices` from a source of the space or a CSV file.

    Raises:
        InputError: the truth can't be read, or lacks an architecture.
    """
    kind, _, file = options.truth.partition(":")
    name = f"{kind}:FILE" if file else kind
    source = get_definition(space.name).truths.get(name)
    if source is not None:
        return source(indices, options.truth_column, Path(file).absolute())
    if spaces := owners(lambda definition: name in definition.truths):
        raise InputError(
            f"--truth {name} needs --space {spaces}, got --space {space.name}; "
            "use --truth whole or a CSV file"
        )
    return csv_truth(Path(options.truth).absolute(), indices, options.truth_column, space=space)


def csv_truth(
    path: Path, indices: Sequence[int], column: str | None = None, *, space: NasSpace | None = None
) -> Truth:
    """Return accuracies from a CSV file with a column `index`.

    A file with any accuracy above 1 is in percent. A column `test_accuracy`, if present, is read too.

    Args:
        path: the file.
        indices: the architectures.
        column: the accuracy column; None takes `accuracy` or `val_accuracy`.
        space: what the indices are of; None checks no index.

    Raises:
        InputError: the file is missing, has no such column, lacks or repeats an architecture, or has an
            invalid accuracy or an index outside the space.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"--truth must be whole, table, api:FILE or a CSV file, {path} {reason}")
    lines = _read_csv(path)
    names = list(lines[0][1])
    accuracy_column = column or next((name for name in _CSV_COLUMNS if name in names), None)
    if accuracy_column is None:
        raise InputError(
            f"{path} must have a column {' or '.join(_CSV_COLUMNS)}, got {', '.join(names)}; "
            "name it with --truth-column"
        )
    if accuracy_column not in names or accuracy_column == "index":
        raise unknown(
            f"--truth-column of {path}", accuracy_column, [name for name in names if name != "index"]
        )
    test = _CSV_TEST if _CSV_TEST in names else None

    def accuracies(row: Mapping[str, str], where: str) -> tuple[float, float]:
        return _number(row[accuracy_column], accuracy_column, where), _number_or_nan(
            row[test], test, where
        ) if test else math.nan

    by_index = _by_index(path, lines, accuracies, space)
    scale = _unit(path, [value for pair in by_index.values() for value in pair])
    missing = [index for index in indices if index not in by_index]
    if missing:
        raise InputError(
            f"{path} must hold every architecture that is ranked, "
            f"{len(missing)} are missing, the first is {missing[0]}"
        )
    values = np.array([by_index[index][0] for index in indices], dtype=np.float64) / scale
    tested = np.array([by_index[index][1] for index in indices], dtype=np.float64) / scale
    return Truth(f"csv:{path.name}:{accuracy_column}", values, tested if np.isfinite(tested).any() else None)


def read_scores(path: Path, space: NasSpace | None = None) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return (indices, scores [A]) from a CSV file with columns `index` and `score`, by ascending index.

    An empty score means a failed architecture: NaN.

    Args:
        path: the file.
        space: what the indices are of; None checks no index.

    Raises:
        InputError: the file is missing or lacks a column, an index is repeated or outside the space, or a
            value is not a number.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"--scores must be a CSV file with columns index,score: {path} {reason}")
    lines = _read_csv(path)
    if "score" not in lines[0][1]:
        raise InputError(f"{path} must have columns index,score, got {', '.join(lines[0][1])}")

    by_index = _by_index(path, lines, lambda row, where: _number_or_nan(row["score"], "score", where), space)
    return sorted(by_index), np.array([by_index[index] for index in sorted(by_index)], dtype=np.float64)


def _read_csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the lines of a CSV file with a column `index` as (line number, values by column).

    Raises:
        InputError: it can't be read, is empty, or has a line with the wrong number of values.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            lines = [(reader.line_num, row) for row in reader]
            names = [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path} must be a readable CSV file in UTF-8: {error}") from error
    if "index" not in names or len(set(names)) < len(names):
        raise InputError(
            f"{path} must have one column index and no duplicate names, got {', '.join(names) or 'nothing'}"
        )
    if not lines:
        raise InputError(f"{path} must hold at least one architecture below its header")
    for line_number, row in lines:
        # csv keeps superfluous values under the key None, and sets missing ones to None.
        if None in row or None in row.values():
            raise InputError(
                f"{path}, line {line_number}: a line must have {len(names)} values, like the header"
            )
    return [(line_number, dict(zip(names, row.values(), strict=True))) for line_number, row in lines]


def _by_index(
    path: Path,
    lines: Sequence[tuple[int, Mapping[str, str]]],
    parse: Callable[[Mapping[str, str], str], _V],
    space: NasSpace | None,
) -> dict[int, _V]:
    """Return `parse(row, where)` of every line, by index.

    Raises:
        InputError: an index is not a whole number >= 0, is outside the space, or is repeated.
    """
    parsed: dict[int, _V] = {}
    for line_number, row in lines:
        where = f"{path}, line {line_number}"
        text = row["index"].strip()
        if not (text.isascii() and text.isdigit()):
            raise InputError(f"{where}: index must be a whole number >= 0, got {row['index']!r}")
        if space is not None and int(text) >= len(space):
            raise InputError(
                f"{where}: indices of {space.name} must be in 0..{len(space) - 1}, got {text}; "
                "name their space with --space"
            )
        if int(text) in parsed:
            raise InputError(f"{where}: every index must appear once, {text} appears again")
        parsed[int(text)] = parse(row, where)
    return parsed


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {name} must be a finite number, got {text!r}")
    return value


def _number_or_nan(text: str, name: str, where: str) -> float:
    """Return a number, or NaN for an empty field."""
    return _number(text, name, where) if text.strip() else math.nan


def _unit(path: Path, values: Sequence[float]) -> float:
    """Return 100 for accuracies in percent, 1 for fractions.

    Raises:
        InputError: a value is neither.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if low < 0 or high > 100:
        wrong = low if low < 0 else high
        raise InputError(
            f"{path}: accuracies must be fractions in [0, 1] or percent in [0, 100], got {wrong}"
        )
    if high <= 1:
        return 1.0
    log.info("%s: accuracies up to %g are read as percent", path, high)
    return 100.0
