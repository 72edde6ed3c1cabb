"""Running a bench: the run's folder, and the loop that hands units to workers."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddray.data import Dataset, open_dataset
from ddray.errors import DdrayError, StorageError, one_line
from ddray.jobs.context import check_plan, check_size
from ddray.jobs.plan import Plan
from ddray.ranking.sweep import NasOptions, resolve_config
from ddray.runs.executor import Executor, Task
from ddray.runs.folder import Run, open_run
from ddray.runs.ledger import Ledger
from ddray.runs.results import write_results
from ddray.system.files import write_text
from ddray.system.progress import progress
from ddray.tables.cost import record_cost, record_sweep_costs, sweep_title
from ddray.tables.graph import build_graph
from ddray.tables.options import BenchOptions
from ddray.tables.result import BenchResult
from ddray.tables.scheduler import UnitScheduler, withdraw_crashes
from ddray.tables.spec import BenchSpec, Limits
from ddray.tables.table import cells_of, write_plan, write_table
from ddray.tables.units import BenchUnit, Graph, SweepSpec
from ddray.tables.worker import BenchJob, run_unit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """A bench with a resolved table.

    Attributes:
        spec: the table.
        options: how it is run.
        graph: its units.
        fingerprints: its datasets' fingerprints, by name.
    """

    spec: BenchSpec
    options: BenchOptions
    graph: Graph
    fingerprints: dict[str, str]


def prepare(spec: BenchSpec, options: BenchOptions) -> Bench:
    """Open the datasets, resolve every row, and refuse what can't run, before a folder is created.

    Raises:
        InputError: a dataset is missing, or a row does not fit its dataset.
    """
    opened: dict[str, Dataset] = {}

    def get(name: str) -> Dataset:
        if name not in opened:
            opened[name] = open_dataset(name, data_dir=options.data_dir, download=options.download)
        return opened[name]

    def check(plan: Plan) -> None:
        check_plan(plan)
        check_size(plan, plan.dataset.train())

    graph = build_graph(spec, get, check)
    check_sweeps(graph, spec, options, get)
    return Bench(spec, options, graph, {name: dataset.fingerprint for name, dataset in opened.items()})


def check_sweeps(
    graph: Graph, spec: BenchSpec, options: BenchOptions, get: Callable[[str], Dataset]
) -> list[NasOptions]:
    """Return the options of every NAS sweep of a graph.

    Args:
        graph: the units.
        spec: the table.
        options: how it is run.
        get: returns a dataset by name.

    Raises:
        InputError: an option is bad.
    """
    from ddray.tables.nas_table import check_sweep

    options_per_sweep = []
    for sweep in graph.sweeps:
        nas_options = sweep_options(sweep, spec, options)
        check_sweep(sweep, nas_options, get(sweep.dataset))
        options_per_sweep.append(nas_options)
    return options_per_sweep


def run_bench(
    bench: Bench,
    executor: Executor,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
) -> BenchResult:
    """Run a bench, or resume one.

    Args:
        bench: what to run.
        executor: runs the units and the NAS sweeps.
        run_dir: the run's folder; None creates a numbered one.
        resume: continue the run in that folder.

    Raises:
        InputError: the folder can't be used.
        StorageError: the disk is full.
        DdrayError: no cell of the table was scored.
    """
    begin = time.perf_counter()
    options = bench.options
    run = open_run(run_dir, _config(bench), command="bench", resume=resume)
    if options.retry_failed:
        ledgers = [run.ledger, *(_sweep_ledger(bench, sweep, run) for sweep in bench.graph.sweeps)]
        log.info("running %d crashed units again", sum(map(withdraw_crashes, ledgers)))
    job = _job(bench, run)
    scheduler = UnitScheduler(bench.graph, run, job)
    write_plan(run.folder / "planned.json", bench.graph.cells, _sets_of(bench.graph))
    _loop(scheduler, executor, run, job, options.unit_timeout)
    ranked, unranked = _sweep_cells(bench, run, executor)
    cells = [*cells_of(bench.graph.cells, run.ledger.row), *ranked]
    _drop_scaled_differences(cells, options.scale)
    failures, skipped = [*scheduler.failures(), *unranked], scheduler.skipped()
    _write(bench, run, cells, {"failures": failures, "skipped": skipped})
    if not cells:
        reasons = sorted({str(failure["reason"]) for failure in failures}) or ["no unit was run"]
        raise DdrayError(f"no cell of the table was scored: {'; '.join(reasons)[:400]}")
    return BenchResult.parse(
        {
            "name": bench.spec.name,
            "run_dir": str(run.folder),
            "cells": cells,
            "num_failed": len(failures),
            "failures": failures,
            "skipped": skipped,
            "wall_s": time.perf_counter() - begin,
        }
    )


def _job(bench: Bench, run: Run) -> BenchJob:
    data_dir = bench.options.data_dir
    return BenchJob(
        str(run.folder), run.epoch, None if data_dir is None else str(data_dir), bench.options.device
    )


def _config(bench: Bench) -> dict[str, Any]:
    """Return what must not change when the run is resumed; `replaced` follows from the scale."""
    spec_values = {name: value for name, value in bench.spec.dump().items() if name != "replaced"}
    run_values = {"scale": bench.options.scale, "fingerprints": bench.fingerprints}
    return {**spec_values, **run_values, "device": bench.options.device}


def _write(bench: Bench, run: Run, cells: Sequence[dict[str, Any]], problems: Mapping[str, Any]) -> None:
    """Write results.csv, table.csv, and cells.json for reports; an empty table replaces nothing."""
    write_results(run.folder / "results.csv", run.ledger.rows())
    if not cells and (run.folder / "cells.json").is_file():
        return
    write_table(run.folder / "table.csv", cells)
    report = {"cells": _with_sets(bench.graph, cells), **problems}
    write_text(run.folder / "cells.json", json.dumps(report, indent=1))


def _drop_scaled_differences(cells: Sequence[dict[str, Any]], scale: str) -> None:
    """Remove differences in standard errors from a scaled-down run: it is not a reproduction."""
    for cell in cells:
        if scale != "paper" and "published" in cell:
            cell["published"]["difference_se"] = None


def _sets_of(graph: Graph) -> dict[tuple[str, str, str, int], list[str]]:
    """Return the keys of the sets behind (row, dataset, kind of size, size)."""
    sets: dict[tuple[str, str, str, int], list[str]] = {}
    for unit in graph.distil.values():
        for row in graph.labels[unit.key]:
            sets.setdefault((row, unit.identity.spec["dataset"], *unit.size), []).append(unit.key)
    return sets


def _with_sets(graph: Graph, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells with the keys of the sets behind them, for reports."""
    sets = _sets_of(graph)
    cells_with_sets = []
    for cell in cells:
        kind = "ipc" if "ipc" in cell else "budget"
        cells_with_sets.append(
            {**cell, "sets": sets.get((cell["method"], cell["dataset"], kind, cell[kind]), [])}
        )
    return cells_with_sets


def _sweep_cells(
    bench: Bench, run: Run, executor: Executor
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run or resume the NAS sweeps; return their cells and their failures.

    Raises:
        StorageError: the disk is full.
    """
    cells: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for sweep in bench.graph.sweeps:
        title = sweep_title(sweep)
        try:
            cells += _cells_of_sweep(bench, sweep, run, executor)
        except StorageError:
            raise
        except DdrayError as error:
            reason = one_line(error)
            log.warning("%s failed: %s", title, reason)
            failures.append({"unit": title, "kind": "nas", "key": "", "reason": reason})
        failures += [
            {
                "unit": f"{title}: {row.spec['arch']} on {row.spec.get('proxy', 'the whole set')}",
                "kind": row.kind,
                "key": row.key,
                "reason": row.error or "",
            }
            for row in _sweep_ledger(bench, sweep, run).rows()
            if row.status == "failed"
        ]
    return cells, failures


def _cells_of_sweep(bench: Bench, sweep: SweepSpec, run: Run, executor: Executor) -> list[dict[str, Any]]:
    """Run or resume one NAS sweep; return its cells."""
    from ddray.tables.nas_table import score_sweep

    options = sweep_options(sweep, bench.spec, bench.options)
    ledger = _sweep_ledger(bench, sweep, run)
    before = {row.key for row in ledger.rows()}

    def has_set(key: str) -> bool:
        row = run.ledger.row(key)
        return row is not None and row.status == "done"

    try:
        return score_sweep(
            sweep,
            options,
            executor,
            run_dir=run.folder,
            has_set=has_set,
            data_dir=bench.options.data_dir,
        )
    finally:
        fresh = [row for row in ledger.rows() if row.key not in before]
        record_sweep_costs(sweep, options.space, fresh, bench.options.device)


def _sweep_ledger(bench: Bench, sweep: SweepSpec, run: Run) -> Ledger:
    """Return the ledger of a NAS sweep, which is a separate run below the bench's folder."""
    from ddray.tables.nas_table import sweep_folder

    return Ledger(sweep_folder(sweep, sweep_options(sweep, bench.spec, bench.options), run.folder))


def sweep_options(sweep: SweepSpec, spec: BenchSpec, options: BenchOptions) -> NasOptions:
    """Return a sweep's options within the scale's limits, with the bench's executor and resources.

    Raises:
        InputError: `ddray nas` has no such option, or a value is bad.
    """
    from ddray.tables.nas_table import nas_options

    unlimited = nas_options(
        sweep,
        {
            "seed": spec.val_seed,
            "executor": options.executor,
            "cpus_per_worker": options.cpus_per_unit,
            "gpus_per_worker": options.gpus_per_unit,
            "num_workers": options.max_concurrent,
            "address": options.address,
            **({} if options.unit_timeout is None else {"unit_timeout": options.unit_timeout}),
        },
    )
    return _within(unlimited, spec.limits)


def _within(options: NasOptions, limits: Limits) -> NasOptions:
    """Return a sweep's options within a scale's limits."""
    config, lower = resolve_config(options), {}
    for name, epochs in (("epochs", config.recipe.epochs), ("truth_epochs", config.truth_recipe.epochs)):
        if limits.epochs is not None and epochs > limits.epochs:
            lower[name] = limits.epochs
    for name in ("seeds", "truth_seeds"):
        if limits.networks is not None:
            lower[name] = min(getattr(options, name), limits.networks)
    # A size limit may leave fewer architectures than the sample.
    if limits.sample is not None and (options.sample is not None or options.max_mflops is None):
        lower["sample"] = min(options.sample or limits.sample, limits.sample)
    return options.model_copy(update=lower)


def _loop(
    scheduler: UnitScheduler, executor: Executor, run: Run, job: BenchJob, timeout_s: float | None
) -> None:
    """Run what can run; record what it cost."""

    def tasks(units: Sequence[BenchUnit]) -> list[Task]:
        return [Task(unit.key, run_unit, (job, unit), unit.title) for unit in units]

    units = scheduler.first()
    if not units:
        return
    with (
        progress("bench", scheduler.total, start=scheduler.done) as show,
        executor.workers() as workers,
    ):
        for outcome in workers.run(
            tasks(units), timeout_s=timeout_s, follow=lambda outcome: tasks(scheduler.after(outcome))
        ):
            row = run.ledger.row(outcome.key)
            if row is not None:
                record_cost(scheduler.unit(outcome.key), row, job.device)
            show(scheduler.done, scheduler.unit(outcome.key).title, total=scheduler.total)
