"""Running a bench: the run's folder, and the loop that hands units to workers."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddray.data import Dataset, open_dataset
from ddray.errors import DdrayError, InterruptedRunError, StorageError, one_line
from ddray.jobs.context import check_plan, check_size
from ddray.jobs.plan import Plan
from ddray.runs.costs import History
from ddray.runs.executor import Executor, Outcome, Task, WorkerPool
from ddray.runs.folder import Run, open_run
from ddray.runs.ledger import Ledger
from ddray.runs.results import write_results
from ddray.system.files import write_text
from ddray.system.progress import progress
from ddray.tables.along import write_along, write_costs
from ddray.tables.anomalies import anomalies
from ddray.tables.checks import check_row_shards
from ddray.tables.claims import TEST, Verdict, pairs_of, verdicts
from ddray.tables.cost import record_cost, record_sweep_costs, share_done
from ddray.tables.graph import build_graph
from ddray.tables.nas_table import NasSweep, resolve_sweeps, score_sweep
from ddray.tables.options import BenchOptions
from ddray.tables.result import BenchCell, BenchResult
from ddray.tables.scheduler import UnitScheduler, withdraw_crashes
from ddray.tables.spec import WHOLE, BenchSpec, MethodSpec
from ddray.tables.table import cells_of, drop_scaled_differences, failure_of, write_table
from ddray.tables.units import BenchUnit, Graph
from ddray.tables.worker import BenchJob, Sharded, run_unit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """A bench with a resolved table."""

    spec: BenchSpec
    options: BenchOptions  # how it is run
    graph: Graph
    sweeps: list[NasSweep]
    fingerprints: dict[str, str]  # its datasets' fingerprints, by name


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

    def check(row: MethodSpec, unit: BenchUnit, plan: Plan) -> None:
        check_plan(plan)
        check_size(plan, plan.dataset.train())
        if unit.shards > 1:
            check_row_shards(row, plan, unit.shards, unit.split.carve(plan.dataset.train())[0])

    graph = build_graph(spec, get, check)
    pairs_of(spec.claims, graph.cells)
    sweeps = resolve_sweeps(graph, spec, options, get)
    return Bench(spec, options, graph, sweeps, {name: data.fingerprint for name, data in opened.items()})


def run_bench(
    bench: Bench, executor: Executor, *, run_dir: Path | None = None, resume: bool = False
) -> BenchResult:
    """Run a bench, or resume the one in `run_dir`; None creates a numbered folder.

    Raises:
        InputError: the folder can't be used.
        StorageError: the disk is full.
        DdrayError: no cell of the table was scored.
    """
    begin = time.perf_counter()
    options = bench.options
    run = open_run(run_dir, _config(bench), command="bench", resume=resume)
    if options.retry_failed:
        ledgers = [run.ledger, *(Ledger(sweep.folder(run.folder)) for sweep in bench.sweeps)]
        log.info("running %d crashed units again", sum(map(withdraw_crashes, ledgers)))
    job = BenchJob(run.folder, run.epoch, options.data_dir, options.device)
    scheduler = UnitScheduler(bench.graph, run, job)
    # For reports on an unfinished run.
    write_text(run.folder / "planned.json", json.dumps([cell.dump() for cell in bench.graph.cells]))
    with run.continued("the bench"):
        _loop(scheduler, executor, run, job, options.unit_timeout)
        ranked, unranked = _sweep_cells(bench, run, executor)
    cells = [*cells_of(bench.graph.cells, run.ledger.row), *ranked]
    drop_scaled_differences(cells, options.scale)
    failures, skipped = [*scheduler.failures(), *unranked], scheduler.skipped()
    write_results(run.folder / "results.csv", run.ledger.rows())
    bare_cells = [{name: value for name, value in cell.items() if name != "sets"} for cell in cells]
    if cells or not (run.folder / "cells.json").is_file():  # an empty table replaces nothing
        write_table(run.folder / "table.csv", bare_cells)
        write_costs(run.folder / "costs.csv", cells)
        write_along(run.folder, cells)
        report = {"cells": cells, "failures": failures, "skipped": skipped}
        write_text(run.folder / "cells.json", json.dumps(report, indent=1))
    claims = _claims(bench, run)
    if not cells:
        reasons = sorted({str(failure["reason"]) for failure in failures}) or ["no unit was run"]
        raise DdrayError(f"no cell of the table was scored: {'; '.join(reasons)[:400]}")
    return BenchResult(
        name=bench.spec.name,
        run_dir=str(run.folder),
        cells=[BenchCell.parse(cell) for cell in bare_cells],
        num_failed=len(failures),
        failures=failures,
        skipped=skipped,
        anomalies=anomalies(bare_cells),
        claims=claims,
        wall_s=time.perf_counter() - begin,
    )


def _claims(bench: Bench, run: Run) -> list[Verdict]:
    """Decide the table's claims and write them to claims.json; StorageError if the disk is full."""
    path = run.folder / "claims.json"
    decided = verdicts(bench.spec.claims, bench.graph.cells, run.ledger.row)
    if decided:
        report = {"test": TEST, "claims": [verdict.dump() for verdict in decided]}
        write_text(path, json.dumps(report, indent=1))
    else:
        path.unlink(missing_ok=True)  # of an earlier start, which had claims
    return decided


def _config(bench: Bench) -> dict[str, Any]:
    """Return what the run's config.yaml says of the bench."""
    left_out: dict[str, Any] = {"replaced": True}  # it follows from the scale
    left_out["claims"] = True  # others may be asked of the same sets
    if all(row.name != WHOLE for row in bench.spec.rows()):
        left_out["limits"] = {"whole"}  # runs of before there were such rows are continued
    left_out |= {"shards": True, "methods": {"__all__": {"shards"}}}  # any number gives the same sets
    spec = bench.spec.model_dump(mode="json", exclude=left_out)
    shards = {row.row: row.shards or bench.spec.shards or 1 for row in bench.spec.rows() if row.name != WHOLE}
    if any(num > 1 for num in shards.values()):
        spec["shards_of_rows"] = shards
    options = bench.options
    gpus = {"gpus_per_unit": options.gpus} if options.gpus else {}
    facts = {"scale": options.scale, "fingerprints": bench.fingerprints, "device": options.device}
    return {**spec, **facts, **gpus}


def _sweep_cells(
    bench: Bench, run: Run, executor: Executor
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run or resume the NAS sweeps; return their cells and their failures.

    Raises:
        StorageError: the disk is full.
    """
    cells: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for sweep in bench.sweeps:
        ledger = Ledger(sweep.folder(run.folder))
        before = {row.key for row in ledger.rows()}
        try:
            cells += score_sweep(sweep, executor, run, data_dir=bench.options.data_dir)
        except (StorageError, InterruptedRunError):
            raise
        except DdrayError as error:
            reason = one_line(error)
            log.warning("%s failed: %s", sweep.title, reason)
            failures.append({"unit": sweep.title, "kind": "nas", "key": "", "reason": reason})
        finally:
            fresh = [row for row in ledger.rows() if row.key not in before]
            record_sweep_costs(sweep.signature, fresh, bench.options.device)
        for row in ledger.rows():
            if row.status == "failed":
                where = f"{row.spec['arch']} on {row.spec.get('proxy', 'the whole set')}"
                failures.append(failure_of(f"{sweep.title}: {where}", row))
    return cells, failures


def _loop(
    scheduler: UnitScheduler, executor: Executor, run: Run, job: BenchJob, timeout_s: float | None
) -> None:
    """Run what can run; record what it cost."""

    def tasks(units: Sequence[BenchUnit]) -> list[Task]:
        return [Task(unit.key, run_unit, (job, unit, *scheduler.shared(unit)), unit.title) for unit in units]

    def follow(outcome: Outcome, workers: WorkerPool) -> list[Task]:
        if isinstance(outcome.value, Sharded):  # to each node once, not to each shard
            prepared = workers.share(outcome.value.prepared)
            outcome = replace(outcome, value=replace(outcome.value, prepared=prepared))
        return tasks(scheduler.after(outcome))

    units = scheduler.first()
    if not units:
        return
    with (
        progress("bench", scheduler.total, start=scheduler.done, watch=run.reports) as show,
        executor.workers() as workers,
    ):
        history = History(job.device)  # as it was before this run, so that the ETA does not jump
        done = {key for key in scheduler.units if run.ledger.row(key) is not None}
        show(scheduler.done, "", work=share_done(history, scheduler.units, done))
        for outcome in workers.run(
            tasks(units), timeout_s=timeout_s, follow=lambda outcome: follow(outcome, workers)
        ):
            row = run.ledger.row(outcome.key)
            if row is not None:
                record_cost(scheduler.units[outcome.key], row, job.device)
                done.add(outcome.key)
            work = share_done(history, scheduler.units, done)
            show(scheduler.done, scheduler.units[outcome.key].title, total=scheduler.total, work=work)
