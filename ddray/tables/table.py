"""The table of a bench: means, sample standard deviations, and the distance to the published numbers."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from ddray.evaluation.protocol import balance_matters
from ddray.evaluation.published import read_numbers
from ddray.runs.ledger import Row
from ddray.system.files import write_text
from ddray.tables.columns import MEASURED, Entry, csv_row
from ddray.tables.likeness import Likeness, described, likeness
from ddray.tables.published import compare
from ddray.tables.spec import WHOLE
from ddray.tables.units import Cell

NO_NUMBER: Final = "no published number"
_NO_DIFFERENCE: Final = {"difference": None, "difference_se": None}
_REPORTED: Final = ("arch", "accuracy_mean", "accuracy_std", "per_seed", "num_images", "wall_s")
_OF_SETS: Final = ("storage_floats", "storage_with_generator_floats", "approximation_mse", *MEASURED)


def cells_of(cells: Iterable[Cell], row_of: Callable[[str], Row | None]) -> list[dict[str, Any]]:
    """Return the command's cells (docs/architecture.md, Commands) with the keys of their sets.

    `row_of` returns the row of a key. Cells that have no scored set are left out.
    """
    scored_cells = []
    for cell in cells:
        rows = [row for key in cell.keys if (row := row_of(key)) is not None and row.status == "done"]
        if rows:
            per_set = [row.result["per_seed"] for row in rows]
            figures = {**_further_means(rows), **set_means(cell, row_of)}
            if along := _along(cell, row_of):
                figures["along"] = along
            scored_cells.append(scored_cell(cell, per_set, num_sets=len(rows), **figures))
    if not balance_matters(scored_cells):
        for scored in scored_cells:
            scored.pop("balanced_accuracy_mean", None)
    return scored_cells


def scored_cell(
    cell: Cell, per_set: Sequence[Sequence[float]], *, num_sets: int, **figures: Any
) -> dict[str, Any]:
    """Return one cell: mean and sample standard deviation over all networks of all sets, further figures."""
    accuracy = accuracy_of([value for values in per_set for value in values])
    error = standard_error(per_set)
    judged = likeness(read_numbers(), cell)
    if judged.number is not None and accuracy["n"]:
        figures["published"] = compare(judged.number, accuracy["accuracy_mean"], error)
        if judged.differs or cell.cut or cell.overridden:
            figures["published"] |= _NO_DIFFERENCE
    name, optional = names_of(cell)
    return {
        **name,
        **accuracy,
        "num_sets": num_sets,
        "standard_error": error,
        **optional,
        **_likeness_of(judged),
        **figures,
        "sets": list(cell.sets),
    }


def planned_cell(cell: Cell) -> dict[str, Any]:
    """Return a cell as a dry run lists it: what it will be set beside, or the number that it differs from."""
    judged = likeness(read_numbers(), cell)
    near = {} if judged.number is None or judged.compared else {"published": described(judged.number)}
    name, optional = names_of(cell)
    return {**name, **optional, **(_likeness_of(judged) or {"differs": [NO_NUMBER]}), **near}


def names_of(cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what every cell is told apart by, and what only some have."""
    kind, size = cell.size
    name: dict[str, Any] = {"method": cell.method, "dataset": cell.dataset}
    name |= {} if kind == WHOLE else {kind: size}
    name |= {"arch": cell.arch, "protocol": cell.protocol}
    optional = {field: getattr(cell, field) for field in ("teacher", "augment", "settings", "generator")}
    optional["cut"], optional["overridden"] = cell.cut, list(cell.overridden) or None
    optional["target"] = None if cell.target == cell.dataset else cell.target
    return name, {field: value for field, value in optional.items() if value is not None}


def _likeness_of(judged: Likeness) -> dict[str, Any]:
    """Return `compared`, the published number that a cell is set beside, or the reasons why it `differs`."""
    if judged.compared is not None:
        return {"compared": described(judged.compared)}
    return {"differs": list(judged.differs)} if judged.differs else {}


def accuracy_of(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of accuracies, their sample standard deviation (None for one), and their number."""
    return {
        "accuracy_mean": statistics.fmean(values) if values else None,
        "accuracy_std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def _further_means(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the means of what all rows measured further (such as LRS and ARS)."""
    return {
        name: statistics.fmean(float(row.result[name]) for row in rows)
        for name, first in rows[0].result.items()
        if isinstance(first, float) and name not in _REPORTED and not name.endswith("_std")
        if all(name in row.result for row in rows)
    }


def set_means(cell: Cell, row_of: Callable[[str], Row | None]) -> dict[str, float]:
    """Return what distilling a cell's sets took and what they store: means, where all sets' are known."""
    rows = [row for key in cell.sets if (row := row_of(key)) is not None and row.status == "done"]
    means = {}
    for name in _OF_SETS:
        values = [float(row.result[name]) for row in rows if row.result.get(name) is not None]
        if values and len(values) == len(rows):
            means[name] = statistics.fmean(values)
    return means


def _along(cell: Cell, row_of: Callable[[str], Row | None]) -> list[dict[str, Any]]:
    """Return the accuracies along the steps: `[{"step", "accuracy_mean", "accuracy_std", "n"}]`."""
    points = []
    for step, keys in cell.along:
        rows = [row for key in keys if (row := row_of(key)) is not None and row.status == "done"]
        if rows:
            values = [value for row in rows for value in row.result["per_seed"]]
            points.append({"step": step, **accuracy_of(values)})
    return points


def standard_error(per_set: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean: over sets, or over the networks of a single one.

    Networks trained on the same set are not independent.
    """
    groups = per_set[0] if len(per_set) == 1 else [statistics.fmean(values) for values in per_set]
    return statistics.stdev(groups) / len(groups) ** 0.5 if len(groups) > 1 else None


def is_tied(entry: Entry, best: Entry) -> bool:
    """Return whether a cell is the best, or no worse by more than the standard error of their difference."""
    error = math.hypot(*(one.get("standard_error") or 0.0 for one in (entry, best)))
    return bool(best["accuracy_mean"] - entry["accuracy_mean"] <= error)


def failure_of(title: str, row: Row) -> dict[str, Any]:
    """Return a failed unit as the command's JSON lists it."""
    return {"unit": title, "kind": row.kind, "key": row.key, "reason": row.error or ""}


def drop_scaled_differences(cells: Iterable[dict[str, Any]], scale: str) -> None:
    """Compare no cell of a scaled-down run: it is not a reproduction, which each cell says."""
    if scale == "paper":
        return
    for cell in cells:
        number = cell.pop("compared", None)
        if number is not None:
            cell.setdefault("published", number)  # of a planned cell; one that was run has it
        if cell.keys() & {"published", "differs"}:
            cell["differs"] = [f"scale {scale}", *cell.get("differs", ())]
        if "difference" in cell.get("published", ()):
            cell["published"] |= _NO_DIFFERENCE


def write_table(path: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Write one line per cell; the same results give the same bytes, even after interruptions.

    What differs from run to run (`MEASURED`) is left out.

    Raises:
        StorageError: the file can't be written.
    """
    import pandas as pd

    lines = [csv_row(cell) for cell in cells]
    fixed = list(csv_row({}))
    extra_columns = sorted({name for line in lines for name in line} - set(fixed))
    frame = pd.DataFrame(lines, columns=[*fixed, *extra_columns])
    write_text(path, frame.dropna(axis=1, how="all").convert_dtypes().to_csv(index=False))
