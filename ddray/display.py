"""The tables that commands print for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def show(*tables: Any) -> None:
    """Print tables on stdout."""
    from rich.console import Console

    console = Console()
    for table in tables:
        for part in table if isinstance(table, list | tuple) else (table,):
            console.print(part)


def table_of(title: str, values: dict[str, Any]) -> Any:
    """Return a two-column table of a mapping."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name, text if len(text) < 400 else text[:400] + " ...")
    return table


def accuracy_table(title: str, results: list[dict[str, Any]]) -> Any:
    """Return a table of accuracies in percent: mean and sample standard deviation over networks."""
    from rich.table import Table

    table = Table("arch", "accuracy %", "std", "networks", "images", "seconds", title=title)
    for result in results:
        std = result["accuracy_std"]
        table.add_row(
            result["arch"],
            f"{100 * result['accuracy_mean']:.2f}",
            "-" if std is None else f"{100 * std:.2f}",
            str(len(result["per_seed"])),
            str(result["num_images"]),
            f"{result['wall_s']:.1f}",
        )
    return table


def tune_tables(result: dict[str, Any]) -> list[Any]:
    """Return what a search found, and where its files are."""
    best, paper = result["best"], result["paper_point"]
    summary = {
        "trials": f"{result['num_trials']} ({result['num_failed']} failed, "
        f"{result['num_stopped_early']} stopped early)",
        "best config": json.dumps(best["config"]) + f" (trial {best['trial']})",
        "val accuracy %": f"{100 * best['val_accuracy']:.2f} "
        f"(paper's point {100 * paper['val_accuracy']:.2f})",
        "test accuracy %": _percent(result["test_accuracy_mean"], result["test_accuracy_std"])
        + f" (paper's point {_percent(paper['test_accuracy_mean'], paper['test_accuracy_std'])})",
        "seconds": f"{result['wall_s']:.0f}",
        "artifact": result["artifact"],
        "picture": str(Path(result["artifact"]).with_suffix(".png")),
        "report": str(Path(result["run_dir"]) / "report.html"),
        "table": str(Path(result["run_dir"]) / "results.csv"),
    }
    return [table_of("search", summary)]


def _percent(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if std is None else f" +- {100 * std:.2f}")
