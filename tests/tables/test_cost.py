from __future__ import annotations

from typing import Any

import pytest

from ddray.runs.costs import Estimate
from ddray.tables import cost as module
from ddray.tables.cost import share_done


@pytest.fixture(autouse=True)
def _units_are_their_expected_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "estimate_of", lambda history, seconds: Estimate(seconds, 1))


@pytest.mark.parametrize(
    ("seconds", "done", "share"),
    [
        ({"a": 30.0, "b": 10.0, "c": None}, {"b"}, 10 / 60),  # c counts as the mean
        ({"a": 30.0, "b": 10.0, "c": None}, {"a", "b", "c"}, 1),
        ({"a": None, "b": None}, {"a"}, 1 / 2),
        ({"a": 0.0, "b": 4.0}, {"a"}, 0),
        ({}, set(), 0),
    ],
)
def test_units_count_by_what_they_are_expected_to_take(seconds: Any, done: Any, share: float) -> None:
    assert share_done(None, seconds, done) == pytest.approx(share)  # type: ignore[arg-type]
