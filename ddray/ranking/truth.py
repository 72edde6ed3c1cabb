"""True accuracies without training: from a CSV file, or from a source that the space brings."""

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import numpy as np

from ddray.data.reference import DatasetRef
from ddray.errors import InputError, unknown
from ddray.ranking import get_definition
from ddray.ranking.options import NasOptions
from ddray.ranking.spaces import NasSpace, owners

log = logging.getLogger(__name__)

_CSV_COLUMNS: Final = ("accuracy", "val_accuracy")
_CSV_TEST: Final = "test_accuracy"


@dataclass(frozen=True)
class Truth:
    """True accuracies of the requested architectures, in the requested order.

    Attributes:
        source: where they come from.
        values: accuracy in [0, 1] that a ranking is compared with, NaN where unknown [A] (or [T, A] by seed).
        test: accuracy in [0, 1] on test for the table's last column [A]; None if unknown.
        facts: what is known of them: `column`, `dataset`, `split`, `epochs` and `seeds`.
    """

    source: str
    values: np.ndarray[Any, Any]
    test: np.ndarray[Any, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def with_column(options: NasOptions, dataset: str | None) -> NasOptions:
    """Return options whose truth has a column: the one for `dataset`, unless another is named.

    `dataset` is what architectures are ranked on, with its options; None: unknown, as for scores of a file.

    Raises:
        InputError: the truth has no accuracies of the dataset, and no column is named.
    """
    definition = get_definition(options.space)
    kind, _, file = options.truth.partition(":")
    columns = definition.truth_columns
    if options.truth_column or not columns or (f"{kind}:FILE" if file else kind) not in definition.truths:
        return options
    name = next(iter(columns)) if dataset is None else DatasetRef.parse(dataset).base
    if name not in columns:
        raise InputError(
            f"--truth {kind} must be of the dataset that architectures are ranked on, got {name}; it has "
            f"{', '.join(columns)}: name a column to compare with another dataset, such as --truth-column "
            f"{' or '.join(columns.values())}"
        )
    return options.model_copy(update={"truth_column": columns[name]})


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
    if spaces := owners(name, attrgetter("truths")):
        raise InputError(
            f"--truth {name} needs --space {spaces}, got --space {space.name}; "
            "use --truth whole or a CSV file"
        )
    return csv_truth(Path(options.truth).absolute(), indices, options.truth_column, space=space)


def csv_truth(
    path: Path, indices: Sequence[int], column: str | None = None, *, space: NasSpace | None = None
) -> Truth:
    """Return accuracies from a CSV file with a column `index`; without a `space`, its size is not checked.

    `column` defaults to `accuracy` or `val_accuracy`; `test_accuracy`, if present, is read too. A file with
    any accuracy above 1 is in percent.

    Raises:
        InputError: the file is missing, has no such column, lacks or repeats an architecture, or has an
            invalid accuracy or an index outside the space.
    """
    names, lines = _read_csv(path, "--truth must be whole, table, api:FILE or a CSV file,")
    accuracy_column = column or next((name for name in _CSV_COLUMNS if name in names), None)
    if accuracy_column is None:
        raise InputError(
            f"{path} must have a column {' or '.join(_CSV_COLUMNS)}, got {', '.join(names)}; "
            "name it with --truth-column"
        )
    columns = [name for name in names if name != "index"]
    if accuracy_column not in columns:
        raise unknown(f"--truth-column of {path}", accuracy_column, columns)
    may_be_empty = {accuracy_column: False}
    if _CSV_TEST in names:
        may_be_empty.setdefault(_CSV_TEST, True)
    by_index = _numbers(lines, may_be_empty, space)
    scale = _unit(path, np.array([list(numbers.values()) for numbers in by_index.values()]))
    missing = [index for index in indices if index not in by_index]
    if missing:
        raise InputError(
            f"{path} must hold every architecture that is ranked, "
            f"{len(missing)} are missing, the first is {missing[0]}"
        )
    values = np.array([by_index[index][accuracy_column] for index in indices]) / scale
    test = np.array([by_index[index].get(_CSV_TEST, math.nan) for index in indices]) / scale
    facts = {"column": accuracy_column}
    tested = test if np.isfinite(test).any() else None
    return Truth(f"csv:{path.name}:{accuracy_column}", values, tested, facts)


def read_scores(path: Path, space: NasSpace | None = None) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Return (indices, scores [A]) from a CSV file with columns `index` and `score`, by ascending index.

    An empty score means a failed architecture: NaN. Without a `space`, its size is not checked.

    Raises:
        InputError: the file is missing or lacks a column, an index is repeated or outside the space, or a
            value is not a number.
    """
    names, lines = _read_csv(path, "--scores must be a CSV file with columns index,score:")
    if "score" not in names:
        raise InputError(f"{path} must have columns index,score, got {', '.join(names)}")
    by_index = _numbers(lines, {"score": True}, space)
    indices = sorted(by_index)
    return indices, np.array([by_index[index]["score"] for index in indices])


def _read_csv(path: Path, rule: str) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Return the columns of a CSV file, one of them `index`, and each line's place and its values by column.

    Raises:
        InputError: it is not a file (the message begins with `rule`), can't be read, is empty, or has a line
            with the wrong number of values.
    """
    if not path.is_file():
        raise InputError(f"{rule} {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
            lines = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path} must be a readable CSV file in UTF-8: {error}") from error
    if "index" not in names or len(set(names)) < len(names):
        raise InputError(
            f"{path} must have one column index and no duplicate names, got {', '.join(names) or 'nothing'}"
        )
    if not lines:
        raise InputError(f"{path} must hold at least one architecture below its header")
    for where, row in lines:
        # csv keeps superfluous values under the key None, and sets missing ones to None.
        if None in row or None in row.values():
            raise InputError(f"{where}: a line must have {len(names)} values, like the header")
    return names, lines


def _numbers(
    lines: Sequence[tuple[str, Mapping[str, str]]], columns: Mapping[str, bool], space: NasSpace | None
) -> dict[int, dict[str, float]]:
    """Return every line's numbers by index; `columns` says which may be empty: NaN.

    Raises:
        InputError: an index is not a whole number >= 0, is outside the space or repeated, or a number is bad.
    """
    by_index: dict[int, dict[str, float]] = {}
    for where, row in lines:
        text = row["index"].strip()
        if not (text.isascii() and text.isdigit()):
            raise InputError(f"{where}: index must be a whole number >= 0, got {row['index']!r}")
        if space is not None and int(text) >= len(space):
            raise InputError(
                f"{where}: indices of {space.name} must be in 0..{len(space) - 1}, got {text}; "
                "name their space with --space"
            )
        if int(text) in by_index:
            raise InputError(f"{where}: every index must appear once, {text} appears again")
        by_index[int(text)] = {
            name: math.nan if may_be_empty and not row[name].strip() else _number(row[name], name, where)
            for name, may_be_empty in columns.items()
        }
    return by_index


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {name} must be a finite number, got {text!r}")
    return value


def _unit(path: Path, values: np.ndarray[Any, Any]) -> float:
    """Return 100 for accuracies in percent, 1 for fractions; InputError if a value (NaN aside) is neither."""
    low, high = np.nanmin(values), np.nanmax(values)
    if low < 0 or high > 100:
        raise InputError(
            f"{path}: accuracies must be fractions in [0, 1] or percent in [0, 100], "
            f"got {low if low < 0 else high}"
        )
    if high <= 1:
        return 1.0
    log.info("%s: accuracies up to %g are read as percent", path, high)
    return 100.0
