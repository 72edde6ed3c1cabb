from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from ddray.runs.ledger import Row
from ddray.tuning.report import search_view
from ddray.tuning.space import Range, read_space, sample
from ddray.tuning.study import add_row, await_number, hold_numbers, study_of, write_study

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


def read_journal(folder: Path, name: str) -> Any:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


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

    assert [trial.number for trial in study.trials] == list(range(12))
    assert study.trials[0].state == TrialState.FAIL
    assert {len(trial.params) for trial in study.trials[1:]} == {2, 3}
    view = search_view(space, rows)
    assert [figure["reason"] for figure in view["figures"]] == ["", ""]
    assert all("evaluate.lr" in figure["html"] for figure in view["figures"])
    missing = [trial["values"] for trial in view["trials"] if trial["values"][1] == "random"]
    assert any(values[2] is None for values in missing)


@pytest.mark.parametrize("params", [{"lr": 99.0}, {"num": 0}, {"layers": [3]}, {"more": 1}])
def test_a_trial_outside_the_ranges_holds_its_number_alone_and_is_said(
    params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        study = study_of(SPACE, [row(0, **params), row(1)])

    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert [(trial.number, trial.user_attrs["number"]) for trial in study.trials] == [(0, 0), (1, 1)]
    assert study.trials[0].user_attrs["outside the ranges"].items() >= params.items()
    assert not study.trials[0].params
    assert "trial 0 lies outside" in caplog.text


def test_the_journal_is_written_anew_and_optuna_reads_it(tmp_path: Path) -> None:
    write_study(tmp_path, "dm-digits", SPACE, [row(0), row(1), row(2)])
    write_study(tmp_path, "dm-digits", SPACE, [row(0), row(1, val=0.8)])

    study = read_journal(tmp_path, "dm-digits")
    assert len(study.trials) == 2
    assert study.best_value == 0.8
    assert [trial.params for trial in study.trials] == [
        t.params for t in study_of(SPACE, [row(0), row(1)]).trials
    ]


def test_a_trial_has_its_number_whatever_ends_first(tmp_path: Path) -> None:
    """The preset is running while the sampler proposes others; a resumed search lacks a row."""
    storage = write_study(tmp_path, "dm-digits", SPACE, [])
    study = optuna.load_study(study_name="dm-digits", storage=storage)
    hold_numbers(study, 1)
    suggested = study.ask()
    study.tell(suggested, 0.7)
    add_row(study, SPACE, row(0, val=0.4, stopped=True))
    add_row(study, SPACE, row(3, val=0.9))

    trials = read_journal(tmp_path, "dm-digits").trials
    assert suggested.number == 1
    assert [trial.state.name for trial in trials] == ["PRUNED", "COMPLETE", "RUNNING", "COMPLETE"]
    assert trials[0].params == study_of(SPACE, [row(0)]).trials[0].params
    assert trials[0].intermediate_values == {5: 0.2, 20: 0.4}
    assert trials[0].user_attrs == {"number": 0}
    assert trials[3].value == 0.9


def test_a_number_that_was_held_is_the_next_trials(tmp_path: Path) -> None:
    """A resumed search: trial 2's worker was killed before its start event, 3 has a row."""
    storage = write_study(tmp_path, "dm-digits", SPACE, [row(0), row(1), row(3)])
    study = optuna.load_study(study_name="dm-digits", storage=storage)

    for number in (2, 4):
        await_number(study, number)
        trial = study.ask()
        assert trial.number == number
        trial.suggest_float("lr", 0.01, 10.0, log=True)
        study.tell(trial, 0.1 * number)

    trials = read_journal(tmp_path, "dm-digits").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert trials[2].value == 0.2


def test_the_study_has_real_times_and_a_named_axis(tmp_path: Path) -> None:
    events = [
        {"event": "start", "key": "0", "epoch": 1, "time": 1000.0},
        {"event": "finish", "key": "0", "epoch": 1, "time": 1060.5},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    one = row(0)
    one = one.model_copy(update={"wall_s": 60.0, "result": {**one.result, "objective": "val_accuracy"}})

    write_study(tmp_path, "dm-digits", SPACE, [one])

    study = read_journal(tmp_path, "dm-digits")
    assert study.metric_names == ["val accuracy (fraction)"]
    (trial,) = study.trials
    assert trial.datetime_complete == datetime.fromtimestamp(1060.5)
    assert trial.duration == timedelta(seconds=60)
