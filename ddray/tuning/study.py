"""A search's trials as an Optuna study: for its sampler, its plots, and optuna-dashboard."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from ddray.runs.ledger import Ledger, Row
from ddray.tuning.space import Space

log = logging.getLogger(__name__)
STUDY: Final = "ddray"


def write_study(path: Path, space: Space, rows: Sequence[Row]) -> Any:
    """Replace an Optuna journal (optuna-dashboard opens it) by one of the rows; return its storage."""
    for old in path.parent.glob(path.name + "*"):
        old.unlink()
    storage = JournalStorage(JournalFileBackend(str(path)))
    study_of(space, rows, storage)
    return storage


def add_row(study: Any, space: Space, row: Row) -> None:
    """Add a finished trial to a study; one outside the ranges (the paper's point may be) is left out.

    Optuna takes no value outside a distribution. For the sampler to see it, widen the space file.
    """
    params = row.spec.get("params") or row.result.get("params") or {}
    names = {name for name, value_range in space.items() if value_range.is_drawn(params)}
    if set(params) != names or not all(space[name].contains(value) for name, value in params.items()):
        text = "trial %s lies outside the space file's ranges: the sampler does not see it"
        log.info(text, row.result["number"])
        return
    failed = row.status == "failed"
    stopped = not failed and row.result["stopped_early"]
    study.add_trial(
        create_trial(
            state=TrialState.FAIL if failed else TrialState.PRUNED if stopped else TrialState.COMPLETE,
            value=None if failed else score_of(row.result),
            params={name: space[name].to_optuna(value) for name, value in params.items()},
            distributions={name: space[name].distribution() for name in params},
            intermediate_values={int(b): v for b, v in row.result.get("rungs", {}).items()},
            user_attrs={"number": row.result["number"]},
        )
    )


def score_of(result: Mapping[str, Any]) -> float:
    """Return the search's objective from a trial row's result."""
    return float(result[result.get("objective", "val_accuracy")])


def status_of(row: Row) -> str:
    """Return how a trial ended: `done`, `failed` or `stopped early`."""
    return "stopped early" if row.result.get("stopped_early") else row.status


def trial_rows(ledger: Ledger) -> list[Row]:
    """Return the rows of a search's trials, by number."""
    return sorted(ledger.rows("trial"), key=lambda row: int(row.spec["number"]))


def study_of(space: Space, rows: Sequence[Row], storage: Any = None) -> Any:
    """Return the rows as a study, in memory unless a storage is named."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize")
    for row in sorted(rows, key=lambda row: row.result["number"]):
        add_row(study, space, row)
    return study
