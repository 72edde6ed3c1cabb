"""What a search hands on to the parts that it consists of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddray.cluster import tune
from ddray.cluster.ray_tune import Publisher
from ddray.data import carve_val
from ddray.jobs.plan import resolve
from ddray.ranking.options import NasOptions
from ddray.runs.ledger import Unit
from ddray.tuning.live import LiveTable
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


@pytest.mark.parametrize("error", ["StorageError: no space", ""])
def test_a_trial_that_is_tried_again_or_given_up_leaves_no_report(tmp_path: Path, error: str) -> None:
    """Of a worker that was killed; an error that is not the trial's fault makes no row."""
    live = LiveTable(4, 0, tmp_path / "reports")
    ledger = SimpleNamespace(publish=lambda *_, **__: None)
    search: Any = SimpleNamespace(unit=lambda *_: Unit(kind="trial", spec={}), job=SimpleNamespace(epoch=0))
    search.run = SimpleNamespace(ledger=ledger)
    publisher = Publisher(search, live)
    error_file = tmp_path / "error.txt"
    error_file.write_text(error)
    trial = SimpleNamespace(config={"number": 3, "params": {}}, error_file=str(error_file))
    for end in (publisher.on_trial_recover, publisher.on_trial_error):
        (tmp_path / "reports" / "3").mkdir(parents=True)
        for name in ("3.json", "3/0.json", "4.json"):
            (tmp_path / "reports" / name).write_text("{}")
        end(0, [], trial)
        assert [path.name for path in (tmp_path / "reports").iterdir()] == ["4.json"]
    assert (publisher.error is not None) == bool(error)
