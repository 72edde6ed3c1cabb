"""`ddray bench`: a table of methods, datasets and sizes."""

from pathlib import Path
from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command, retyped
from ddray.config import AbsolutePath, Config
from ddray.system.options import DataFolder, RunOptions
from ddray.tables.options import BenchOptions


class Table(Config):
    """The table, and whether it is run."""

    file: AbsolutePath
    """YAML of the table, such as configs/bench/<name>.yaml."""
    dry_run: bool = False
    """Print the unit graph and its expected cost; run nothing."""


@command(
    Table,
    BenchOptions,
    RunOptions,
    example="ddray bench configs/bench/leaderboard.yaml --scale cpu --run-dir runs/leaderboard",
    arguments=("file",),
)
def bench(emit: Emit, file: Path, dry_run: bool = False, **options: Any) -> None:
    """Run a table, methods x datasets x sizes x seeds, and set its numbers beside the published ones."""
    from ddray import api

    if dry_run:
        costs = api.forecast(file, **options)
        emit(costs, lambda: [*display.forecast_tables(costs.dump()), display.without("--dry-run")])
        return
    result = api.bench(file, **options)
    emit(result, lambda: display.bench_tables(result, retyped(options, DataFolder)))
