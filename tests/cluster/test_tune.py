"""What a search hands on to the parts that it consists of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddray.cluster import tune
from ddray.data import carve_val
from ddray.jobs.plan import resolve
from ddray.ranking.options import NasOptions
from ddray.tuning.options import TuneOptions


def test_architectures_are_trained_in_the_precision_of_the_trials(
    digits: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    passed: list[NasOptions] = []
    monkeypatch.setattr(tune, "spearman_objective", lambda nas, *_: passed.append(nas))
    options = TuneOptions(objective="nas-spearman", gpus_per_trial=0.0)
    run: Any = SimpleNamespace(folder=tmp_path)
    for layer in ({}, {"precision": "bf16", "deterministic": True}):
        plan = resolve("dm", digits, ipc=1, seed=0, layers=[layer])
        tune._nas_objective(plan, options, *carve_val(digits.train(), seed=0), run)

    assert [(nas.precision, nas.deterministic) for nas in passed] == [("tf32", False), ("bf16", True)]
