"""No method waits for the device, or launches kernels, more than its budget (`budgets.yaml`)."""

from __future__ import annotations

import pytest

from ddray.methods import method_names
from tests.gpu.budgets import budgets, measured
from tests.gpu.runs import fit_briefly

UPDATE = "if that is meant: python -m tests.gpu.budgets --write"


@pytest.mark.parametrize("method", method_names())
def test_a_method_keeps_to_its_budget(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_briefly(monkeypatch)
    budget = budgets()[method]
    measured(method)  # what the pool is to hold is trained

    cost = measured(method)

    assert cost.syncs <= budget["syncs"], f"{cost.places}; {UPDATE}"
    assert cost.kernels == pytest.approx(budget["kernels"], rel=0.1, abs=1), UPDATE
