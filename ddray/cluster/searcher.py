"""Searchers that number their trials: a trial is the same unit in every session, so a search can resume.

`NumberedSearch` hands out unfinished trials first, then new numbers; the settings of a new number come from
OptunaSearch (TPE) or, for `random` and `grid`, from a pure function of the number (docs/ray.md, 20).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from ddray.runs.ledger import Row
from ddray.seeding import derive_seed
from ddray.tuning.space import Space
from ddray.tuning.study import STUDY, add_row, score_of, write_study
from ddray.tuning.trial import METRIC, trial_result


class TpeSource:
    """Settings from OptunaSearch's TPE, whose study is rebuilt from the ledger and lives in a journal file.

    Trials that ASHA stopped enter as PRUNED with the values of their rungs; Tune's own OptunaSearch would
    tell them COMPLETE at their last rung's value, so that low-fidelity scores would pass for final ones
    (docs/ray.md, 4).

    Args:
        space: the ranges.
        rows: finished trials so far.
        seed: the search's seed.
        epoch: the run epoch.
        num_samples: trials in all, for the number of random ones at the start.
        path: the journal file; an old one is replaced.
    """

    def __init__(
        self, space: Space, rows: Sequence[Row], *, seed: int, epoch: int, num_samples: int, path: Path
    ) -> None:
        self._space = space
        # With the same seed a rebuilt sampler would propose its first points again (docs/ray.md, 20), and two
        # sessions of a run can begin with equally many rows: the run epoch tells them apart.
        sampler = optuna.samplers.TPESampler(
            seed=derive_seed(seed, "tpe", epoch) % 2**32,
            n_startup_trials=max(3, min(10, num_samples // 3)),
        )
        self._storage = write_study(path, space, rows)
        distributions = {name: value_range.distribution() for name, value_range in space.items()}
        self._search = OptunaSearch(
            space=distributions,
            metric=METRIC,
            mode="max",
            sampler=sampler,
            study_name=STUDY,
            storage=self._storage,
        )

    def suggest(self, trial_id: str, trial_number: int) -> dict[str, Any]:
        """Return the settings of a new trial."""
        suggestion = self._search.suggest(trial_id)
        return {name: self._space[name].from_optuna(value) for name, value in suggestion.items()}  # type: ignore[union-attr]

    def complete(self, trial_id: str, row: Row | None) -> None:
        """Tell the study how a suggested trial ended: its value, its rungs if stopped, or a failure."""
        if row is None or row.status == "failed":
            self._search.on_trial_complete(trial_id, None, error=True)
            return
        optuna_trial = self._search._ot_trials[trial_id]
        for budget, value in row.result["rungs"].items():
            optuna_trial.report(value, int(budget))
        result = None if row.result["stopped_early"] else {METRIC: score_of(row.result)}
        self._search.on_trial_complete(trial_id, result)

    def add(self, row: Row) -> None:
        """Tell the study of a trial that it did not suggest."""
        add_row(optuna.load_study(study_name=STUDY, storage=self._storage), self._space, row)


class FunctionSource:
    """Settings as a pure function of the trial's number (`random`, `grid`)."""

    def __init__(self, function: Callable[[int], Mapping[str, Any]]) -> None:
        self._function = function

    def suggest(self, trial_id: str, trial_number: int) -> dict[str, Any]:
        """Return the settings of a new trial."""
        return dict(self._function(trial_number))

    def complete(self, trial_id: str, row: Row | None) -> None:
        """Nothing to learn."""

    def add(self, row: Row) -> None:
        """Nothing to learn."""


class NumberedSearch(Searcher):
    """Hands out numbered trials: queued ones first (the paper's point, unfinished ones), then new numbers.

    Args:
        source: settings of new numbers.
        queued: (number, settings) to run first.
        fresh: new numbers, in order.
        row_of: the published row of a (number, settings), if any.
        deadline: monotonic time after which no trial starts; None for none.
    """

    def __init__(
        self,
        source: TpeSource | FunctionSource,
        *,
        queued: Sequence[tuple[int, dict[str, Any]]],
        fresh: Sequence[int],
        row_of: Callable[[int, Mapping[str, Any]], Row | None],
        deadline: float | None,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._source = source
        self._queued = list(queued)
        self._fresh = list(fresh)
        self._row_of = row_of
        self._deadline = deadline
        self._begun = False
        self._running: dict[str, tuple[int, dict[str, Any], bool]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next trial's `{"number", "params"}`, or FINISHED."""
        if self._begun and self._deadline is not None and time.monotonic() > self._deadline:
            return str(Searcher.FINISHED)
        self._begun = True  # the paper's point is run within any time budget
        if self._queued:
            trial_number, params = self._queued.pop(0)
            self._running[trial_id] = (trial_number, params, False)
        elif self._fresh:
            trial_number = self._fresh.pop(0)
            params = self._source.suggest(trial_id, trial_number)
            self._running[trial_id] = (trial_number, params, True)
        else:
            return str(Searcher.FINISHED)
        return {"number": trial_number, "params": params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the study gets the rungs from the row, once."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the source how the trial ended: by its row, or by the result it was stopped at."""
        trial_number, params, suggested = self._running.pop(trial_id, (None, {}, False))
        if trial_number is None:  # already reported: Tune calls again after an error in a callback
            return
        row = self._row_of(trial_number, params)
        if row is None and result is not None and not error:
            # Stopped: Tune tells searchers before callbacks, which publish this very row.
            row = stopped_row(trial_number, params, result)
        if suggested:
            self._source.complete(trial_id, row)
        elif row is not None:
            self._source.add(row)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a resumed search is rebuilt from the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


def stopped_row(trial_number: int, params: Mapping[str, Any], result: Mapping[str, Any]) -> Row:
    """Return the row (without a key yet) of a trial that the scheduler stopped after `result`."""
    rungs = {int(budget): float(value) for budget, value in result.get("rungs", {}).items()}
    # Tune hands searchers flattened results.
    rungs |= {int(name.split("/")[1]): float(v) for name, v in result.items() if name.startswith("rungs/")}
    rungs.setdefault(int(result["budget"]), float(result[METRIC]))
    objective = str(result["objective"])
    row_result = trial_result(trial_number, params, rungs, stopped_early=True, objective=objective)
    return Row(key="", kind="trial", spec={}, status="done", result=row_result, wall_s=0.0)
