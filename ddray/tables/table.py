"""The table of a bench: means, sample standard deviations, and the distance to the published numbers."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ddray.evaluation.published import Number, read_numbers
from ddray.runs.ledger import Row
from ddray.system.files import write_text
from ddray.tables.columns import csv_row
from ddray.tables.published import compare, find
from ddray.tables.spec import PublishedSource
from ddray.tables.units import Cell

_REPORTED: Final = ("arch", "accuracy_mean", "accuracy_std", "per_seed", "num_images", "wall_s")


def cells_of(cells: Sequence[Cell], row_of: Callable[[str], Row | None]) -> list[dict[str, Any]]:
    """Return the command's cells (docs/architecture.md, Commands), without those that have no scored set.

    Args:
        cells: the table's cells.
        row_of: returns the row of a key.
    """
    numbers = read_numbers()
    scored_cells = []
    for cell in cells:
        rows = [row for key in cell.keys if (row := row_of(key)) is not None and row.status == "done"]
        if rows:
            scored_cells.append(_cell(cell, rows, numbers))
    return scored_cells


def write_plan(
    path: Path, cells: Sequence[Cell], sets: Mapping[tuple[str, str, str, int], list[str]]
) -> None:
    """Write the planned cells, so that a report can show an unfinished run.

    Args:
        path: the file.
        cells: the table's cells.
        sets: keys of the sets for each (row, dataset, kind of size, size).

    Raises:
        StorageError: the file can't be written.
    """
    planned = [
        {**asdict(cell), "source": cell.source.dump(), "sets": sets[cell.method, cell.dataset, *cell.size]}
        for cell in cells
    ]
    write_text(path, json.dumps(planned))


def planned_cells(path: Path, row_of: Callable[[str], Row | None]) -> list[dict[str, Any]]:
    """Return a run's cells so far, from the file that `write_plan` wrote.

    Args:
        path: the file.
        row_of: returns the row of a key.
    """
    cells = []
    for planned in json.loads(path.read_text(encoding="utf-8")):
        sets = planned.pop("sets")
        fixed = {
            "size": tuple(planned["size"]),
            "keys": tuple(planned["keys"]),
            "source": PublishedSource(**planned["source"]),
        }
        cells += [{**cell, "sets": sets} for cell in cells_of([Cell(**{**planned, **fixed})], row_of)]
    return cells


def _cell(cell: Cell, rows: Sequence[Row], numbers: Sequence[Number]) -> dict[str, Any]:
    """Return one cell: mean and sample standard deviation over all networks of all sets."""
    per_set = [[float(value) for value in row.result["per_seed"]] for row in rows]
    values = [value for one in per_set for value in one]
    kind, size = cell.size
    entry: dict[str, Any] = {
        "method": cell.method,
        "dataset": cell.dataset,
        kind: size,
        "arch": cell.arch,
        "protocol": cell.protocol,
        "accuracy_mean": statistics.fmean(values),
        "accuracy_std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "num_sets": len(rows),
        "standard_error": standard_error(per_set),
    }
    for name in ("teacher", "augment", "settings"):
        if getattr(cell, name) is not None:
            entry[name] = getattr(cell, name)
    if cell.target != cell.dataset:
        entry["target"] = cell.target
    entry |= _further_means(rows)
    published_number = find(numbers, cell)
    if published_number is not None:
        entry["published"] = compare(published_number, entry["accuracy_mean"], entry["standard_error"])
    return entry


def _further_means(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the means of a protocol's further measures (such as LRS and ARS)."""
    measured = rows[0].result.items()
    names = [
        n
        for n, value in measured
        if isinstance(value, float) and n not in _REPORTED and not n.endswith("_std")
    ]
    return {name: statistics.fmean(float(row.result[name]) for row in rows) for name in names}


def standard_error(per_set: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean: over sets, or over the networks of a single one.

    Networks trained on the same set are not independent.
    """
    groups = [statistics.fmean(one) for one in per_set]
    if len(groups) < 2:
        groups = list(per_set[0])
    return statistics.stdev(groups) / len(groups) ** 0.5 if len(groups) > 1 else None


def write_table(path: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Write one line per cell; the same rows give the same bytes, even after interruptions.

    Raises:
        StorageError: the file can't be written.
    """
    import pandas as pd

    lines = [csv_row(cell) for cell in cells]
    fixed = list(csv_row({}))
    extra_columns = sorted({name for line in lines for name in line} - set(fixed))
    frame = pd.DataFrame(lines, columns=[*fixed, *extra_columns])
    write_text(path, frame.dropna(axis=1, how="all").convert_dtypes().to_csv(index=False))
