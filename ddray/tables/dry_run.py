"""What a bench would cost: its units, without reading an image."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from ddray.config import read_yaml
from ddray.data import Dataset, open_dataset
from ddray.data.catalog import KNOWN
from ddray.data.reference import DatasetRef
from ddray.errors import InputError
from ddray.jobs.context import check_plan
from ddray.jobs.plan import Plan
from ddray.jobs.pool_needs import StoredEntries, predict_pool_specs
from ddray.pool.spec import PoolSpec
from ddray.runs.costs import Estimate, History, total, wall_seconds
from ddray.runs.ledger import Ledger, Row
from ddray.system.worker import workers_here
from ddray.tables.checks import check_row_shards
from ddray.tables.cost import estimate_of
from ddray.tables.graph import build_graph
from ddray.tables.nas_table import NasSweep, resolve_sweeps
from ddray.tables.options import BenchOptions
from ddray.tables.result import Forecast
from ddray.tables.spec import BenchSpec, MethodSpec
from ddray.tables.table import drop_scaled_differences, planned_cell
from ddray.tables.units import BenchUnit, Cell, Graph, pool_unit, shards_of

# Datasets whose class names are only in their files: the number of classes, for dry runs without the files.
_NUM_CLASSES: Final = {
    "tiny_imagenet": 200,
    "imagenet": 1000,
    "cub200": 200,
    "stanford_dogs": 120,
    "speech_commands_mini": 8,
}


def dry_run(spec: BenchSpec, options: BenchOptions, *, run_dir: Path | None) -> Forecast:
    """Return the unit graph with an estimated cost, and what each cell is compared with.

    No image is read, and datasets may be missing. What is finished is marked: units of the run in `run_dir`,
    and networks in the pool.

    Raises:
        InputError: a row is bad.
    """
    fingerprints: dict[str, str] = {}
    ledger = None
    if run_dir is not None and (run_dir / "config.yaml").is_file():
        fingerprints = dict(read_yaml(run_dir / "config.yaml").get("fingerprints", {}))
        ledger = Ledger(run_dir)

    @cache
    def get(name: str) -> Dataset:
        dataset = _facts(name, options.data_dir)
        dataset.__dict__["fingerprint"] = fingerprints.get(name, "unread")
        return dataset

    graph = build_graph(spec, get, _check)
    sweeps = resolve_sweeps(graph, spec, options, get)
    history = History(options.device)
    lines, is_pool_known = _unit_lines(graph, ledger, history)
    lines += [_sweep_line(graph, sweep, get(sweep.spec.dataset), run_dir, history) for sweep in sweeps]
    missing = [line for line in lines if line["status"] == "missing"]
    num_workers = _num_workers(options)
    cells = [planned_cell(cell) for cell in _cells_of(graph, sweeps)]
    drop_scaled_differences(cells, options.scale)
    return Forecast(
        name=spec.name,
        scale=options.scale,
        units=lines,
        cells=cells,
        num_units=len(lines),
        num_missing=len(missing),
        pool_known=is_pool_known,
        **total(missing),
        num_workers=num_workers,
        estimate_wall_s=None if num_workers is None else wall_seconds(missing, num_workers),
        num_from_smaller=sum(line["from_smaller"] for line in missing),
        nas_sweeps=[sweep.options.space for sweep in sweeps],
    )


def _num_workers(options: BenchOptions) -> int | None:
    """Return how many units this machine runs at a time; None for a cluster, which is not asked."""
    if options.address is not None:
        return options.max_concurrent
    if options.executor == "local":
        return 1
    return workers_here(options.cpus_per_unit, options.gpus, options.max_concurrent)


def _check(row: MethodSpec, unit: BenchUnit, plan: Plan) -> None:
    check_plan(plan)
    check_row_shards(row, plan, unit.shards, split=None)


def _cells_of(graph: Graph, sweeps: Sequence[NasSweep]) -> list[Cell]:
    """Return the table's cells, those of its rankings last."""
    return [*graph.cells, *(cell for sweep in sweeps for cell in sweep.planned_cells)]


def _unit_lines(graph: Graph, ledger: Ledger | None, history: History) -> tuple[list[dict[str, Any]], bool]:
    """Return one line per pool entry and unit, and whether every method says which entries it needs."""
    titles = {unit.key: unit.title for unit in graph.units()}
    units = []
    is_pool_known = True
    needs_no_pool: set[str] = set()  # settings whose method needs nothing at any size and seed
    pool: dict[str, dict[str, Any]] = {}
    stored = StoredEntries()
    for unit in graph.units():
        row = ledger.row(unit.key) if ledger is not None else None
        needs = [titles[key] for key in unit.identity.inputs]
        if unit.kind == "distill" and row is None:
            plan = graph.plans[unit.key]
            settings = json.dumps([plan.method, plan.dataset.name, plan.config.dump()])
            specs = (
                () if settings in needs_no_pool else predict_pool_specs(plan, str(unit.split), history.device)
            )
            if specs == ():
                needs_no_pool.add(settings)
            is_pool_known = is_pool_known and specs is not None
            for spec in specs or ():
                name = f"pool {spec.kind} {spec.arch} for {unit.dataset}, seed {spec.seed}"
                line = _pool_line(name, unit, spec, history, stored.seconds(spec, unit.dataset, specs or ()))
                if stored.has(spec, unit.dataset):
                    line["status"] = "done"
                pool.setdefault(f"{name} {spec.key}", line)
                needs.append(name)
            shards = _shard_lines(unit, plan.dataset.num_classes, ledger, history, needs)
            units += shards
            needs = [line["unit"] for line in shards] or needs
        units.append(_line(unit.title, unit.kind, row, needs, estimate_of(history, unit)))
    return [*pool.values(), *units], is_pool_known


def _pool_line(
    name: str, asker: BenchUnit, spec: PoolSpec, history: History, seconds: float | None
) -> dict[str, Any]:
    """Return the line of an entry: it takes what those in the pool took, `seconds`, else what units did."""
    estimate = estimate_of(history, pool_unit(asker, spec))
    if seconds is not None:
        estimate = replace(estimate, wall_s=seconds, units=max(estimate.units, 1))
    return _line(name, "pool", None, [], estimate)


def _shard_lines(
    unit: BenchUnit, num_classes: int, ledger: Ledger | None, history: History, needs: list[str]
) -> list[dict[str, Any]]:
    """Return a line per shard of a set; none if it has no shards."""
    if unit.shards == 1:
        return []
    lines = []
    for shard in shards_of(unit, num_classes):
        row = None if ledger is None else ledger.row(shard.key)
        lines.append(_line(shard.title, shard.kind, row, needs, estimate_of(history, shard)))
    return lines


def _sweep_line(
    graph: Graph, sweep: NasSweep, dataset: Dataset, run_dir: Path | None, history: History
) -> dict[str, Any]:
    num_trainings = sweep.num_trainings(dataset)
    num_done = 0 if run_dir is None else len(Ledger(sweep.folder(run_dir)).rows())
    num_left = max(0, num_trainings - num_done)
    needs = [graph.distil[key].title for key in sweep.spec.sets]
    return {
        **_line(sweep.title, "nas", None, needs, history.sweep(sweep.signature, num_left)),
        **({} if num_left else {"status": "done"}),
        "num_trainings": num_trainings,
        "num_trainings_left": num_left,
    }


def _line(unit: str, kind: str, row: Row | None, needs: list[str], estimate: Estimate) -> dict[str, Any]:
    return {
        "unit": unit,
        "kind": kind,
        "status": row.status if row is not None else "missing",
        "needs": needs,
        **estimate.dump(),
    }


def _facts(name: str, data_dir: Path | None) -> Dataset:
    """Open a dataset, or return the catalog's facts about a missing one."""
    try:
        return open_dataset(name, data_dir=data_dir)
    except InputError:
        reference = DatasetRef.parse(name)
        if reference.base not in KNOWN:
            raise
    entry, size = KNOWN[reference.base], reference.image_size
    return Dataset(
        name=name,
        class_names=entry.class_names
        or tuple(f"class {index}" for index in range(_NUM_CLASSES[reference.base])),
        image_shape=entry.shape if size is None else (entry.shape[0], size, size),
        mean=entry.mean or (0.5,) * entry.shape[0],
        std=entry.std or (0.5,) * entry.shape[0],
        can_flip=entry.can_flip if reference.can_flip is None else reference.can_flip,
        load_train=_no_images,
        load_test=_no_images,
    )


def _no_images() -> Any:
    raise InputError("a dry run reads no images")
