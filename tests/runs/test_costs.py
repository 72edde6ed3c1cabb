"""What units have cost, and estimates from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ddray.runs.costs import Estimate, History, costs_file, device_seconds, record_costs, total
from ddray.runs.ledger import Row, Unit

SIGNATURE = {"kind": "distill", "what": "dm", "which": "digits"}


def row(wall_s: float = 2.0, **result: Any) -> Row:
    return Row.done(Unit(kind="distill", spec=result), result, wall_s)


def test_device_seconds_are_those_of_all_processes() -> None:
    assert device_seconds(row()) == 2.0
    assert device_seconds(row(seconds=5.0)) == 5.0, "of a run that was resumed"
    assert device_seconds(row(seconds=1.0)) == 2.0, "the pool's work and the saving came on top"
    assert device_seconds(row(device_seconds=1.0)) == 1.0, "PB2's rows have the whole search's wall_s"


def test_only_whole_finished_units_are_recorded() -> None:
    failed = row().model_copy(update={"status": "failed"})
    record_costs(SIGNATURE, [(failed, 1.0), (row(0.0), 1.0), (row(resumed_from_step=4), 1.0)], "cpu")
    assert not costs_file().exists()
    record_costs(SIGNATURE, [(row(peak_memory_bytes=7), 1.0), (row(), 2.0)], "cpu")
    first, second = map(json.loads, costs_file().read_text().splitlines())
    assert first == {**SIGNATURE, "device": "cpu", "amount": 1.0, "wall_s": 2.0, "peak_memory_bytes": 7}
    assert "peak_memory_bytes" not in second


def test_the_memory_is_the_largest_of_similar_units() -> None:
    record_costs(SIGNATURE, [(row(peak_memory_bytes=size), 1.0) for size in (5, 9, 7)], "cpu")
    record_costs({**SIGNATURE, "what": "dsa"}, [(row(peak_memory_bytes=99), 1.0)], "cpu")
    estimate = History("cpu").estimate(SIGNATURE, 2.0)
    assert (estimate.wall_s, estimate.peak_memory_bytes) == (pytest.approx(4.0), 9)
    assert History("cpu").sweep(SIGNATURE, 3).peak_memory_bytes == 9
    assert History("cuda").estimate(SIGNATURE, 2.0) == Estimate(None, 0)


def test_lines_of_before_memory_was_noted_give_seconds_alone() -> None:
    record_costs(SIGNATURE, [(row(), 1.0)], "cpu")
    estimate = History("cpu").estimate(SIGNATURE, 1.0)
    assert (estimate.wall_s, estimate.peak_memory_bytes) == (2.0, None)


def test_totals() -> None:
    lines = [Estimate(2.0, 1, peak_memory_bytes=5).dump(), Estimate(3.0, 1).dump(), Estimate(None, 0).dump()]
    assert total(lines) == {"estimate_s": 5.0, "peak_memory_bytes": 5, "num_without_estimate": 1}
    assert total([]) == {"estimate_s": 0.0, "peak_memory_bytes": None, "num_without_estimate": 0}
    assert total(lines[2:])["estimate_s"] is None
