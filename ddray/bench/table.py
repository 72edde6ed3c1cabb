"""The table of a bench: means, sample standard deviations, and the distance to the published numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ddray.bench.spec import Source
from ddray.bench.units import Cell
from ddray.files import write_text
from ddray.ledger import Row
from ddray.report.published import Number, compare, find, read_numbers

_OWN: Final = ("arch", "accuracy_mean", "accuracy_std", "per_seed", "num_images", "wall_s")
COLUMNS: Final = (
    *("method", "dataset", "target", "ipc", "budget", "protocol", "teacher", "augment", "settings", "arch"),
    *("accuracy_mean", "accuracy_std", "n", "num_sets", "standard_error"),
    *("published", "published_std", "published_source", "difference", "difference_se"),
)


def cells_of(cells: Sequence[Cell], row_of: Callable[[str], Row | None]) -> list[dict[str, Any]]:
    """Return the command's cells (DESIGN: commands); a cell none of whose sets was scored is left out.

    Args:
        cells: the table's numbers.
        row_of: gives the row of a key.
    """
    numbers = read_numbers()
    found = []
    for cell in cells:
        rows = [row for key in cell.keys if (row := row_of(key)) is not None and row.status == "done"]
        if rows:
            found.append(_cell(cell, rows, numbers))
    return found


def write_plan(
    path: Path, cells: Sequence[Cell], sets: Mapping[tuple[str, str, str, int], list[str]]
) -> None:
    """Write what the cells will be of, so that a run that has not ended can be shown.

    Args:
        path: the file.
        cells: the table's numbers.
        sets: keys of the sets behind (row, dataset, kind of size, size).

    Raises:
        StorageError: the file can't be written.
    """
    held = [
        {**asdict(cell), "source": cell.source.dump(), "sets": sets[cell.method, cell.dataset, *cell.size]}
        for cell in cells
    ]
    write_text(path, json.dumps(held))


def planned_cells(path: Path, row_of: Callable[[str], Row | None]) -> list[dict[str, Any]]:
    """Return the cells of a run so far, by what `write_plan` wrote.

    Args:
        path: the file.
        row_of: gives the row of a key.
    """
    found = []
    for held in json.loads(path.read_text(encoding="utf-8")):
        sets = held.pop("sets")
        fixed = {"size": tuple(held["size"]), "keys": tuple(held["keys"]), "source": Source(**held["source"])}
        found += [{**cell, "sets": sets} for cell in cells_of([Cell(**{**held, **fixed})], row_of)]
    return found


def _cell(cell: Cell, rows: Sequence[Row], numbers: Sequence[Number]) -> dict[str, Any]:
    """Return one cell: mean and sample standard deviation over all networks of all sets."""
    per_set = [[float(value) for value in row.result["per_seed"]] for row in rows]
    values = [value for one in per_set for value in one]
    kind, size = cell.size
    held: dict[str, Any] = {
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
            held[name] = getattr(cell, name)
    if cell.target != cell.dataset:
        held["target"] = cell.target
    held |= _more(rows)
    number = find(numbers, cell)
    if number is not None:
        held["published"] = compare(number, held["accuracy_mean"], held["standard_error"])
    return held


def _more(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the means of what else a protocol measures (such as LRS and ARS)."""
    held = rows[0].result.items()
    names = [n for n, value in held if isinstance(value, float) and n not in _OWN and not n.endswith("_std")]
    return {name: statistics.fmean(float(row.result[name]) for row in rows) for name in names}


def standard_error(per_set: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean: over sets where there are two, whose networks are alike."""
    groups = [statistics.fmean(one) for one in per_set]
    if len(groups) < 2:
        groups = list(per_set[0])
    return statistics.stdev(groups) / len(groups) ** 0.5 if len(groups) > 1 else None


def write_table(path: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Write one line per cell; the same rows give the same bytes, whatever happened on the way.

    Raises:
        StorageError: the file can't be written.
    """
    import pandas as pd

    lines = []
    for cell in cells:
        held = {k: v for k, v in cell.items() if k != "published"}
        if "published" in cell:
            one = cell["published"]
            held |= {
                "published": one["accuracy_mean"],
                "published_std": one["accuracy_std"],
                "published_source": f"{one['paper']}, {one['table']}",
                "difference": one["difference"],
                "difference_se": one["difference_se"],
            }
        lines.append(held)
    more = sorted({name for line in lines for name in line} - set(COLUMNS))
    frame = pd.DataFrame(lines, columns=[*COLUMNS, *more])
    write_text(path, frame.dropna(axis=1, how="all").convert_dtypes().to_csv(index=False))
