"""`ddray tune`: Ray Tune schedules and searches, the ledger is the record of truth (docs/ray.md, 1, 19, 20).

A search distils from nine tenths of train and scores on the held-out tenth. Test is opened once, after
the search has ended, for the winner and the paper's point on fresh seeds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ddray.cluster.finals import run_finals
from ddray.cluster.nas import RayExecutor
from ddray.cluster.payload import Payload, pack
from ddray.cluster.pretrain import shared_pool
from ddray.cluster.runtime import check_capacity, ray_runtime, sigterm_as_sigint
from ddray.cluster.search import unfinished
from ddray.cluster.trial import ETA, Job, split_name, trial_unit
from ddray.config import Config
from ddray.data import PixelSpace, Split, carve_val, search_rows
from ddray.data.pixels import pixel_space
from ddray.errors import DdrayError, InputError, InterruptedRunError, unknown
from ddray.jobs.context import check_plan, check_size, declared_specs, make_context, make_distiller
from ddray.jobs.plan import Plan, budget_method
from ddray.pool.spec import PoolSpec
from ddray.ranking.objective import SpearmanObjective, spearman_objective
from ddray.ranking.options import NasOptions
from ddray.ranking.spaces import get_space
from ddray.report.tune_page import write_report
from ddray.runs.folder import Run, open_run
from ddray.runs.ledger import Row
from ddray.runs.results import write_results
from ddray.space import Range, grid, read_space
from ddray.study import score_of
from ddray.system.files import write_text
from ddray.system.shipped import shipped

log = logging.getLogger(__name__)

Strategy = Literal["asha-tpe", "tpe", "random", "grid", "pb2"]
Objective = Literal["val-accuracy", "nas-spearman"]


class TuneOptions(Config):
    """How a search is run (nothing here changes what a trial is)."""

    num_samples: int = Field(default=16, ge=1)
    strategy: Strategy = "asha-tpe"
    cpus_per_trial: float = Field(default=1.0, gt=0)
    gpus_per_trial: float = Field(default=0.0, ge=0)
    max_concurrent: int | None = Field(default=None, ge=1)
    time_budget: float | None = Field(default=None, gt=0)
    address: str | None = None
    objective: Objective = "val-accuracy"
    """What is maximised: accuracy on val, or the rank correlation of architectures scored on val."""
    nas_sample: int = Field(default=16, ge=3)
    """Architectures of the 720 ConvNets that `nas-spearman` ranks."""
    nas_epochs: int = Field(default=50, ge=1)
    """Epochs of each, on a trial's set and on the whole train part."""
    final_sets: int = Field(default=3, ge=1)
    """Fresh seeds on which the winner and the paper's point are distilled again for the test score."""


def tune(
    plan: Plan, options: TuneOptions, *, space_file: Path | None, run_dir: Path | None, resume: bool
) -> dict[str, Any]:
    """Run a search, or continue one.

    Args:
        plan: the method's resolved settings; the paper's point of the search.
        options: strategy, size, resources.
        space_file: ranges; None takes the method's shipped ones.
        run_dir: the run's folder; None makes a numbered one.
        resume: continue the folder's run.

    Returns:
        The command's JSON (docs/architecture.md, Commands).

    Raises:
        InputError: the space, the plan or an option is bad, or the test set can't be read at the end.
        InterruptedRunError: SIGINT or SIGTERM; finished trials are kept.
        DdrayError: no trial finished.
    """
    begin = time.perf_counter()
    space = _space(plan, space_file)
    make_distiller(plan)
    check_plan(plan)
    paper = {name: plan.config.method.dump()[name] for name in space}
    train, val = carve_val(plan.dataset.train(), seed=plan.seed)
    check_size(plan, train)
    _check_objective(plan, options)
    config = {
        **plan.describe(),
        "strategy": options.strategy,
        "num_samples": _num_samples(options, space, paper, plan.config.steps),
        "space": {name: {value_range.kind: value_range.ends()} for name, value_range in space.items()},
        "final_sets": options.final_sets,
        "device": "cuda" if options.gpus_per_trial > 0 else "cpu",
    }
    if options.objective != "val-accuracy":
        config |= {name: getattr(options, name) for name in ("objective", "nas_sample", "nas_epochs")}
    run = open_run(run_dir, config, command="tune", resume=resume)
    job = Job(
        run_dir=str(run.folder),
        epoch=run.epoch,
        method=plan.method,
        ipc=plan.ipc,
        seed=plan.seed,
        config=plan.config.dump(),
        budgets=_budgets(options.strategy, plan.config.steps),
        cpus=options.cpus_per_trial,
        gpus=options.gpus_per_trial,
        nas=_nas_objective(plan, options, train, val, run),
        budget=plan.budget,
    )
    search = Search(plan, options, space, paper, job, run, config["num_samples"])
    if search.missing():
        with sigterm_as_sigint(), ray_runtime(options.address):
            whitening = pixel_space(plan.config.pixel_space, plan.dataset, train)
            train_rows = search_rows(plan.dataset.train(), seed=plan.seed)
            payload = pack(plan.dataset, train, split_name(plan.seed), val, whitening, train_rows)
            search.run(payload, _specs(plan, job, train, whitening))
    rows = search.rows()
    write_results(run.folder / "results.csv", run.ledger.rows())
    best, paper_row = _best(rows), _paper(rows)
    search.close()
    with sigterm_as_sigint():
        scores = run_finals(plan, job, run, {"best": best, "paper": paper_row}, options)
    write_results(run.folder / "results.csv", run.ledger.rows())
    result = _result(run, rows, best, paper_row, scores, begin)
    write_report(run.folder, result, rows, space)
    return result


def _specs(plan: Plan, job: Job, train: Split, space: PixelSpace) -> list[PoolSpec]:
    """Return the networks that the plan's method declares; trials with other pool settings add theirs."""
    device = torch.device("cuda" if job.gpus > 0 else "cpu")
    ctx = make_context(plan, train, split_name=split_name(plan.seed), device=device, space=space)
    return declared_specs(plan, ctx)


def _check_objective(plan: Plan, options: TuneOptions) -> None:
    """Refuse an impossible search for rank correlation before its folder is made.

    Raises:
        InputError: the method's sets have no labels, or the sample exceeds the number of architectures.
    """
    if options.objective == "val-accuracy":
        return
    if budget_method(plan.method) is not None:
        raise InputError(
            f"--objective nas-spearman needs a method whose sets have labels to train architectures on, got "
            f"{plan.method}, whose sets have targets; use --objective val-accuracy"
        )
    num_architectures = len(get_space(NasOptions().space))
    if options.nas_sample > num_architectures:
        raise InputError(f"--nas-sample must be in 3..{num_architectures}, got {options.nas_sample}")


def _nas_objective(
    plan: Plan, options: TuneOptions, train: Split, val: Split, run: Run
) -> SpearmanObjective | None:
    """Train the sample of architectures that trials are scored by; None where accuracy is maximised."""
    if options.objective == "val-accuracy":
        return None
    nas = NasOptions.parse(
        {
            "sample": options.nas_sample,
            "epochs": options.nas_epochs,
            "seed": plan.seed,
            "cpus_per_worker": options.cpus_per_trial,
            "gpus_per_worker": options.gpus_per_trial,
            "num_workers": options.max_concurrent,
            "address": options.address,
        }
    )
    return spearman_objective(nas, plan.dataset, train, val, RayExecutor(nas), run.folder / "architectures")


def _space(plan: Plan, space_file: Path | None) -> dict[str, Range]:
    """Return the ranges, each a field of the method.

    Raises:
        InputError: the file is missing or names a field that the method does not have.
    """
    path = space_file or shipped("search_spaces", "hpo", f"{plan.method}.yaml")
    if not path.is_file():
        raise InputError(f"a search needs a space file, got {path}; write one and pass it with --space")
    space = read_space(path)
    fields = type(plan.config.method).model_fields
    for name in space:
        if name not in fields:
            raise unknown(f"{path}: a range's name", name, fields)
    return {name: _checked(plan, name, value_range, path) for name, value_range in space.items()}


def _checked(plan: Plan, name: str, value_range: Range, path: Path) -> Range:
    """Return a range whose values the method accepts, with choices in the field's type (1 as 1.0).

    Raises:
        InputError: a value breaks the field's rule, or does not fit the network.
    """
    config, method = plan.config, plan.config.method
    parsed = []
    for value in value_range.probes():
        changed = type(method).parse({**method.dump(), name: value}, source=str(path))
        check_plan(replace(plan, config=config.model_copy(update={"method": changed})))
        parsed.append(changed.dump()[name])
    return replace(value_range, choices=tuple(parsed)) if value_range.kind == "choice" else value_range


def _num_samples(
    options: TuneOptions, space: Mapping[str, Range], paper: Mapping[str, Any], steps: int
) -> int:
    """Return the number of trials: the option's, or the whole grid.

    Raises:
        InputError: there is nothing to vary, or PB2 gets ranges it can't use.
    """
    if options.strategy == "grid":
        return len(grid(space, paper))
    if not space and options.num_samples > 1:
        raise InputError(
            "a space file without a range makes every trial the same: add --num-samples 1, "
            f"got {options.num_samples}"
        )
    if options.strategy == "pb2":
        from ddray.cluster.pb2 import check_space, segment_ends

        check_space(space, paper, options.num_samples)
        segment_ends(steps)
        if options.time_budget is not None:
            raise InputError("--time-budget can't be used with strategy pb2, whose trials end together")
    return options.num_samples


def _budgets(strategy: Strategy, steps: int) -> tuple[int, ...]:
    """Return the rungs of a trial as parts of the last: a ninth, a third and the whole for ASHA."""
    if strategy == "asha-tpe" and steps >= ETA**2:
        return (1, ETA, ETA**2)
    return (1,)


class Search:
    """One search: what is done, what is missing, and how to run the rest."""

    def __init__(
        self,
        plan: Plan,
        options: TuneOptions,
        space: Mapping[str, Range],
        paper: dict[str, Any],
        job: Job,
        run: Run,
        num_samples: int,
    ) -> None:
        self.plan, self.options, self.space, self.paper = plan, options, space, paper
        self.job, self.ledger, self.folder, self.num_samples = job, run.ledger, run.folder, num_samples
        self._closed = run.folder / "search.closed"

    def rows(self) -> list[Row]:
        """Return the trials' rows, by number."""
        return sorted(self.ledger.rows("trial"), key=lambda row: int(row.spec["number"]))

    def missing(self) -> list[int]:
        """Return the numbers without a row; of a closed search (see `close`) only those that it had."""
        done = {int(row.spec["number"]) for row in self.rows()}
        trial_numbers: Sequence[int] = range(self.num_samples)
        if self._closed.exists():
            trial_numbers = json.loads(self._closed.read_text(encoding="utf-8"))
        return [trial_number for trial_number in trial_numbers if trial_number not in done]

    def close(self) -> None:
        """Mark the search as ended before test is opened: a search with test scores must not go on."""
        if not self._closed.exists():
            trial_numbers = [int(row.spec["number"]) for row in self.rows()]
            write_text(self._closed, json.dumps(trial_numbers))
            if len(trial_numbers) < self.num_samples:
                log.warning("the time budget closed this search: test is opened, so --resume adds no trials")

    def row_of(self, trial_number: int, params: Mapping[str, Any]) -> Row | None:
        """Return the published row of a trial, or None."""
        return self.ledger.row(self.unit(trial_number, params).key)

    def unit(self, trial_number: int, params: Mapping[str, Any]) -> Any:
        """Return the unit of a trial."""
        return trial_unit(self.job, trial_number, params, self.plan.dataset.fingerprint)

    def run(self, payload: Payload, specs: Sequence[PoolSpec]) -> None:
        """Train the pool, then run what is missing.

        Args:
            payload: the real images.
            specs: networks that the trials share.

        Raises:
            InterruptedRunError: a signal came, or the time budget ended before the paper's point.
        """
        fits = check_capacity(self.options.cpus_per_trial, self.options.gpus_per_trial)
        concurrent = min(fits, self.options.max_concurrent or fits)
        with shared_pool(self.job, payload, specs, concurrent) as self.job:
            begin = time.monotonic()
            if self.options.strategy == "pb2":
                from ddray.cluster.pb2 import run_pb2

                run_pb2(self, payload, concurrent)
            else:
                from ddray.cluster.scheduling import run_tune

                run_tune(self, payload, concurrent)
        missing = self.missing()
        budget = self.options.time_budget
        out_of_time = budget is not None and time.monotonic() - begin >= budget
        # A budget lets running trials end; a signal leaves some without a row.
        cut_off = bool(unfinished(self.ledger.events(), self.rows(), self.job))
        if missing and (cut_off or not out_of_time or 0 in missing):
            raise InterruptedRunError(
                f"the search ended with {self.num_samples - len(missing)} of {self.num_samples} trials in "
                f"{self.folder}; run again with --run-dir {self.folder} --resume to finish it"
            )


def _best(rows: Sequence[Row]) -> Row:
    """Return the trial with the highest val score at full length (the earliest of equals).

    Raises:
        DdrayError: no trial finished.
    """
    full_length = [row for row in rows if row.status == "done" and not row.result["stopped_early"]]
    if not full_length:
        reasons = sorted({row.error or "unknown" for row in rows})
        raise DdrayError(f"no trial finished: {'; '.join(reasons)}; narrow the space or lower its rates")
    return max(full_length, key=lambda row: (score_of(row.result), -int(row.spec["number"])))


def _paper(rows: Sequence[Row]) -> Row | None:
    """Return the paper's own point (trial 0) if it finished."""
    return next((row for row in rows if int(row.spec["number"]) == 0 and row.status == "done"), None)


def _result(
    run: Run,
    rows: Sequence[Row],
    best: Row,
    paper: Row | None,
    scores: Mapping[str, Mapping[str, Any]],
    begin: float,
) -> dict[str, Any]:
    """Return the command's JSON."""
    done = [row for row in rows if row.status == "done"]
    objective = best.result["objective"]
    none = {"test_accuracy_mean": None, "test_accuracy_std": None}
    return {
        "run_dir": str(run.folder),
        "objective": objective,
        "num_trials": len(rows),
        "num_failed": len(rows) - len(done),
        "num_stopped_early": sum(bool(row.result["stopped_early"]) for row in done),
        "best": {
            "config": best.spec["params"],
            objective: score_of(best.result),
            "trial": best.spec["number"],
        },
        "paper_point": {
            objective: score_of(paper.result) if paper else None,
            **(scores["paper"]["scores"] if paper else none),
        },
        "artifact": scores["best"]["artifact"],
        **scores["best"]["scores"],
        "wall_s": time.perf_counter() - begin,
    }
