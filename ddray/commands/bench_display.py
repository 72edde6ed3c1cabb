"""The tables that `ddray bench` prints for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.commands.display import percent, table_of
from ddray.tables.cost import summarise
from ddray.tables.published import FIGURES

if TYPE_CHECKING:
    from ddray.tables.result import BenchResult


def bench_tables(result: BenchResult) -> list[Any]:
    """Return a bench's table in percent, its failures, and where its files are.

    Columns with the same value in every cell go into the title.
    """
    from rich.table import Table

    cells = [
        {**cell, "size": f"ipc {cell['ipc']}" if "ipc" in cell else f"{cell['budget']} images"}
        for cell in result.dump()["cells"]
    ]
    names = ("dataset", "size", "protocol", "target", "teacher", "augment", "settings", "arch")
    texts = {column: [str(cell.get(column, "-")) for cell in cells] for column in names}
    varied = [column for column in names if len(set(texts[column])) > 1]
    fixed = [texts[column][0] for column in names if len(set(texts[column])) == 1 and texts[column][0] != "-"]
    published = any("published" in cell for cell in cells)
    table = Table("method", *varied, "accuracy %", "n", title=", ".join([result.name, *fixed]))
    for column in ("published %", "difference (SE)") if published else ():
        table.add_column(column)
    figures = [name for name in FIGURES if any(cell.get(name) is not None for cell in cells)]
    for name in figures:
        table.add_column(FIGURES[name])
    for cell in cells:
        table.add_row(
            cell["method"],
            *(str(cell.get(column, "-")) for column in varied),
            *(percent(cell["accuracy_mean"], cell["accuracy_std"]), str(cell["n"])),
            *(published_text(cell.get("published")) if published else ()),
            *(_short(cell.get(name)) for name in figures),
        )
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


def _short(value: float | None) -> str:
    """Return a figure with three digits; from 1000 on as a whole number."""
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def published_text(comparison: dict[str, Any] | None) -> tuple[str, str]:
    """Return a published accuracy in percent, and our difference from it in points (and standard errors)."""
    if comparison is None:
        return "-", "-"
    difference_se = comparison["difference_se"]
    text = f"{100 * comparison['difference']:+.2f}" + (
        "" if difference_se is None else f" ({difference_se:+.1f})"
    )
    accuracy = percent(comparison["accuracy_mean"], comparison["accuracy_std"])
    return f"{accuracy} ({comparison['paper']}, {comparison['table']})", text


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
