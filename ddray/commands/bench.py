"""`ddray bench`: a table of methods, datasets and sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ddray.commands.options import DataDir, Download, Json, Resume, RunDir, absolute, output


def bench(
    file: Annotated[Path, typer.Argument(help="YAML of the table, such as configs/bench/<name>.yaml.")],
    scale: Annotated[
        str, typer.Option("--scale", help="paper: as written; cpu: minutes to hours; smoke: does it run.")
    ] = "paper",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the unit graph and its expected cost; run nothing.")
    ] = False,
    executor: Annotated[
        str, typer.Option("--executor", help="ray, or local: one after another in this process.")
    ] = "ray",
    cpus_per_unit: Annotated[float, typer.Option("--cpus-per-unit", help="CPU cores per unit.")] = 1.0,
    gpus_per_unit: Annotated[
        float, typer.Option("--gpus-per-unit", help="GPUs per unit; fractions share one.")
    ] = 0.0,
    max_concurrent: Annotated[int | None, typer.Option("--max-concurrent", help="Units at a time.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Ray cluster to connect to; default a local one.")
    ] = None,
    unit_timeout: Annotated[
        float | None, typer.Option("--unit-timeout", help="Seconds after which a unit counts as hung.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run crashed units again.")
    ] = False,
    run_dir: RunDir = None,
    resume: Resume = False,
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """Run a table, methods x datasets x sizes x seeds, and set its numbers beside the published ones."""
    with output(as_json) as emit:
        from ddray.cluster import bench as cluster_bench
        from ddray.commands.bench_display import bench_tables, forecast_tables
        from ddray.tables.dry_run import dry_run as forecast
        from ddray.tables.options import BenchOptions
        from ddray.tables.spec import read_spec

        spec = read_spec(Path(os.path.abspath(file)), scale)
        options = BenchOptions.parse(
            {
                "scale": scale,
                "executor": executor,
                "cpus_per_unit": cpus_per_unit,
                "gpus_per_unit": gpus_per_unit,
                "max_concurrent": max_concurrent,
                "unit_timeout": unit_timeout,
                "address": address,
                "retry_failed": retry_failed,
                "data_dir": absolute(data_dir),
                "download": download,
            },
            prefix="--",
        )
        if dry_run:
            costs = forecast(spec, options, run_dir=absolute(run_dir))
            emit(costs, lambda: forecast_tables(costs))
            return
        result = cluster_bench.bench(spec, options, run_dir=absolute(run_dir), resume=resume)
        emit(result, lambda: bench_tables(spec.name, result))
