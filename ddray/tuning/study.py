"""A search's trials as an Optuna study: for its sampler, its plots, and optuna-dashboard.

A trial has its number in the search, and its own times. One outside the ranges (the preset may be), which
Optuna takes no values of, and one that has no row yet hold their numbers: as failed, and as running.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from ddray.runs.ledger import Ledger, Row
from ddray.tuning.space import Space

log = logging.getLogger(__name__)
JOURNAL: Final = "optuna.journal"
"""File of a search, which optuna-dashboard opens."""
Times = Mapping[str, float]
"""When trials ended, in seconds since 1970, by their keys."""


def write_study(folder: Path, name: str, space: Space, rows: Sequence[Row]) -> Any:
    """Replace a search's Optuna journal by one of the rows; return its storage."""
    for old in folder.glob(JOURNAL + "*"):
        old.unlink()
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study_of(space, rows, storage, name, end_times(Ledger(folder)))
    return storage


def end_times(ledger: Ledger) -> dict[str, float]:
    """Return when units ended, in seconds since 1970, by their keys."""
    events = (event for event in ledger.events() if event["event"] in ("finish", "fail"))
    return {str(event["key"]): float(event["time"]) for event in events if "time" in event}


def hold_numbers(study: Any, stop: int) -> None:
    """Let the next trial of a study be number `stop`: those before it that have no row yet are running."""
    while len(study.get_trials(deepcopy=False)) < stop:
        study.add_trial(create_trial(state=TrialState.RUNNING))


def await_number(study: Any, number: int) -> None:
    """Let the trial that a study is asked for next be `number`, which may be one that was held."""
    hold_numbers(study, number)
    trials = study.get_trials(deepcopy=False)
    if number < len(trials) and trials[number].state == TrialState.RUNNING:
        study._storage.set_trial_state_values(trials[number]._trial_id, TrialState.WAITING)


def add_row(study: Any, space: Space, row: Row, ended: float | None = None) -> None:
    """Add a finished trial to a study under its number; `ended` is when (default: now)."""
    number = int(row.result["number"])
    hold_numbers(study, number)
    trial = _frozen(space, row, datetime.now() if ended is None else datetime.fromtimestamp(ended))
    trials = study.get_trials(deepcopy=False)
    if number == len(trials):
        study.add_trial(trial)
    elif trials[number].state == TrialState.RUNNING:
        _fill(study._storage, trials[number]._trial_id, trial)


def _frozen(space: Space, row: Row, ended: datetime) -> FrozenTrial:
    """Return a row as Optuna's trial."""
    params = row.spec.get("params") or row.result.get("params") or {}
    names = {name for name, value_range in space.items() if value_range.is_drawn(params)}
    attributes = {"number": row.result["number"]}
    if set(params) != names or not all(space[name].contains(value) for name, value in params.items()):
        text = "trial %s lies outside the space file's ranges: the sampler does not see it"
        log.info(text, row.result["number"])
        trial = create_trial(state=TrialState.FAIL, user_attrs={**attributes, "outside the ranges": params})
    else:
        failed = row.status == "failed"
        stopped = not failed and row.result["stopped_early"]
        trial = create_trial(
            state=TrialState.FAIL if failed else TrialState.PRUNED if stopped else TrialState.COMPLETE,
            value=None if failed else score_of(row.result),
            params={name: space[name].to_optuna(value) for name, value in params.items()},
            distributions={name: space[name].distribution() for name in params},
            intermediate_values={int(b): v for b, v in row.result.get("rungs", {}).items()},
            user_attrs=attributes,
        )
    trial.datetime_start, trial.datetime_complete = ended - timedelta(seconds=row.wall_s), ended
    return trial


def _fill(storage: Any, trial_id: int, trial: FrozenTrial) -> None:
    """Turn a running trial of a storage into a finished one."""
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        storage.set_trial_param(trial_id, name, distribution.to_internal_repr(value), distribution)
    for step, value in trial.intermediate_values.items():
        storage.set_trial_intermediate_value(trial_id, step, value)
    for name, value in trial.user_attrs.items():
        storage.set_trial_user_attr(trial_id, name, value)
    storage.set_trial_state_values(trial_id, trial.state, trial.values)


def score_of(result: Mapping[str, Any]) -> float:
    """Return the search's objective from a trial row's result."""
    return float(result[result.get("objective", "val_accuracy")])


def status_of(row: Row) -> str:
    """Return how a trial ended: `done`, `failed` or `stopped early`."""
    return "stopped early" if row.result.get("stopped_early") else row.status


def trial_rows(ledger: Ledger) -> list[Row]:
    """Return the rows of a search's trials, by number."""
    return sorted(ledger.rows("trial"), key=lambda row: int(row.spec["number"]))


def study_of(
    space: Space,
    rows: Sequence[Row],
    storage: Any = None,
    name: str = "search",
    ended: Times | None = None,
) -> Any:
    """Return the rows as a study, in memory unless a storage is named; its axis is named by the objective."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    objectives = [str(row.result["objective"]) for row in rows if "objective" in row.result]
    axis = next(iter(objectives), "val_accuracy").replace("_", " ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([f"{axis} (fraction)" if "accuracy" in axis else axis])
    for row in sorted(rows, key=lambda row: row.result["number"]):
        add_row(study, space, row, (ended or {}).get(row.key))
    return study
