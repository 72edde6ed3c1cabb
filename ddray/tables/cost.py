"""What the units of a bench cost, by the keys that `runs.costs` compares units by."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ddray.runs.costs import Estimate, History, record_costs
from ddray.runs.ledger import Row
from ddray.tables.units import BenchUnit

_CLASSES: Final = r", classes \d+\.\.\d+$"  # the end of a shard's title
_ALIKE: Final = {"distill": "shard", "shard": "distill"}


def record_cost(unit: BenchUnit, row: Row, device: str) -> None:
    """Store what a finished unit cost; of a set with shards, that is what these cost."""
    if not _is_joined(unit):
        record_costs(_signature(unit), [(row, unit.amount)], device)


def record_sweep_costs(signature: Mapping[str, str], rows: Sequence[Row], device: str) -> None:
    """Store what a NAS sweep's finished units cost: one architecture on one proxy, with one seed."""
    record_costs(signature, [(row, 1.0) for row in rows], device)


def estimate_of(history: History, unit: BenchUnit) -> Estimate:
    """Return what a unit is expected to take.

    Seconds per amount of work are those of past sets where no shard was distilled, and the other way round;
    joining shards is taken to cost nothing.
    """
    if _is_joined(unit):
        of_shards = estimate_of(history, replace(unit, shards=1))
        return Estimate(None if of_shards.wall_s is None else 0.0, of_shards.units)
    signature = _signature(unit)
    estimate = history.estimate(signature, unit.amount)
    if estimate.wall_s is None and unit.kind in _ALIKE:
        estimate = history.estimate({**signature, "kind": _ALIKE[unit.kind]}, unit.amount)
        return replace(estimate, peak_memory_bytes=None)
    return estimate


def share_done(history: History, units: Mapping[str, BenchUnit], done: Collection[str]) -> float:
    """Return the part of the work of all units that those with the keys `done` were.

    A unit counts by what it is expected to take, or as the mean of the others where nothing is expected.
    """
    expected = {key: estimate_of(history, unit).wall_s for key, unit in units.items()}
    times = [wall_s for wall_s in expected.values() if wall_s is not None]
    mean = (sum(times) / len(times) if times else 0.0) or 1.0
    weights = {key: mean if wall_s is None else wall_s for key, wall_s in expected.items()}
    total = sum(weights.values())
    return sum(weights[key] for key in done) / total if total else 0.0


def _is_joined(unit: BenchUnit) -> bool:
    return unit.kind == "distill" and unit.shards > 1


def _signature(unit: BenchUnit) -> dict[str, str]:
    """Return the keys by which units are compared."""
    what, which = unit.method, unit.dataset
    if unit.kind == "evaluate":
        what, which = unit.options["protocol"], unit.identity.spec["arch"]
    elif unit.pool is not None:
        what, which = unit.pool.kind, f"{unit.pool.arch} on {unit.dataset}"
    return {"kind": unit.kind, "what": what, "which": which}


def summarise(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the units of a forecast grouped by kind and title up to the seed, for people."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for unit in units:
        name = re.sub(" seed .*?(?=, |$)", "", unit["unit"], count=1)
        name = re.sub(_CLASSES, ", shards", name)
        groups.setdefault((unit["kind"], name), []).append(unit)
    summaries = []
    for (kind, name), group in groups.items():
        guessed = [unit["estimate_s"] for unit in group if unit["estimate_s"] is not None]
        peaks = [unit["peak_memory_bytes"] for unit in group if unit["peak_memory_bytes"] is not None]
        summaries.append(
            {
                "kind": kind,
                "unit": name,
                "units": len(group),
                "missing": sum(unit["status"] == "missing" for unit in group),
                "trainings": sum(unit.get("num_trainings", 0) for unit in group),
                "needs": sorted({_without_seed(need) for unit in group for need in unit["needs"]}),
                "estimate_s": sum(guessed) if len(guessed) == len(group) else None,
                "peak_memory_bytes": max(peaks, default=None),
            }
        )
    return summaries


def _without_seed(title: str) -> str:
    return title.partition(" seed ")[0] + (", shards" if re.search(_CLASSES, title) else "")
