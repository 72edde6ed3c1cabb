"""True accuracies without training: from a table, a CSV file, or the benchmark's own file.

NAS-Bench-201 (Dong and Yang, ICLR 2020; MIT) is read from the table that ships with ddray, or from the
original `NAS-Bench-201-v1_*.pth` through the package nas-bench-201. That package calls torch.load in a way
that fails since torch 2.6: the file is loaded here, as plain values only, and passed to it.
"""

from __future__ import annotations

import csv
import importlib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch

from ddray.errors import InputError, unknown
from ddray.ranking.nasbench201 import read_table
from ddray.ranking.spaces import NasSpace

log = logging.getLogger(__name__)

_V = TypeVar("_V")

DEFAULT_COLUMN: Final = "cifar10_test_200_mean"
_COLUMN = re.compile(
    r"(cifar10|cifar100|imagenet16)_(valid|test|valtest)_(12|200)(?:_(mean|mean_derived|s\d+))?$"
)
_API_NAMES: Final = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet16": "ImageNet16-120"}
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


def table_truth(space: NasSpace, indices: Sequence[int], column: str = DEFAULT_COLUMN) -> Truth:
    """Return a column of the NAS-Bench-201 table.

    Args:
        space: nasbench201.
        indices: the cells.
        column: an accuracy column; NaN for a cell without a run of that seed.

    Raises:
        InputError: another space, an unknown column, or a cell that does not exist.
    """
    if space.name != "nasbench201":
        raise InputError(
            f"--truth table needs --space nasbench201, got --space {space.name}; "
            "use --truth whole or a CSV file"
        )
    dataset, _, epochs, _ = _parse_column(column)
    test = f"{dataset}_test_{epochs}" + ("_mean" if epochs == "200" else "")
    return Truth(f"table:{column}", _cells(indices, column) / 100, _cells(indices, test) / 100)


def _cells(indices: Sequence[int], column: str) -> np.ndarray[Any, Any]:
    """Return a column of the table at `indices`.

    Raises:
        InputError: a cell that does not exist.
    """
    values = read_table()[column].to_numpy()
    wrong = [index for index in indices if not 0 <= index < len(values)]
    if wrong:
        raise InputError(f"index must be in 0..{len(values) - 1} for nasbench201, got {wrong[0]}")
    selected: np.ndarray[Any, Any] = values[np.asarray(indices, dtype=np.int64)]
    return selected


def _parse_column(column: str) -> tuple[str, str, str, str]:
    """Split an accuracy column's name into dataset, split, epochs and suffix (`mean`, `s777`, ...).

    Raises:
        InputError: it is not an accuracy column.
    """
    columns = [name for name in read_table().columns if _COLUMN.match(name)]
    match = _COLUMN.match(column)
    if match is None or column not in columns:
        raise unknown("--truth-column", column, columns)
    dataset, split, epochs, suffix = match.groups(default="")
    return dataset, split, epochs, suffix


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


def api_truth(path: Path, indices: Sequence[int], column: str = DEFAULT_COLUMN) -> Truth:
    """Return accuracies from the original NAS-Bench-201 file through its package.

    Cells are matched by structure. `*_mean` averages all seeds, `*_s777` takes one: NaN for a cell without
    that run. The table had to derive its `*_derived` columns; the file contains their values.

    Args:
        path: `NAS-Bench-201-v1_0-e61699.pth` or `-v1_1-096897.pth`.
        indices: cells, in nasbench201's numbering.
        column: an accuracy column of the table.

    Raises:
        InputError: the package or the file is missing, the file is damaged, the wrong one, or lacks a cell or
            the dataset, or the column is unknown.
    """
    dataset, split, epochs, suffix = _parse_column(column)
    structures = [str(structure) for structure in _cells(indices, "arch_str")]
    api, positions = _open_api(path, structures)
    seed = int(suffix[1:]) if suffix.startswith("s") else False
    values = [_query_accuracy(api, position, dataset, split, epochs, seed) for position in positions]
    if not np.isfinite(values).any():
        raise InputError(
            f"{path} has no {column} for these {len(values)} cells; choose another --truth-column"
        )
    test = (
        np.array([_query_accuracy(api, position, dataset, "test", epochs, False) for position in positions])
        / 100
    )
    return Truth(
        f"api:{path.name}:{column}", np.array(values) / 100, test if np.isfinite(test).any() else None
    )


def _open_api(path: Path, structures: Sequence[str]) -> tuple[Any, list[int]]:
    """Return the package's API for the given cells of a file, and their positions in it.

    The package copies its input: only the given cells are passed to it.
    """
    if not path.is_file():
        raise InputError(f"--truth api:FILE must name NAS-Bench-201's .pth file, {path} does not exist")
    try:
        package = importlib.import_module("nas_201_api")
    except ImportError as error:
        raise InputError(
            "--truth api:FILE needs the package: pip install nas-bench-201; or use --truth table"
        ) from error
    benchmark = _load(path)
    position_of = {structure: position for position, structure in enumerate(benchmark["meta_archs"])}
    missing = [
        structure for structure in structures if position_of.get(structure) not in benchmark["arch2infos"]
    ]
    if missing:
        raise InputError(
            f"{path} must hold every cell that is ranked, "
            f"{len(missing)} are missing, the first is {missing[0]}"
        )
    positions = [position_of[structure] for structure in structures]
    infos = {position: benchmark["arch2infos"][position] for position in positions}
    try:
        api = package.NASBench201API(
            {**benchmark, "arch2infos": infos, "evaluated_indexes": positions}, verbose=False
        )
    except Exception as error:  # failed assertions, or keys missing at any depth
        raise InputError(f"nas-bench-201 cannot read {path} ({type(error).__name__}: {error})") from error
    return api, positions


def _query_accuracy(
    api: Any, position: int, dataset: str, split: str, epochs: str, seed: int | bool
) -> float:
    """Return one accuracy in percent, averaged over seeds (`seed` False) or of one; NaN if there is none."""
    # For CIFAR-10, only networks trained on half of train have validation accuracies.
    name = "cifar10-valid" if (dataset, split) == ("cifar10", "valid") else _API_NAMES[dataset]
    try:
        info = api.get_more_info(position, name, iepoch=None, hp=epochs, is_random=seed)
    except (KeyError, ValueError):  # the file has no such dataset, or no such seed of this cell
        return math.nan
    return float(info.get(f"{split}-accuracy", math.nan))


def _load(path: Path) -> dict[str, Any]:
    """Load the original file: plain values, NumPy scalars and tensors, never anything that runs code.

    Raises:
        InputError: the file is damaged, or not NAS-Bench-201's.
    """
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, all of them mean: not a file of plain values
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if "weights_only" in str(error):  # torch's message advises switching the protection off
            reason = "it holds objects that could run code, which are never loaded"
        raise InputError(
            f"{path} must be NAS-Bench-201's undamaged file: {reason}; download it again"
        ) from error
    required = ("meta_archs", "arch2infos", "evaluated_indexes")
    if not isinstance(content, dict) or not set(required) <= content.keys():
        raise InputError(f"{path} must be NAS-Bench-201's file, a dict with {', '.join(required)}")
    return content


def _numpy_scalars() -> list[Any]:
    """Return the safe globals for the benchmark's file: parameter counts and some times are NumPy scalars."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    return [
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
        (multiarray.scalar, "numpy._core.multiarray.scalar"),
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
    ]
