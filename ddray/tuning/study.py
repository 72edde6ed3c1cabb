"""A search's trials as an Optuna study: for its sampler, its plots, and optuna-dashboard."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from ddray.runs.ledger import Row
from ddray.tuning.space import Space

log = logging.getLogger(__name__)
STUDY: Final = "ddray"


def write_study(path: Path, space: Space, rows: Sequence[Row]) -> Any:
    """Write a fresh Optuna journal (optuna-dashboard opens it) that holds the rows; return its storage.

    Args:
        path: the journal; an old one is removed.
        space: the ranges.
        rows: finished trials.
    """
    for old in path.parent.glob(path.name + "*"):
        old.unlink()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(study_name=STUDY, storage=storage, direction="maximize")
    for row in sorted(rows, key=lambda row: row.result["number"]):
        add_row(study, space, row)
    return storage


def add_row(study: Any, space: Space, row: Row) -> None:
    """Add a finished trial to a study; one outside the ranges (the paper's point may be) is left out.

    Optuna takes no value outside a distribution. For the sampler to see it, widen the space file.
    """
    params = row.spec.get("params") or row.result.get("params") or {}
    if set(params) != set(space) or not all(space[name].contains(value) for name, value in params.items()):
        log.info(
            "trial %s lies outside the space file's ranges: the sampler does not see it", row.result["number"]
        )
        return
    failed = row.status == "failed"
    stopped = not failed and row.result["stopped_early"]
    study.add_trial(
        create_trial(
            state=TrialState.FAIL if failed else TrialState.PRUNED if stopped else TrialState.COMPLETE,
            value=None if failed else score_of(row.result),
            params={name: space[name].to_optuna(value) for name, value in params.items()},
            distributions={name: value_range.distribution() for name, value_range in space.items()},
            intermediate_values={int(b): v for b, v in row.result.get("rungs", {}).items()},
            user_attrs={"number": row.result["number"]},
        )
    )


def score_of(result: Mapping[str, Any]) -> float:
    """Return the search's objective from a trial row's result."""
    return float(result[result.get("objective", "val_accuracy")])


def study_of(space: Space, rows: Sequence[Row]) -> Any:
    """Return the rows as a study in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=STUDY, direction="maximize")
    for row in sorted(rows, key=lambda row: row.result["number"]):
        add_row(study, space, row)
    return study
