"""What a search's units cost: the record of finished ones, and the forecast of a search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ddray.config import Result
from ddray.data import SplitName
from ddray.jobs.plan import Plan
from ddray.jobs.pool_needs import StoredEntries, predict_pool_specs
from ddray.nets import multiply_adds
from ddray.pool.spec import PoolSpec
from ddray.runs.costs import Estimate, History, record_costs, total
from ddray.runs.ledger import Ledger, Row
from ddray.system.worker import workers_here
from ddray.tuning.options import TuneOptions
from ddray.tuning.search import Search


class SearchForecast(Result):
    """What `ddray tune --dry-run` returns: the units by kind, and what the missing ones should take."""

    method: str
    dataset: str
    strategy: str
    num_samples: int
    units: list[dict[str, Any]]
    """The pool's networks, trials, and final runs of the winner and the preset: how many, and what one
    takes."""
    num_units: int
    num_missing: int
    estimate_s: float | None
    """Seconds of one device for all missing units with an estimate; None if none has one."""
    peak_memory_bytes: int | None
    """Of the largest missing unit; None if none has an estimate."""
    num_without_estimate: int
    """Missing units of a kind that was never run here."""
    pool_known: bool
    """False if the method says only once it starts which networks it needs."""
    num_workers: int | None
    """Trials at a time on this machine; None for a cluster whose size no option says."""
    estimate_wall_s: float | None
    """Seconds until those workers have run them: the pool's networks, then trials, then final runs."""
    is_upper_bound: bool
    """Whether every trial is counted at full length, of which the strategy stops some early."""


def record_search_costs(search: Search, rows: Sequence[Row]) -> None:
    """Store what a search's finished units cost, trials that were stopped early by their part of the work.

    Raises:
        StorageError: the file can't be written.
    """
    plan, objective = search.plan, str(search.options.objective)
    work, device = plan.work, search.job.device
    trials = [(row, work * _share(row, search.job.budgets[-1])) for row in rows if row.kind == "trial"]
    record_costs(_signature("trial", plan, objective), trials, device)
    finals = [(row, work) for row in rows if row.kind == "evaluate"]
    record_costs(_signature("final", plan), finals, device)


def forecast_search(
    plan: Plan, options: TuneOptions, num_samples: int, ledger: Ledger | None, device: str
) -> SearchForecast:
    """Return what a search's missing units are expected to take; `ledger` has the rows of an earlier part.

    Networks in the pool are not missing. Where no such search was run before, trials and final runs take what
    distillations and scorings took.
    """
    history = History(device)
    rows = [] if ledger is None else ledger.rows()
    specs = predict_pool_specs(plan, str(SplitName(plan.seed)), device)
    lines = [*_pool_lines(plan, history, specs or ())]
    for name, num, kind in (("trial", num_samples, "trial"), ("final", 2 * options.final_sets, "evaluate")):
        missing = max(0, num - sum(row.kind == kind for row in rows))
        estimate = _estimate(history, name, plan, options)
        lines.append({"kind": name, "units": num, "missing": missing, **estimate.dump()})
    missing_units = [line for line in lines for _ in range(line["missing"])]
    num_workers = _num_workers(options)
    wall_s = sum(
        math.ceil(line["missing"] / (num_workers or 1)) * (line["estimate_s"] or 0.0) for line in lines
    )
    sums = total(missing_units)
    return SearchForecast(
        method=plan.method,
        dataset=plan.dataset.name,
        strategy=options.strategy,
        num_samples=num_samples,
        units=lines,
        num_units=sum(line["units"] for line in lines),
        num_missing=len(missing_units),
        is_upper_bound=options.strategy == "asha-tpe",
        pool_known=specs is not None,
        num_workers=num_workers,
        estimate_wall_s=None if num_workers is None or sums["estimate_s"] is None else wall_s,
        **sums,
    )


def _num_workers(options: TuneOptions) -> int | None:
    """Return how many trials this machine runs at a time; None for a cluster, which is not asked."""
    if options.address is not None:
        return options.max_concurrent
    parts = options.shards or 1
    return workers_here(parts * options.cpus_per_trial, parts * options.gpus, options.max_concurrent)


def _pool_lines(plan: Plan, history: History, specs: Sequence[PoolSpec]) -> Iterator[dict[str, Any]]:
    """Yield a line per kind of pool entry that is made before the first trial."""
    stored, dataset = StoredEntries(), plan.dataset.name
    for kind in dict.fromkeys(spec.kind for spec in specs):
        alike = [spec for spec in specs if spec.kind == kind]
        missing = [spec for spec in alike if not stored.has(spec, dataset)]
        spec = (missing or alike)[0]
        estimate = history.estimate(
            {"kind": "pool", "what": kind, "which": f"{spec.arch} on {dataset}"}, amount=0.0
        )
        if (seconds := stored.seconds(spec, dataset, specs)) is not None:
            estimate = replace(estimate, wall_s=seconds, units=max(estimate.units, 1))
        yield {"kind": "pool", "units": len(alike), "missing": len(missing), **estimate.dump()}


def _estimate(history: History, kind: str, plan: Plan, options: TuneOptions) -> Estimate:
    """Return what a trial or a final run is expected to take."""
    objective = str(options.objective)
    estimate = history.estimate(
        _signature(kind, plan, objective if kind == "trial" else "val-accuracy"), plan.work
    )
    if estimate.wall_s is not None or plan.scoring is not None or objective != "val-accuracy":
        return estimate
    scoring, size = plan.config.evaluate, plan.budget or plan.dataset.num_classes * plan.ipc
    num_networks = scoring.seeds if kind == "final" else min(scoring.val_seeds, scoring.seeds)
    amount = num_networks * scoring.epochs * size * multiply_adds(plan.arch, plan.dataset.image_shape)
    parts = (
        history.estimate({"kind": "distill", "what": plan.method, "which": plan.dataset.name}, plan.work),
        history.estimate({"kind": "evaluate", "what": str(options.protocol), "which": plan.arch}, amount),
    )
    if any(part.wall_s is None for part in parts):
        return estimate
    peaks = [part.peak_memory_bytes for part in parts if part.peak_memory_bytes is not None]
    return Estimate(
        sum(part.wall_s or 0.0 for part in parts),
        min(part.units for part in parts),
        any(part.is_from_smaller for part in parts),
        max(peaks, default=None),
    )


def _signature(kind: str, plan: Plan, objective: str = "val-accuracy") -> dict[str, str]:
    """Return the keys by which units are compared: a trial that ranks architectures costs as no other."""
    what = plan.method if objective == "val-accuracy" else f"{plan.method} by {objective}"
    return {"kind": kind, "what": what, "which": plan.dataset.name}


def _share(row: Row, last: int) -> float:
    """Return how much of its steps a trial has run; PB2's name steps, the last of which is the end."""
    rungs = [int(budget) for budget in row.result.get("rungs", {})]
    return max(rungs) / last if rungs and row.result.get("stopped_early") else 1.0
