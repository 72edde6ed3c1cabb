"""What a bench will cost: seconds per unit, estimated from units finished earlier on this machine.

Every finished unit of any run adds one line to `$DDRAY_HOME/unit_costs.jsonl`. An estimate scales the median
rate (seconds per amount of work) of the most similar past units, preferring those of about the same size.
"""

import contextlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddray.runs.ledger import Row
from ddray.system.files import home, storage_errors
from ddray.tables.units import BenchUnit

_MAX_LINES = 20_000
_NEAREST = 15  # past units that an estimate is based on
_FAR_LARGER = 10
_KEYS = ("kind", "what", "which")
# How many of them a past unit must share for its rate to be used, best match first. One method's steps say
# nothing about another's, and the work of training a pool network is not known beforehand.
_MATCHES = {"pool": (3,), "distill": (3, 2), "nas": (3, 2), "evaluate": (3, 2, 1)}


@dataclass(frozen=True)
class Estimate:
    """Seconds that a unit is expected to take.

    If all past units were far smaller, their start-up time counts as work: it is an upper bound.
    """

    wall_s: float | None  # None if nothing similar was ever finished here
    units: int  # how many past units it is based on
    is_from_smaller: bool = False


def costs_file() -> Path:
    """Return the file with past units' times."""
    return home() / "unit_costs.jsonl"


def record_cost(unit: BenchUnit, row: Row, device: str) -> None:
    """Store a finished unit's time, unless it was resumed after a kill: that is not the time of the whole."""
    if row.status == "failed" or row.wall_s <= 0 or row.result.get("resumed_from_step"):
        return
    _append([{**_signature(unit), "device": device, "amount": unit.amount, "wall_s": row.wall_s}])


def record_sweep_costs(signature: Mapping[str, str], rows: Sequence[Row], device: str) -> None:
    """Store the times of a NAS sweep's finished units: one architecture on one proxy, with one seed."""
    common = {**signature, "device": device, "amount": 1.0}
    _append([{**common, "wall_s": row.wall_s} for row in rows if row.status == "done" and row.wall_s > 0])


def _append(lines: Sequence[dict[str, Any]]) -> None:
    """Append lines, each with a single write."""
    if not lines:
        return
    path = costs_file()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            for line in lines:
                file.write((json.dumps(line) + "\n").encode())


def _signature(unit: BenchUnit) -> dict[str, str]:
    """Return the keys by which units are compared."""
    what, which = unit.method, unit.dataset
    if unit.kind == "evaluate":
        what, which = unit.options["protocol"], unit.identity.spec["arch"]
    elif unit.pool is not None:
        what, which = unit.pool.kind, f"{unit.pool.arch} on {unit.dataset}"
    return {"kind": unit.kind, "what": what, "which": which}


class History:
    """Past units' times."""

    def __init__(self, device: str) -> None:
        self._past: list[dict[str, Any]] = []
        self._estimates: dict[tuple[Any, ...], Estimate] = {}  # a table has many units of one kind and size
        lines = costs_file().read_bytes().splitlines() if costs_file().is_file() else []
        for line in lines[-_MAX_LINES:]:
            with contextlib.suppress(ValueError):  # a torn line is skipped
                self._past.append(json.loads(line))
        self._past = [past for past in self._past if past["device"] == device]

    def estimate(self, unit: BenchUnit) -> Estimate:
        """Return a unit's expected seconds, from the most similar past units (`_MATCHES`)."""
        signature, amount = _signature(unit), max(unit.amount, 1.0)
        cache_key = (*signature.values(), amount)
        if cache_key not in self._estimates:
            self._estimates[cache_key] = self._nearest(signature, amount)
        return self._estimates[cache_key]

    def _nearest(self, signature: Mapping[str, str], amount: float) -> Estimate:
        """Return the expected seconds for this amount of work."""
        alike = self._most_similar(signature)
        # A short unit's time is mostly start-up: prefer units of about this size.
        nearest = sorted(alike, key=lambda past: abs(math.log(past["amount"] / amount)))[:_NEAREST]
        if not nearest:
            return Estimate(None, 0)
        rates = [past["wall_s"] / past["amount"] for past in nearest]
        smaller = amount > _FAR_LARGER * max(past["amount"] for past in nearest)
        return Estimate(statistics.median(rates) * amount, len(nearest), is_from_smaller=smaller)

    def sweep(self, signature: Mapping[str, str], num_trainings: int) -> Estimate:
        """Return a sweep's expected seconds: the median of one training, times the trainings left."""
        times = [past["wall_s"] for past in self._most_similar(signature)]
        return Estimate(statistics.median(times) * num_trainings if times else None, len(times))

    def _most_similar(self, signature: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the most similar past units, latest first, with amounts of at least 1."""
        for num_keys in _MATCHES[signature["kind"]]:
            names = _KEYS[:num_keys]
            alike = [past for past in self._past if all(past[name] == signature[name] for name in names)]
            if alike:
                return [{**past, "amount": max(past["amount"], 1.0)} for past in reversed(alike)]
        return []


def summarise(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the units of a forecast grouped by kind and title up to the seed, for people."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for unit in units:
        name = re.sub(" seed .*?(?=, |$)", "", unit["unit"], count=1)
        groups.setdefault((unit["kind"], name), []).append(unit)
    summaries = []
    for (kind, name), group in groups.items():
        guessed = [unit["estimate_s"] for unit in group if unit["estimate_s"] is not None]
        summaries.append(
            {
                "kind": kind,
                "unit": name,
                "units": len(group),
                "missing": sum(unit["status"] == "missing" for unit in group),
                "trainings": sum(unit.get("num_trainings", 0) for unit in group),
                "needs": sorted({need.partition(" seed ")[0] for unit in group for need in unit["needs"]}),
                "estimate_s": sum(guessed) if len(guessed) == len(group) else None,
            }
        )
    return summaries
