"""Searchers that number their trials: a trial is the same unit in every session, so a search can resume.

`NumberedSearch` hands out unfinished trials first, then new numbers; the settings of a new number come from
OptunaSearch (TPE) or, for `random` and `grid`, from a pure function of the number (docs/ray.md, 20).
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from ddray.runs.ledger import Row, Unit
from ddray.seeding import derive_seed
from ddray.tuning.search import Search
from ddray.tuning.space import grid, sample, suggest
from ddray.tuning.study import add_row, await_number, score_of, write_study
from ddray.tuning.trial import METRIC, trial_result


class TpeSource:
    """Settings from OptunaSearch's TPE, whose study is rebuilt from the ledger and lives in a journal file.

    Trials that ASHA stopped enter as PRUNED with the values of their rungs; Tune's own OptunaSearch would
    tell them COMPLETE at their last rung's value, so that low-fidelity scores would pass for final ones
    (docs/ray.md, 4).
    """

    def __init__(self, search: Search, rows: Sequence[Row]) -> None:
        self._space = search.space
        # With the same seed a rebuilt sampler would propose its first points again (docs/ray.md, 20), and two
        # sessions of a run can begin with equally many rows: the run epoch tells them apart.
        sampler = optuna.samplers.TPESampler(
            seed=derive_seed(search.job.seed, "tpe", search.job.epoch) % 2**32,
            n_startup_trials=max(3, min(10, search.num_samples // 3)),
        )
        self._name = search.name
        self._storage = write_study(search.run.folder, self._name, self._space, rows)
        self._search = OptunaSearch(
            space=partial(suggest, self._space),  # define-by-run: what is drawn depends on what was
            metric=METRIC,
            mode="max",
            sampler=sampler,
            study_name=self._name,
            storage=self._storage,
        )

    def suggest(self, trial_id: str, trial_number: int) -> dict[str, Any]:
        """Return the settings of a new trial, which has its number in the study too."""
        await_number(self._study(), trial_number)
        return dict(self._search.suggest(trial_id) or {})

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
        add_row(self._study(), self._space, row)

    def _study(self) -> optuna.Study:
        return optuna.load_study(study_name=self._name, storage=self._storage)


class NumberedSearch(Searcher):
    """Hands out numbered trials: queued ones first, then new numbers.

    Queued are the paper's point, unfinished trials and the user's start points.

    The search's time budget begins now; `rows` are its finished trials.
    """

    def __init__(self, search: Search, rows: Sequence[Row]) -> None:
        super().__init__(metric=METRIC, mode="max")
        options, missing = search.options, search.missing()
        self._search = search
        self._queued = search.unfinished()
        if 0 in missing and 0 not in dict(self._queued):
            self._queued.insert(0, (0, search.paper))
        left = set(missing) - dict(self._queued).keys()
        self._queued += ((number, params) for number, params in search.start_points.items() if number in left)
        self._fresh = [trial_number for trial_number in missing if trial_number not in dict(self._queued)]
        self._points = grid(search.space, search.paper) if options.strategy == "grid" else None
        uses_tpe = options.strategy in ("asha-tpe", "tpe") and bool(search.space)
        self._tpe = TpeSource(search, rows) if uses_tpe else None
        self._deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
        self._begun = False
        self._running: dict[str, tuple[int, dict[str, Any], bool]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next trial's `{"number", "params"}`, or FINISHED."""
        late = self._begun and self._deadline is not None and time.monotonic() > self._deadline
        if late or not (self._queued or self._fresh):
            return str(Searcher.FINISHED)
        self._begun = True  # the paper's point is run within any time budget
        is_new = not self._queued
        if is_new:
            trial_number = self._fresh.pop(0)
            params = self._settings(trial_id, trial_number)
        else:
            trial_number, params = self._queued.pop(0)
        self._running[trial_id] = (trial_number, params, is_new)
        return {"number": trial_number, "params": params}

    def _settings(self, trial_id: str, trial_number: int) -> dict[str, Any]:
        """Return the settings of a new trial."""
        if self._tpe is not None:
            return self._tpe.suggest(trial_id, trial_number)
        if self._points is not None:
            return dict(self._points[trial_number])
        return sample(self._search.space, self._search.job.seed, trial_number)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the study gets the rungs from the row, once."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell TPE how the trial ended: by its row, or by the result it was stopped at."""
        trial_number, params, is_new = self._running.pop(trial_id, (None, {}, False))
        if self._tpe is None or trial_number is None:  # Tune calls again after an error in a callback
            return
        row = self._search.row_of(trial_number, params)
        if row is None and result is not None and not error:
            # Stopped: Tune tells searchers before callbacks, which publish this very row.
            row = stopped_row(self._search.unit(trial_number, params), self._search.job.objective, result)
        if is_new:
            self._tpe.complete(trial_id, row)
        elif row is not None:
            self._tpe.add(row)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a resumed search is rebuilt from the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


def stopped_row(unit: Unit, objective: str, result: Mapping[str, Any]) -> Row:
    """Return the row of a trial that the scheduler stopped after `result`."""
    rungs = {int(budget): float(value) for budget, value in result.get("rungs", {}).items()}
    # Tune hands searchers flattened results.
    rungs |= {int(name.split("/")[1]): float(v) for name, v in result.items() if name.startswith("rungs/")}
    rungs.setdefault(int(result["budget"]), float(result[METRIC]))
    wall_s = float(result.get("time_total_s", 0.0))
    return Row.done(unit, trial_result(unit, rungs, objective, stopped_early=True), wall_s)
