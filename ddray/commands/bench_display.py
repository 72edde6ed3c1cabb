"""The tables that `ddray bench` prints for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.commands.display import table_of
from ddray.tables.columns import Column, columns_of
from ddray.tables.cost import summarise

if TYPE_CHECKING:
    from ddray.tables.result import BenchResult


def bench_tables(result: BenchResult) -> list[Any]:
    """Return a bench's table in percent, its failures, and where its files are.

    Columns with the same value in every cell go into the title.
    """
    from rich.table import Table

    cells = result.dump()["cells"]
    columns = columns_of(cells)
    # What is the same in every row goes into the title.
    fixed = [
        column
        for column in columns[1:]
        if column.kind != "number" and len({column.text_of(cell) for cell in cells}) == 1
    ]
    varied = [column for column in columns if column not in fixed]
    title = ", ".join([result.name, *(column.text_of(cells[0]) for column in fixed)])
    table = Table(*(column.header for column in varied), title=title)
    for cell in cells:
        table.add_row(*(_text(column, cell) for column in varied))
    folder = Path(result.run_dir)
    summary = {
        "failed units": result.num_failed,
        "not run because of them": len(result.skipped),
        "seconds": f"{result.wall_s:.0f}",
        "table": str(folder / "table.csv"),
        "page": f"ddray report {folder}",
    }
    failures = Table("unit", "reason", title="failures")
    for failure in result.failures:
        failures.add_row(failure["unit"], failure["reason"][:400])
    return [table, *([failures] if result.failures else []), table_of("bench", summary)]


def _text(column: Column, cell: dict[str, Any]) -> str:
    """Return a cell's text, with its source."""
    text = column.text_of(cell)
    return text if column.note is None or text == "-" else f"{text} ({column.note(cell)})"


def forecast_tables(forecast: dict[str, Any]) -> list[Any]:
    """Return a dry run: the unit graph by groups, and its expected cost."""
    from rich.table import Table

    table = Table(
        "kind",
        "unit",
        "units",
        "missing",
        "needs",
        "expected",
        title=f"{forecast['name']}, {forecast['scale']}",
    )
    for group in summarise(forecast["units"]):
        needs = group["needs"]
        table.add_row(
            group["kind"],
            group["unit"] + (f" ({group['trainings']:,} trainings)" if group["trainings"] else ""),
            *(str(group["units"]), str(group["missing"])),
            needs[0] + (f" and {len(needs) - 1} more" if len(needs) > 1 else "") if needs else "-",
            _duration(group["estimate_s"]),
        )
    summary = {
        "units": f"{forecast['num_units']} ({forecast['num_missing']} missing)",
        "expected": f"{_duration(forecast['estimate_s'])} of one worker, from past units on this machine",
        "units without an estimate": forecast["num_without_estimate"],
    }
    if forecast["num_from_smaller"]:
        summary["too high for"] = (
            f"{forecast['num_from_smaller']} units: only far smaller ones have been run here"
        )
    if not forecast["pool_known"]:
        summary["pool"] = "some methods report which networks they need only once they start"
    return [table, table_of("forecast", summary)]


def _duration(seconds: float | None) -> str:
    """Return seconds in readable units."""
    if seconds is None:
        return "unknown"
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.1f} s"
