"""What a bench will cost: seconds per unit, estimated from units that were finished on this machine before.

Finished units leave one line in `$DDRAY_HOME/unit_costs.jsonl`, whatever run they belong to. An estimate
scales the median rate (seconds per amount of work) of the past units that are most alike, those of about its
size first.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddray.bench.graph import pool_work
from ddray.bench.units import Graph, Ranking, Work
from ddray.bench.work import asked_first
from ddray.data import Dataset
from ddray.files import home, storage_errors
from ddray.ledger import Ledger, Row
from ddray.nas.sweep import NasOptions, choose_architectures, resolve_config

log = logging.getLogger(__name__)

_KEPT = 20_000
_NEAREST = 15  # past units that an estimate is taken from
_FAR = 10
_SAME = ("kind", "what", "which")
_SORT = ("kind", "what")
# What a unit's rate may be taken from, best first: one method's steps say nothing of another's, and how much
# work a network of the pool is nobody knows beforehand.
_LIKE = {
    "pool": (_SAME,),
    "distill": (_SAME, _SORT),
    "nas": (_SAME, _SORT),
    "evaluate": (_SAME, _SORT, ("kind",)),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds that a unit is expected to take.

    Attributes:
        wall_s: None if nothing alike was ever finished here.
        units: how many past units it rests on.
        is_from_smaller: whether they all did far less, so that their start counts as work: an upper bound.
    """

    wall_s: float | None
    units: int
    is_from_smaller: bool = False


def costs_file() -> Path:
    """Return where past units' times are kept."""
    return home() / "unit_costs.jsonl"


def remember(work: Work, row: Row, device: str) -> None:
    """Keep a finished unit's time; one that was continued after a kill says nothing of the whole."""
    if row.status == "failed" or row.wall_s <= 0 or row.result.get("resumed_from_step"):
        return
    _keep([{**_alike(work), "device": device, "amount": work.amount, "wall_s": row.wall_s}])


def remember_sweep(ranking: Ranking, space: str, rows: Sequence[Row], device: str) -> None:
    """Keep the times of a NAS sweep's finished units: one architecture on one proxy, by one seed."""
    likes = _sweep_alike(space, ranking.dataset)
    kept = [row for row in rows if row.status == "done" and row.wall_s > 0]
    _keep([{**likes, "device": device, "amount": 1.0, "wall_s": row.wall_s} for row in kept])


def _keep(lines: Sequence[dict[str, Any]]) -> None:
    """Append lines, each by one write."""
    if not lines:
        return
    path = costs_file()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            for line in lines:
                os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)


def _alike(work: Work) -> dict[str, Any]:
    """Return what makes two units alike."""
    spec = work.unit.spec
    if work.kind == "evaluate":
        return {"kind": work.kind, "what": work.options["protocol"], "which": spec["arch"]}
    if work.kind == "pool":
        return {"kind": work.kind, "what": spec["kind"], "which": f"{spec['arch']} on {work.dataset}"}
    return {"kind": work.kind, "what": work.method, "which": work.dataset}


def _sweep_alike(space: str, dataset: str) -> dict[str, Any]:
    return {"kind": "nas", "what": space, "which": dataset}


@dataclass(frozen=True)
class SweepCost:
    """A NAS sweep as a forecast sees it.

    Attributes:
        title: for people.
        needs: keys of the sets that are its proxies.
        alike: what makes its units and past ones alike.
        num_units: architectures by proxies by seeds.
        num_done: how many of them a run that is continued has finished.
    """

    title: str
    needs: tuple[str, ...]
    alike: dict[str, Any]
    num_units: int
    num_done: int = 0

    @property
    def num_left(self) -> int:
        """How many are to be trained."""
        return max(0, self.num_units - self.num_done)


def sweep_title(ranking: Ranking) -> str:
    """Return what a person calls a sweep."""
    cell = ranking.sets[0][0]
    kind, size = cell.size
    return f"nas sweep of {cell.arch}: {ranking.dataset} {kind} {size}"


def sweep_of(ranking: Ranking, options: NasOptions, dataset: Dataset) -> SweepCost:
    """Return how many units a sweep on a dataset has.

    Raises:
        InputError: an unknown space, or a sample larger than it.
    """
    keys = tuple(key for _, held in ranking.sets for key in held)
    archs = len(choose_architectures(options, resolve_config(options), dataset))
    ours = archs * options.seeds * (len(keys) + len(ranking.evaluate.options.get("baselines", ())))
    truth = archs * options.truth_seeds if options.truth == "whole" else 0
    return SweepCost(sweep_title(ranking), keys, _sweep_alike(options.space, ranking.dataset), ours + truth)


class History:
    """Past units' times."""

    def __init__(self, device: str) -> None:
        self._past: list[dict[str, Any]] = []
        self._estimates: dict[tuple[Any, ...], Estimate] = {}  # a table has many units of one kind and size
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
        """Return a unit's expected seconds, from the past units that are most alike (`_LIKE`)."""
        wanted, amount = _alike(work), max(work.amount, 1.0)
        known = (*wanted.values(), amount)
        if known not in self._estimates:
            self._estimates[known] = self._nearest(wanted, amount)
        return self._estimates[known]

    def _nearest(self, wanted: dict[str, Any], amount: float) -> Estimate:
        """Return the expected seconds of so much work."""
        alike = self._alike_to(wanted)
        # A short unit's time is mostly that of its start: those of about this size are asked first.
        nearest = sorted(alike, key=lambda held: abs(math.log(held["amount"] / amount)))[:_NEAREST]
        if not nearest:
            return Estimate(None, 0)
        rates = [held["wall_s"] / held["amount"] for held in nearest]
        smaller = amount > _FAR * max(held["amount"] for held in nearest)
        return Estimate(statistics.median(rates) * amount, len(nearest), is_from_smaller=smaller)

    def sweep(self, held: SweepCost) -> Estimate:
        """Return a sweep's expected seconds: so many times an architecture's."""
        times = [past["wall_s"] for past in self._alike_to(held.alike)]
        return Estimate(statistics.median(times) * held.num_left if times else None, len(times))

    def _alike_to(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the past units that are most alike, the latest first; amounts are 1 or more."""
        for names in _LIKE[wanted["kind"]]:
            alike = [held for held in self._past if all(held[name] == wanted[name] for name in names)]
            if alike:
                return [{**held, "amount": max(held["amount"], 1.0)} for held in reversed(alike)]
        return []


def forecast(
    graph: Graph, ledger: Ledger | None, device: str, sweeps: Sequence[SweepCost] = ()
) -> dict[str, Any]:
    """Return the unit graph with states and estimates (the JSON of --dry-run).

    Args:
        graph: the units.
        ledger: of the run, if there is one.
        device: `cpu` or `cuda`.
        sweeps: the NAS sweeps that follow, a line each.
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
                entry = _line(name, "pool", None, [], history.estimate(pool_work(work, spec)))
                pool.setdefault(f"{name} {spec.key}", entry)
                needs.append(name)
        units.append(_line(work.title, work.kind, row, needs, history.estimate(work)))
    after = [
        {
            **_line(one.title, "nas", None, [titles[key] for key in one.needs], history.sweep(one)),
            **({} if one.num_left else {"status": "done"}),
            "num_trainings": one.num_units,
            "num_trainings_left": one.num_left,
        }
        for one in sweeps
    ]
    lines = [*pool.values(), *units, *after]
    missing = [line for line in lines if line["status"] == "missing"]
    guessed = [line["estimate_s"] for line in missing if line["estimate_s"] is not None]
    return {
        "units": lines,
        "num_units": len(lines),
        "num_missing": len(missing),
        "pool_known": known,
        "estimate_s": sum(guessed) if guessed else (None if missing else 0.0),
        "num_without_estimate": len(missing) - len(guessed),
        "num_from_smaller": sum(line["from_smaller"] for line in missing),
    }


def _line(unit: str, kind: str, row: Row | None, needs: list[str], held: Estimate) -> dict[str, Any]:
    return {
        "unit": unit,
        "kind": kind,
        "status": row.status if row is not None else "missing",
        "needs": needs,
        "estimate_s": held.wall_s,
        "past_units": held.units,
        "from_smaller": held.is_from_smaller,
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
                "trainings": sum(unit.get("num_trainings", 0) for unit in held),
                "needs": sorted({need.partition(" seed ")[0] for unit in held for need in unit["needs"]}),
                "estimate_s": sum(guessed) if len(guessed) == len(held) else None,
            }
        )
    return found
