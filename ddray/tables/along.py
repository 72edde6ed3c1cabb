"""What a bench writes beside its table: what distilling took, and accuracies along the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ddray.drawing.html import COLOURS
from ddray.drawing.plots import save_plot
from ddray.drawing.text import size_of
from ddray.system.files import write_text
from ddray.system.grouping import grouped
from ddray.tables.columns import MEASURED, name_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH: Final = 720
_HEIGHT: Final = 360  # pixels of a group's plot


def group_of(cell: Mapping[str, Any]) -> str:
    """Return the group whose cells share a plot: dataset, size and protocol."""
    target = f"{cell['protocol']} on {cell['target']}" if "target" in cell else str(cell["protocol"])
    return ", ".join(filter(None, (cell["dataset"], size_of(cell), target)))


def curve_names(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for the curve of each cell of a group: its row, with the fields that tell it apart."""
    fields = ("arch", "teacher", "augment", "settings")
    names = ["method", *(field for field in fields if len({cell.get(field) for cell in cells}) > 1)]
    return [", ".join(str(cell[name]) for name in names if cell.get(name)) for cell in cells]


def write_costs(path: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Write a line per cell with what distilling its sets took; StorageError if the file can't be written."""
    _write_csv(path, [cell for cell in cells if any(name in cell for name in MEASURED)], MEASURED)


def write_along(folder: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Write the accuracies along the steps as along.csv, a line per step, and along.png; none without any.

    Raises:
        StorageError: a file can't be written.
    """
    cells = [cell for cell in cells if "along" in cell]
    if not cells:
        return
    points = [{**cell, **point} for cell in cells for point in cell["along"]]
    _write_csv(folder / "along.csv", points, ("step", "accuracy_mean", "accuracy_std", "n"))
    groups = grouped(cells, group_of)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(groups), squeeze=False)[:, 0]
        for axes, (title, group) in zip(grid, groups.items(), strict=True):
            axes.set(title=title, xlabel="step", ylabel="accuracy (%)")
            for index, (name, cell) in enumerate(zip(curve_names(group), group, strict=True)):
                steps, means, stds = curve(cell)
                colour = COLOURS[index % len(COLOURS)]
                low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
                axes.plot(steps, means, color=colour, marker="o", markersize=3, label=name)
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.legend()

    save_plot(folder / "along.png", (_WIDTH, _HEIGHT * len(groups)), draw)


def curve(cell: Mapping[str, Any]) -> tuple[list[int], list[float], list[float]]:
    """Return steps, and accuracies and their standard deviations in percent (0 for a single network)."""
    along = cell["along"]
    means = [100 * point["accuracy_mean"] for point in along]
    return [point["step"] for point in along], means, [100 * (point["accuracy_std"] or 0) for point in along]


def _write_csv(path: Path, lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write what tells the lines apart and these columns, if they have values; no file without lines."""
    import pandas as pd

    if not lines:
        return
    names = [*name_columns(), *columns]
    frame = pd.DataFrame([{name: line.get(name) for name in names} for line in lines])
    write_text(path, frame.dropna(axis=1, how="all").convert_dtypes().to_csv(index=False))
