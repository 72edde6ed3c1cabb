"""What a search's units cost: the record of finished ones, and the forecast of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddray.config import Result
from ddray.jobs.plan import Plan
from ddray.runs.costs import History, record_costs, total
from ddray.runs.ledger import Ledger, Row
from ddray.tuning.options import TuneOptions
from ddray.tuning.search import Search


class SearchForecast(Result):
    """What `ddray tune --dry-run` returns: the units by kind, and what the missing ones should take."""

    method: str
    dataset: str
    strategy: str
    num_samples: int
    units: list[dict[str, Any]]
    """Trials, and final runs of the winner and the paper's point: how many, and what one takes."""
    num_units: int
    num_missing: int
    estimate_s: float | None
    """Seconds of one device for all missing units with an estimate; None if none has one."""
    peak_memory_bytes: int | None
    """Of the largest missing unit; None if none has an estimate."""
    num_without_estimate: int
    """Missing units of a kind that was never run here."""
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
    """Return what a search's missing units are expected to take; `ledger` has the rows of an earlier part."""
    history, work = History(device), plan.work
    rows = [] if ledger is None else ledger.rows()
    kinds = [
        ("trial", num_samples, "trial", _signature("trial", plan, str(options.objective))),
        ("final", 2 * options.final_sets, "evaluate", _signature("final", plan)),
    ]
    lines, missing_units = [], []
    for name, num, kind, signature in kinds:
        estimate = history.estimate(signature, work).dump()
        missing = max(0, num - sum(row.kind == kind for row in rows))
        lines.append({"kind": name, "units": num, "missing": missing, **estimate})
        missing_units += [estimate] * missing
    return SearchForecast(
        method=plan.method,
        dataset=plan.dataset.name,
        strategy=options.strategy,
        num_samples=num_samples,
        units=lines,
        num_units=sum(line["units"] for line in lines),
        num_missing=len(missing_units),
        is_upper_bound=options.strategy == "asha-tpe",
        **total(missing_units),
    )


def _signature(kind: str, plan: Plan, objective: str = "val-accuracy") -> dict[str, str]:
    """Return the keys by which units are compared: a trial that ranks architectures costs as no other."""
    what = plan.method if objective == "val-accuracy" else f"{plan.method} by {objective}"
    return {"kind": kind, "what": what, "which": plan.dataset.name}


def _share(row: Row, last: int) -> float:
    """Return how much of its steps a trial has run; PB2's name steps, the last of which is the end."""
    rungs = [int(budget) for budget in row.result.get("rungs", {})]
    return max(rungs) / last if rungs and row.result.get("stopped_early") else 1.0
