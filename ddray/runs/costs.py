"""What units have cost on this machine, and estimates from it: seconds on a device, and peak memory.

Finished units add a line each to `$DDRAY_HOME/unit_costs.jsonl`. An estimate scales the median rate (seconds
per amount of work) of the most similar past units of the same kind, preferring those of about the same size;
its memory is the largest that one of them took.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddray.runs.ledger import Row
from ddray.system.files import home, storage_errors

_MAX_LINES: Final = 20_000
_NEAREST: Final = 15  # past units that an estimate is based on
_FAR_LARGER: Final = 10
_KEYS: Final = ("kind", "what", "which")
# How many of them a past unit must share for its rate to be used, best match first. One method's steps say
# nothing about another's, and the work of training a pool network is not known beforehand.
_MATCHES: Final = {"pool": (3,), "evaluate": (3, 2, 1)}
_MATCHES_OF_OTHERS: Final = (3, 2)


def device_seconds(row: Row) -> float:
    """Return the seconds that a unit took of its device, over all processes that worked on it."""
    noted = row.result.get("device_seconds")
    return max(row.wall_s, float(row.result.get("seconds") or 0.0)) if noted is None else float(noted)


def costs_file() -> Path:
    """Return the file with past units' costs."""
    return home() / "unit_costs.jsonl"


def record_costs(signature: Mapping[str, str], rows: Sequence[tuple[Row, float]], device: str) -> None:
    """Store what finished units cost, each row with its amount of work, under their kind, what and which.

    Units that were resumed after a kill are left out: their time is not that of the whole.

    Raises:
        StorageError: the file can't be written.
    """
    lines = []
    for row, amount in rows:
        if row.status == "failed" or row.wall_s <= 0 or row.result.get("resumed_from_step"):
            continue
        line = {**signature, "device": device, "amount": amount, "wall_s": device_seconds(row)}
        peak = row.result.get("peak_memory_bytes")
        lines.append(line if peak is None else {**line, "peak_memory_bytes": peak})
    if not lines:
        return
    path = costs_file()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            for line in lines:  # a write each: lines of several processes don't mix
                file.write((json.dumps(line) + "\n").encode())


@dataclass(frozen=True)
class Estimate:
    """What a unit is expected to take of its device.

    If all past units were far smaller, their start-up time counts as work: it is an upper bound.
    """

    wall_s: float | None  # None if nothing similar was ever finished here
    units: int  # how many past units it is based on
    is_from_smaller: bool = False
    peak_memory_bytes: int | None = None  # None if no similar unit noted it

    def dump(self) -> dict[str, Any]:
        """Return the part of a forecast's line."""
        return {
            "estimate_s": self.wall_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "past_units": self.units,
            "from_smaller": self.is_from_smaller,
        }


class History:
    """Past units' costs on one kind of device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._past: list[dict[str, Any]] = []
        self._estimates: dict[tuple[Any, ...], Estimate] = {}  # a table has many units of one kind and size
        lines = costs_file().read_bytes().splitlines() if costs_file().is_file() else []
        for line in lines[-_MAX_LINES:]:
            with contextlib.suppress(ValueError):  # a torn line is skipped
                self._past.append(json.loads(line))
        self._past = [past for past in self._past if past["device"] == device]

    def estimate(self, signature: Mapping[str, str], amount: float) -> Estimate:
        """Return what this amount of work is expected to take, from the most similar past units."""
        amount = max(amount, 1.0)
        cache_key = (*(signature[name] for name in _KEYS), amount)
        if cache_key not in self._estimates:
            self._estimates[cache_key] = self._nearest(signature, amount)
        return self._estimates[cache_key]

    def _nearest(self, signature: Mapping[str, str], amount: float) -> Estimate:
        alike = self._most_similar(signature)
        # A short unit's time is mostly start-up: prefer units of about this size.
        nearest = sorted(alike, key=lambda past: abs(math.log(past["amount"] / amount)))[:_NEAREST]
        if not nearest:
            return Estimate(None, 0)
        rates = [past["wall_s"] / past["amount"] for past in nearest]
        smaller = amount > _FAR_LARGER * max(past["amount"] for past in nearest)
        return Estimate(statistics.median(rates) * amount, len(nearest), smaller, _peak(nearest))

    def sweep(self, signature: Mapping[str, str], num_trainings: int) -> Estimate:
        """Return a sweep's expected seconds: the median of one training, times the trainings left."""
        alike = self._most_similar(signature)
        times = [past["wall_s"] for past in alike]
        seconds = statistics.median(times) * num_trainings if times else None
        return Estimate(seconds, len(times), peak_memory_bytes=_peak(alike))

    def _most_similar(self, signature: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the most similar past units, latest first, with amounts of at least 1."""
        for num_keys in _MATCHES.get(signature["kind"], _MATCHES_OF_OTHERS):
            names = _KEYS[:num_keys]
            alike = [past for past in self._past if all(past[name] == signature[name] for name in names)]
            if alike:
                return [{**past, "amount": max(past["amount"], 1.0)} for past in reversed(alike)]
        return []


def _peak(past: Sequence[Mapping[str, Any]]) -> int | None:
    return max((int(one["peak_memory_bytes"]) for one in past if "peak_memory_bytes" in one), default=None)


def wall_seconds(lines: Sequence[Mapping[str, Any]], num_workers: int) -> float | None:
    """Return how long the missing lines of a forecast take on so many workers; None as for `total`.

    Each begins when a worker is free and what it `needs` is done; a sweep (`nas`) takes all workers. Lines
    without an estimate count nothing.
    """
    if lines and all(line["estimate_s"] is None for line in lines):
        return None
    free, ends = [0.0] * num_workers, dict.fromkeys((line["unit"] for line in lines), 0.0)
    for line in lines:
        seconds, needed = (
            line["estimate_s"] or 0.0,
            max((ends.get(one, 0.0) for one in line["needs"]), default=0.0),
        )
        if line["kind"] == "nas":
            free = [max(*free, needed) + seconds / num_workers] * num_workers
            ends[line["unit"]] = free[0]
        else:
            end = max(heapq.heappop(free), needed) + seconds
            heapq.heappush(free, end)
            ends[line["unit"]] = max(end, ends[line["unit"]])
    return max(free)


def total(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the lines of a forecast come to: seconds together, and the largest peak memory.

    Both are None without any estimate; the seconds are 0 without any line.
    """
    seconds = [line["estimate_s"] for line in lines if line["estimate_s"] is not None]
    peaks = [line["peak_memory_bytes"] for line in lines if line["peak_memory_bytes"] is not None]
    return {
        "estimate_s": sum(seconds) if seconds else (None if lines else 0.0),
        "peak_memory_bytes": max(peaks, default=None),
        "num_without_estimate": len(lines) - len(seconds),
    }
