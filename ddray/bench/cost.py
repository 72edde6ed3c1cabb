"""What a bench will cost: seconds per unit, estimated from units that were finished on this machine before.

Finished units leave one line in `$DDRAY_HOME/costs.jsonl`, whatever run they belong to. An estimate scales
the median rate (seconds per amount of work) of the past units that are most alike.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddray.bench.units import Graph, Work
from ddray.bench.work import asked_first
from ddray.files import storage_errors
from ddray.ledger import Ledger, Row
from ddray.pool import home

log = logging.getLogger(__name__)

_KEPT = 20_000


@dataclass(frozen=True)
class Estimate:
    """Seconds that a unit is expected to take.

    Attributes:
        wall_s: None if nothing alike was ever finished here.
        units: how many past units it rests on.
    """

    wall_s: float | None
    units: int


def costs_file() -> Path:
    """Return where past units' times are kept."""
    return home() / "costs.jsonl"


def remember(work: Work, row: Row, device: str) -> None:
    """Keep a finished unit's time; one that was continued after a kill says nothing of the whole."""
    if row.status == "failed" or row.wall_s <= 0 or row.result.get("resumed_from_step"):
        return
    line = json.dumps({**_alike(work), "device": device, "amount": work.amount, "wall_s": row.wall_s})
    path = costs_file()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (line + "\n").encode())
        finally:
            os.close(handle)


def _alike(work: Work) -> dict[str, Any]:
    """Return what makes two units alike."""
    spec = work.unit.spec
    if work.kind == "evaluate":
        return {"kind": work.kind, "what": work.options["protocol"], "which": spec["arch"]}
    if work.kind == "pool":
        return {"kind": work.kind, "what": spec["kind"], "which": spec["arch"]}
    return {"kind": work.kind, "what": work.method, "which": work.dataset}


class History:
    """Past units' times."""

    def __init__(self, device: str) -> None:
        self._past: list[dict[str, Any]] = []
        path = costs_file()
        if not path.is_file():
            return
        for line in path.read_bytes().splitlines()[-_KEPT:]:
            try:
                held = json.loads(line)
            except ValueError:  # a torn line: one estimate the poorer
                continue
            if held["device"] == device:
                self._past.append(held)

    def estimate(self, work: Work) -> Estimate:
        """Return a unit's expected seconds: by its likes, else by its kind."""
        wanted = _alike(work)
        for names in (("kind", "what", "which"), ("kind", "what"), ("kind",)):
            alike = [held for held in self._past if all(held[name] == wanted[name] for name in names)]
            if alike:
                rates = [held["wall_s"] / max(held["amount"], 1.0) for held in alike]
                return Estimate(statistics.median(rates) * max(work.amount, 1.0), len(alike))
        return Estimate(None, 0)


def forecast(graph: Graph, ledger: Ledger | None, device: str) -> dict[str, Any]:
    """Return the unit graph with states and estimates (the JSON of --dry-run).

    Args:
        graph: the units.
        ledger: of the run, if there is one.
        device: `cpu` or `cuda`.
    """
    history = History(device)
    titles = {work.key: work.title for work in graph.works()}
    units: list[dict[str, Any]] = []
    known = True
    pool: dict[str, dict[str, Any]] = {}
    for work in graph.works():
        row = ledger.row(work.key) if ledger is not None else None
        needs = [titles[key] for key in work.unit.inputs]
        if work.kind == "distill" and row is None:
            specs = asked_first(graph.plans[work.key])
            known = known and specs is not None
            for spec in specs or ():
                name = f"pool {spec.kind} {spec.arch} for {work.dataset}, seed {spec.seed}"
                pool.setdefault(
                    f"{name} {spec.key}", {"unit": name, "kind": "pool", "status": "missing", "needs": []}
                )
                needs.append(name)
        held = history.estimate(work)
        units.append(
            {
                "unit": work.title,
                "kind": work.kind,
                "status": row.status if row is not None else "missing",
                "needs": needs,
                "estimate_s": held.wall_s,
                "past_units": held.units,
            }
        )
    missing = [unit for unit in units if unit["status"] == "missing"]
    guessed = [unit["estimate_s"] for unit in missing if unit["estimate_s"] is not None]
    return {
        "units": [*({**unit, "estimate_s": None, "past_units": 0} for unit in pool.values()), *units],
        "num_units": len(units) + len(pool),
        "num_missing": len(missing) + len(pool),
        "pool_known": known,
        "estimate_s": sum(guessed) if guessed else None,
        "num_without_estimate": len(missing) - len(guessed) + len(pool),
    }


def summarise(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the units of a forecast grouped by kind and title up to the seed, for people."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for unit in units:
        head, _, tail = unit["unit"].partition(" seed ")
        rest = tail.partition(", ")[2]
        groups.setdefault((unit["kind"], head + (f", {rest}" if rest else "")), []).append(unit)
    found = []
    for (kind, name), held in groups.items():
        guessed = [unit["estimate_s"] for unit in held if unit["estimate_s"] is not None]
        found.append(
            {
                "kind": kind,
                "unit": name,
                "units": len(held),
                "missing": sum(unit["status"] == "missing" for unit in held),
                "needs": sorted({need.partition(" seed ")[0] for unit in held for need in unit["needs"]}),
                "estimate_s": sum(guessed) if len(guessed) == len(held) else None,
            }
        )
    return found
