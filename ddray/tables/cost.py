"""What a bench will cost: seconds per unit, estimated from units finished earlier on this machine.

Every finished unit of any run adds one line to `$DDRAY_HOME/unit_costs.jsonl`. An estimate scales the median
rate (seconds per amount of work) of the most similar past units, preferring those of about the same size.
"""

import json
import logging
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddray.data import Dataset
from ddray.ranking.sweep import NasOptions, choose_architectures, resolve_config
from ddray.runs.ledger import Ledger, Row
from ddray.system.files import home, storage_errors
from ddray.tables.graph import pool_unit
from ddray.tables.units import BenchUnit, Graph, SweepSpec
from ddray.tables.worker import predict_pool_specs

log = logging.getLogger(__name__)

_MAX_LINES = 20_000
_NEAREST = 15  # past units that an estimate is based on
_FAR_LARGER = 10
_EXACT = ("kind", "what", "which")
_WITHOUT_WHICH = ("kind", "what")
# Keys that a past unit must share for its rate to be used, best match first. One method's steps say nothing
# about another's, and the work of training a pool network is not known beforehand.
_MATCH_ON = {
    "pool": (_EXACT,),
    "distill": (_EXACT, _WITHOUT_WHICH),
    "nas": (_EXACT, _WITHOUT_WHICH),
    "evaluate": (_EXACT, _WITHOUT_WHICH, ("kind",)),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds that a unit is expected to take.

    Attributes:
        wall_s: None if nothing similar was ever finished here.
        units: how many past units it is based on.
        is_from_smaller: whether all of them were far smaller; their start-up time then counts as work, so the
            estimate is an upper bound.
    """

    wall_s: float | None
    units: int
    is_from_smaller: bool = False


def costs_file() -> Path:
    """Return the file with past units' times."""
    return home() / "unit_costs.jsonl"


def record_cost(unit: BenchUnit, row: Row, device: str) -> None:
    """Store a finished unit's time, unless it was resumed after a kill: that is not the time of the whole."""
    if row.status == "failed" or row.wall_s <= 0 or row.result.get("resumed_from_step"):
        return
    _append([{**_signature(unit), "device": device, "amount": unit.amount, "wall_s": row.wall_s}])


def record_sweep_costs(sweep: SweepSpec, space: str, rows: Sequence[Row], device: str) -> None:
    """Store the times of a NAS sweep's finished units: one architecture on one proxy, with one seed."""
    likes = _sweep_signature(space, sweep.dataset)
    finished_rows = [row for row in rows if row.status == "done" and row.wall_s > 0]
    _append([{**likes, "device": device, "amount": 1.0, "wall_s": row.wall_s} for row in finished_rows])


def _append(lines: Sequence[dict[str, Any]]) -> None:
    """Append lines, each with a single write."""
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


def _signature(unit: BenchUnit) -> dict[str, Any]:
    """Return the keys by which units are compared."""
    spec = unit.identity.spec
    if unit.kind == "evaluate":
        return {"kind": unit.kind, "what": unit.options["protocol"], "which": spec["arch"]}
    if unit.kind == "pool":
        return {"kind": unit.kind, "what": spec["kind"], "which": f"{spec['arch']} on {unit.dataset}"}
    return {"kind": unit.kind, "what": unit.method, "which": unit.dataset}


def _sweep_signature(space: str, dataset: str) -> dict[str, Any]:
    return {"kind": "nas", "what": space, "which": dataset}


@dataclass(frozen=True)
class SweepCost:
    """A NAS sweep as a forecast sees it.

    Attributes:
        title: shown to people.
        needs: keys of the sets that are its proxies.
        signature: the keys by which its units are compared with past ones.
        num_units: architectures by proxies by seeds.
        num_done: how many of them the resumed run has finished.
    """

    title: str
    needs: tuple[str, ...]
    signature: dict[str, Any]
    num_units: int
    num_done: int = 0

    @property
    def num_left(self) -> int:
        """How many remain to be trained."""
        return max(0, self.num_units - self.num_done)


def sweep_title(sweep: SweepSpec) -> str:
    """Return a sweep's title, as shown to people."""
    cell = sweep.sets[0][0]
    kind, size = cell.size
    return f"nas sweep of {cell.arch}: {sweep.dataset} {kind} {size}"


def sweep_of(sweep: SweepSpec, options: NasOptions, dataset: Dataset) -> SweepCost:
    """Return how many units a sweep on a dataset has.

    Raises:
        InputError: an unknown space, or a sample larger than it.
    """
    keys = tuple(key for _, set_keys in sweep.sets for key in set_keys)
    archs = len(choose_architectures(options, resolve_config(options), dataset))
    ours = archs * options.seeds * (len(keys) + len(sweep.evaluate.options.get("baselines", ())))
    truth = archs * options.truth_seeds if options.truth == "whole" else 0
    return SweepCost(sweep_title(sweep), keys, _sweep_signature(options.space, sweep.dataset), ours + truth)


class History:
    """Past units' times."""

    def __init__(self, device: str) -> None:
        self._past: list[dict[str, Any]] = []
        self._estimates: dict[tuple[Any, ...], Estimate] = {}  # a table has many units of one kind and size
        path = costs_file()
        if not path.is_file():
            return
        for line in path.read_bytes().splitlines()[-_MAX_LINES:]:
            try:
                past = json.loads(line)
            except ValueError:  # a torn line is skipped
                continue
            if past["device"] == device:
                self._past.append(past)

    def estimate(self, unit: BenchUnit) -> Estimate:
        """Return a unit's expected seconds, from the most similar past units (`_MATCH_ON`)."""
        signature, amount = _signature(unit), max(unit.amount, 1.0)
        cache_key = (*signature.values(), amount)
        if cache_key not in self._estimates:
            self._estimates[cache_key] = self._nearest(signature, amount)
        return self._estimates[cache_key]

    def _nearest(self, signature: dict[str, Any], amount: float) -> Estimate:
        """Return the expected seconds for this amount of work."""
        alike = self._most_similar(signature)
        # A short unit's time is mostly start-up: prefer units of about this size.
        nearest = sorted(alike, key=lambda past: abs(math.log(past["amount"] / amount)))[:_NEAREST]
        if not nearest:
            return Estimate(None, 0)
        rates = [past["wall_s"] / past["amount"] for past in nearest]
        smaller = amount > _FAR_LARGER * max(past["amount"] for past in nearest)
        return Estimate(statistics.median(rates) * amount, len(nearest), is_from_smaller=smaller)

    def sweep(self, sweep_cost: SweepCost) -> Estimate:
        """Return a sweep's expected seconds: the median of one training, times the trainings left."""
        times = [unit["wall_s"] for unit in self._most_similar(sweep_cost.signature)]
        return Estimate(statistics.median(times) * sweep_cost.num_left if times else None, len(times))

    def _most_similar(self, signature: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the most similar past units, latest first, with amounts of at least 1."""
        for names in _MATCH_ON[signature["kind"]]:
            alike = [past for past in self._past if all(past[name] == signature[name] for name in names)]
            if alike:
                return [{**past, "amount": max(past["amount"], 1.0)} for past in reversed(alike)]
        return []


def forecast(
    graph: Graph, ledger: Ledger | None, device: str, sweeps: Sequence[SweepCost] = ()
) -> dict[str, Any]:
    """Return the unit graph with states and estimates (the JSON of --dry-run).

    Args:
        graph: the units.
        ledger: the run's, if there is one.
        device: `cpu` or `cuda`.
        sweeps: the NAS sweeps that follow, one line each.
    """
    history = History(device)
    titles = {unit.key: unit.title for unit in graph.units()}
    units: list[dict[str, Any]] = []
    is_pool_known = True
    needs_no_pool: set[str] = set()  # settings whose method needs nothing at any size and seed
    pool: dict[str, dict[str, Any]] = {}
    for unit in graph.units():
        row = ledger.row(unit.key) if ledger is not None else None
        needs = [titles[key] for key in unit.identity.inputs]
        if unit.kind == "distill" and row is None:
            plan = graph.plans[unit.key]
            settings = json.dumps([plan.method, plan.dataset.name, plan.config.dump()])
            specs = () if settings in needs_no_pool else predict_pool_specs(plan)
            if specs == ():
                needs_no_pool.add(settings)
            is_pool_known = is_pool_known and specs is not None
            for spec in specs or ():
                name = f"pool {spec.kind} {spec.arch} for {unit.dataset}, seed {spec.seed}"
                entry = _line(name, "pool", None, [], history.estimate(pool_unit(unit, spec)))
                pool.setdefault(f"{name} {spec.key}", entry)
                needs.append(name)
        units.append(_line(unit.title, unit.kind, row, needs, history.estimate(unit)))
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
        "pool_known": is_pool_known,
        "estimate_s": sum(guessed) if guessed else (None if missing else 0.0),
        "num_without_estimate": len(missing) - len(guessed),
        "num_from_smaller": sum(line["from_smaller"] for line in missing),
    }


def _line(unit: str, kind: str, row: Row | None, needs: list[str], estimate: Estimate) -> dict[str, Any]:
    return {
        "unit": unit,
        "kind": kind,
        "status": row.status if row is not None else "missing",
        "needs": needs,
        "estimate_s": estimate.wall_s,
        "past_units": estimate.units,
        "from_smaller": estimate.is_from_smaller,
    }


def summarise(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the units of a forecast grouped by kind and title up to the seed, for people."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for unit in units:
        head, _, tail = unit["unit"].partition(" seed ")
        rest = tail.partition(", ")[2]
        groups.setdefault((unit["kind"], head + (f", {rest}" if rest else "")), []).append(unit)
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
