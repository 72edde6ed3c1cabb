from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from ddray.runs.ledger import Row
from ddray.tuning.report import search_view
from ddray.tuning.space import Range, read_space, sample
from ddray.tuning.study import STUDY, study_of, write_study

SPACE = {
    "lr": Range("loguniform", 0.01, 10.0),
    "num": Range("randint", 1, 5),
    "layers": Range("choice", choices=([1], [1, 2])),
}


def row(
    number: int, *, status: Any = "done", val: float | None = 0.5, stopped: bool = False, **overrides: Any
) -> Row:
    params = {"lr": 0.1, "num": 2, "layers": [1, 2], **overrides}
    result: dict[str, Any] = {"number": number}
    if status == "done":
        result |= {"val_accuracy": val, "stopped_early": stopped, "rungs": {"5": 0.2, "20": val}}
    return Row(
        key=f"{number}", kind="trial", spec={"params": params}, status=status, result=result, wall_s=1.0
    )


def test_trials_keep_value_state_settings_and_rungs_in_order_of_number() -> None:
    study = study_of(SPACE, [row(2, val=0.9), row(0), row(1, status="failed"), row(3, val=0.3, stopped=True)])

    assert [trial.user_attrs["number"] for trial in study.trials] == [0, 1, 2, 3]
    assert [trial.state for trial in study.trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.PRUNED,
    ]
    assert study.best_trial.user_attrs["number"] == 2
    assert study.best_value == 0.9
    first = study.trials[0]
    assert first.intermediate_values == {5: 0.2, 20: 0.5}
    back = {name: SPACE[name].from_optuna(value) for name, value in first.params.items()}
    assert back == {"lr": 0.1, "num": 2, "layers": [1, 2]}


def test_trials_with_and_without_a_conditional_setting_are_one_study() -> None:
    space = read_space(
        {
            "evaluate.lr": {"loguniform": [0.01, 1.0]},
            "init": {"choice": ["random", "noise"]},
            "momentum": {"uniform": [0.0, 0.9], "step": 0.1, "when": {"init": "noise"}},
        }
    )
    rows = []
    for number in range(12):
        params = sample(space, 0, number)
        params = params if number else {**params, "init": "random", "momentum": 0.5}  # not drawn beside it
        one = row(number, val=number / 12)
        rows.append(Row(**{**one.dump(), "spec": {"number": number, "params": params}}))

    study = study_of(space, rows)

    assert [trial.user_attrs["number"] for trial in study.trials] == list(range(1, 12))
    assert {len(trial.params) for trial in study.trials} == {2, 3}
    view = search_view(space, rows)
    assert [figure["reason"] for figure in view["figures"]] == ["", "", ""]
    assert all("evaluate.lr" in figure["html"] for figure in view["figures"][1:])
    missing = [trial["values"] for trial in view["trials"] if trial["values"][1] == "random"]
    assert any(values[2] is None for values in missing)


@pytest.mark.parametrize("params", [{"lr": 99.0}, {"num": 0}, {"layers": [3]}, {"more": 1}])
def test_a_trial_outside_the_ranges_is_left_out_and_said(
    params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        study = study_of(SPACE, [row(0, **params), row(1)])

    assert [trial.user_attrs["number"] for trial in study.trials] == [1]
    assert "trial 0 lies outside" in caplog.text


def test_the_journal_is_written_anew_and_optuna_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    write_study(path, SPACE, [row(0), row(1), row(2)])
    write_study(path, SPACE, [row(0), row(1, val=0.8)])

    backend = optuna.storages.journal.JournalFileBackend(str(path))
    study = optuna.load_study(study_name=STUDY, storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 2
    assert study.best_value == 0.8
    assert [trial.params for trial in study.trials] == [
        t.params for t in study_of(SPACE, [row(0), row(1)]).trials
    ]
