"""`ddray tune`: Ray Tune schedules and searches, the ledger is the record of truth (docs/ray.md, 1, 19, 20).

A search distils from nine tenths of train and scores on the held-out tenth. Test is opened once, after
the search has ended, for the winner and the paper's point on fresh seeds.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddray.cluster.executor import RayExecutor, nas_executor
from ddray.cluster.pretrain import shared_pool
from ddray.cluster.resources import with_gpus
from ddray.cluster.runtime import ray_runtime, sigterm_as_sigint
from ddray.data import Split, SplitName, carve_val, search_rows
from ddray.data.pixels import pixel_space
from ddray.distillation.method import MethodConfig
from ddray.distillation.shards import shard_classes
from ddray.errors import InputError, unknown
from ddray.evaluation import get_protocol
from ddray.jobs.context import check_plan, check_size, declared_specs, make_context, make_distiller
from ddray.jobs.plan import Plan, budget_method
from ddray.jobs.shards import check_independent, check_shards
from ddray.ranking import DEFAULT_SPACE, space_names
from ddray.ranking.objective import SpearmanObjective, spearman_objective
from ddray.ranking.options import NasOptions
from ddray.ranking.spaces import get_space
from ddray.runs.folder import Run, extended_from, open_run, read_config
from ddray.runs.ledger import Ledger
from ddray.runs.results import write_results
from ddray.system.worker import device_kind
from ddray.tuning.best import last_settings, search_result, write_best
from ddray.tuning.costs import SearchForecast, forecast_search, record_search_costs
from ddray.tuning.finals import run_finals
from ddray.tuning.options import TuneOptions
from ddray.tuning.payload import pack
from ddray.tuning.report import write_report
from ddray.tuning.result import TuneResult
from ddray.tuning.search import Search, best_trial, paper_trial, reopen
from ddray.tuning.settings import Settings, protocol_for_sets, with_protocol
from ddray.tuning.space import Range, Space, conditions, drawn, grid, method_space
from ddray.tuning.start_points import Points, number_start_points, read_start_points
from ddray.tuning.trial import ETA
from ddray.tuning.worker import SearchJob

log = logging.getLogger(__name__)


def tune(plan: Plan, options: TuneOptions, *, run_dir: Path | None, resume: bool) -> TuneResult:
    """Run a search, or continue the one in `run_dir` (None makes a numbered folder).

    The plan's settings are the paper's point of the search. A search is continued with more trials if the
    options name a larger number of them.

    Raises:
        InputError: the space, the plan or an option is bad, or the test set can't be read at the end.
        InterruptedRunError: SIGINT or SIGTERM; finished trials are kept.
        DdrayError: no trial finished.
    """
    begin = time.perf_counter()
    before = read_config(run_dir) if resume else {}
    options, settings, space, paper, num_samples = check_search(plan, options, before)
    train, val = carve_val(plan.dataset.train(), seed=plan.seed)
    check_size(plan, train)
    options = with_gpus(options, before)
    if options.shards is not None:
        check_shards(plan, options.shards, train)
    most = None if options.max_concurrent is None else options.max_concurrent * (options.shards or 1)
    executor = RayExecutor(options.cpus_per_trial, options.gpus, most, options.address)
    run, start_points = _open(plan, options, settings, space, paper, num_samples, run_dir, resume)
    with run.continued("the search"):
        job = _job(plan, options, settings, run, _nas_objective(plan, options, train, val, run))
    search = Search(plan, options, space, paper, job, run, num_samples, start_points)
    earlier = {row.key for row in run.ledger.rows()}
    if search.missing():
        with run.continued("the search"), sigterm_as_sigint(), ray_runtime(options.address):
            _run_missing(search, train, val, executor)
    rows = search.rows()
    write_results(run.folder / "results.csv", run.ledger.rows())
    best, paper_row = best_trial(rows), paper_trial(rows)
    points = {"best": best, "paper": paper_row}
    search.close()
    with run.continued("the search"), sigterm_as_sigint():
        scores = run_finals(search, points, executor, shared_pool)
    write_results(run.folder / "results.csv", run.ledger.rows())
    record_search_costs(search, [row for row in run.ledger.rows() if row.key not in earlier])
    result = search_result(search, settings.protocol, rows, scores, time.perf_counter() - begin)
    write_best(run.folder, plan, settings, last_settings(best), result.verdict)
    write_report(run.folder, result.dump(), rows, space)
    return result


class CheckedSearch(NamedTuple):
    """A search whose names and values are right."""

    options: TuneOptions
    """With the protocol that scores the sets."""
    settings: Settings
    space: Space
    paper: dict[str, Any]
    """The preset's values of the space's names: trial 0."""
    num_samples: int


def check_search(plan: Plan, options: TuneOptions, before: Mapping[str, Any]) -> CheckedSearch:
    """Check a search, reading no image; `before` is the config.yaml of one that is continued, or empty.

    Raises:
        InputError: the space, the plan or an option is bad.
    """
    options = with_protocol(options, plan.method, before)
    settings = Settings.of(plan, str(options.protocol))
    # A search goes on in its own space, whatever has become of the shipped one.
    ranges = before.get("space") if options.space is None else options.space
    if ranges is None and not getattr(plan.config.method, "has_space", True):
        raise InputError(f"--space must be given: with these settings {plan.method}'s own varies nothing")
    if options.strategy == "pb2" and _in_turn(plan):
        raise InputError(
            f"strategy pb2 must not be used with {plan.method}, which learns its images in turn; use tpe"
        )
    space = _space(plan, settings, ranges, in_shards=options.shards is not None)
    make_distiller(plan)
    check_plan(plan)
    if (check_method := get_protocol(settings.protocol).check_method) is not None:
        in_space = {
            name.removeprefix("evaluate."): each
            for name, each in space.items()
            if name.startswith("evaluate.")
        }
        check_method(plan.method, plan.config.method, {**(settings.scoring or {}), **in_space})
    paper = drawn(space, settings.values(space))
    _check_objective(plan, options, space)
    num_samples = _num_samples(options, space, paper, plan.config.steps)
    return CheckedSearch(options, settings, space, paper, num_samples)


def forecast(plan: Plan, options: TuneOptions, run_dir: Path | None) -> SearchForecast:
    """Return what a search's missing units are expected to take; nothing is run, and no image is read.

    Raises:
        InputError: the space, the plan or an option is bad.
    """
    before = read_config(run_dir)
    checked = check_search(plan, options, before)
    ledger = Ledger(run_dir) if run_dir is not None and before else None
    options = with_gpus(checked.options, before)
    return forecast_search(plan, options, checked.num_samples, ledger, device_kind(options.gpus))


def _open(
    plan: Plan,
    options: TuneOptions,
    settings: Settings,
    space: Space,
    paper: Mapping[str, Any],
    num_samples: int,
    run_dir: Path | None,
    resume: bool,
) -> tuple[Run, Points]:
    """Open the run's folder, extended if more trials are asked for; return it with the start points."""
    points = read_start_points(options.start_points, plan, settings, space)
    if points and options.strategy == "grid":
        raise InputError("strategy grid tries every combination of the space: it takes no --start-point")
    before, extended = read_config(run_dir) if resume else {}, None
    earlier_points = {int(number): point for number, point in before.get("start_points", {}).items()}
    first = num_samples if before else 1
    if "num_samples" in options.model_fields_set:
        smaller = extended_from(before, "num_samples", num_samples)
        if smaller is not None:
            if options.strategy == "pb2":
                rule = f"--num-samples is pb2's population, which can't grow from {smaller}"
                raise InputError(f"{rule} to {num_samples}; use a new --run-dir")
            first, extended = smaller, {n: before.get(n) for n in ("num_samples", "start_points")}
    start_points = number_start_points(points, paper, earlier_points, range(first, num_samples))
    config = _run_config(plan, options, settings, space, num_samples, start_points)
    if before and "protocol" not in before and options.protocol == protocol_for_sets(plan.method):
        del config["protocol"]  # of a run that was started before protocols could be named
    run = open_run(run_dir, config, command="tune", resume=resume, extended=extended)
    if extended is not None:
        reopen(run)
        run.write_config()
    return run, start_points


def _run_config(
    plan: Plan,
    options: TuneOptions,
    settings: Settings,
    space: Space,
    num_samples: int,
    start_points: Points,
) -> dict[str, Any]:
    """Return what must not change when the run is resumed, but for larger numbers of trials and points."""
    names = [] if options.objective == "val-accuracy" else ["objective", "nas_sample", "nas_epochs"]
    if names and options.nas_space != DEFAULT_SPACE:
        names.append("nas_space")
    return {
        **plan.describe(),
        "evaluate": settings.dump({})["evaluate"],
        "protocol": options.protocol,
        **({"teachers": list(options.teachers)} if options.teachers else {}),
        "strategy": options.strategy,
        "num_samples": num_samples,
        "space": {name: value_range.describe() for name, value_range in space.items()},
        **({"start_points": {str(n): point for n, point in start_points.items()}} if start_points else {}),
        "final_sets": options.final_sets,
        "device": device_kind(options.gpus),
        **({"gpus_per_trial": options.gpus} if options.gpus else {}),
        **{name: getattr(options, name) for name in names},
    }


def _job(
    plan: Plan, options: TuneOptions, settings: Settings, run: Run, nas: SpearmanObjective | None
) -> SearchJob:
    # Rungs are parts of the last: a ninth, a third and the whole for ASHA.
    has_rungs = options.strategy == "asha-tpe" and plan.config.steps >= ETA**2 and not _in_turn(plan)
    return SearchJob(
        run_dir=str(run.folder),
        epoch=run.epoch,
        method=plan.method,
        ipc=plan.ipc,
        seed=plan.seed,
        config=plan.config.dump(),
        budgets=(1, ETA, ETA**2) if has_rungs else (1,),
        cpus=options.cpus_per_trial,
        gpus=options.gpus,
        nas=nas,
        budget=plan.budget,
        protocol="" if settings.protocol == protocol_for_sets(plan.method) else settings.protocol,
        scoring=settings.scoring,
        teachers=options.teachers,
        shards=()
        if options.shards is None
        else tuple(shard_classes(plan.dataset.num_classes, options.shards)),
    )


def _in_turn(plan: Plan) -> bool:
    """Return whether the method learns images in turn: a part of the steps then leaves some as they began."""
    method = plan.config.method
    return isinstance(method, MethodConfig) and method.learns_in_turn(plan.dataset.num_classes, plan.ipc)


def _run_missing(search: Search, train: Split, val: Split, executor: RayExecutor) -> None:
    """Train the networks that the method declares, then run the trials that are missing.

    Trials with other pool settings train theirs. InterruptedRunError as for `Search.check_ended`.
    """
    plan, split_name = search.plan, str(SplitName(search.plan.seed))
    space = pixel_space(plan.config.pixel_space, plan.dataset, train)
    train_rows = search_rows(plan.dataset.train(), seed=plan.seed)
    payload = pack(plan.dataset, train, split_name, val, space, train_rows)
    device = torch.device(search.job.device)
    ctx = make_context(plan, train, split_name=split_name, device=device, space=space)
    specs = declared_specs(plan, ctx)
    slots = executor.capacity()  # refused before the pool is trained
    with shared_pool(search.job, payload, specs, executor) as job:
        search, begin = replace(search, job=job), time.monotonic()
        if search.options.strategy == "pb2":
            from ddray.cluster.pb2 import run_pb2

            with executor.workers() as workers:
                run_pb2(search, payload, workers)
        else:
            from ddray.cluster.ray_tune import run_tune

            run_tune(search, payload, slots)
    search.check_ended(time.monotonic() - begin)


def _check_objective(plan: Plan, options: TuneOptions, space: Space) -> None:
    """Refuse to rank architectures by sets without labels, or by settings that rank none: InputError.

    More architectures than there are are refused too.
    """
    if options.objective == "val-accuracy":
        return
    if budget_method(plan.method) is not None:
        raise InputError(
            f"--objective nas-spearman needs a method whose sets have labels to train architectures on, got "
            f"{plan.method}, whose sets have targets; use --objective val-accuracy"
        )
    if options.nas_space not in space_names():
        raise unknown("--nas-space", options.nas_space, space_names())
    if of_protocol := [name for name in space if name.startswith("evaluate.")]:
        raise InputError(
            f"--objective nas-spearman trains architectures for --nas-epochs: the space must not name "
            f"{', '.join(of_protocol)}"
        )
    num_architectures = len(get_space(options.nas_space))
    if options.nas_sample > num_architectures:
        raise InputError(f"--nas-sample must be in 3..{num_architectures}, got {options.nas_sample}")


def _nas_objective(
    plan: Plan, options: TuneOptions, train: Split, val: Split, run: Run
) -> SpearmanObjective | None:
    """Train the sample of architectures that trials are scored by; None where accuracy is maximised."""
    if options.objective == "val-accuracy":
        return None
    values: dict[str, Any] = {"sample": options.nas_sample, "epochs": options.nas_epochs, "seed": plan.seed}
    values |= {"space": options.nas_space}
    values |= {"num_workers": options.max_concurrent, "address": options.address}
    values |= {"cpus_per_worker": options.cpus_per_trial, "gpus_per_worker": options.gpus}
    values |= {"precision": plan.config.precision, "deterministic": plan.config.deterministic}
    nas = NasOptions.parse(values)
    return spearman_objective(nas, plan.dataset, train, val, nas_executor(nas), run.folder / "architectures")


def _space(
    plan: Plan, settings: Settings, source: Path | dict[str, Any] | None, *, in_shards: bool
) -> dict[str, Range]:
    """Return the ranges; InputError if the file is missing or names a setting that there is not."""
    space, where = method_space(plan.method, type(plan.config.method), source)
    for name in space:
        settings.check_name(name, f"{where}: a range's name")
    return {name: _checked(plan, settings, space, name, where, in_shards) for name in space}


def _checked(plan: Plan, settings: Settings, space: Space, name: str, source: str, in_shards: bool) -> Range:
    """Return a range whose values the run accepts, with choices in the setting's type (1 as 1.0).

    InputError if a value breaks the setting's rule, or does not fit the method, the network or shards.
    """
    value_range, others = space[name], conditions(space, name)
    drawn_too = {other: each.probes()[0] for other, each in space.items() if not each.when}
    parsed = []
    for value in value_range.probes():
        params = {**others, name: value}
        try:
            trial_plan = settings.apply(plan, params, source)
        except InputError:  # a rule may bind it to others, whose values in the preset no trial has
            params = {**drawn_too, **params}
            trial_plan = settings.apply(plan, params, source)
        make_distiller(trial_plan)
        check_plan(trial_plan)
        if in_shards:
            check_independent(trial_plan)
        parsed.append(settings.values([name], params)[name])
    return replace(value_range, choices=tuple(parsed)) if value_range.kind == "choice" else value_range


def _num_samples(options: TuneOptions, space: Space, paper: Mapping[str, Any], steps: int) -> int:
    """Return the number of trials; InputError if there is nothing to vary, or not as PB2 needs it."""
    if options.strategy == "grid":
        return len(grid(space, paper))
    if not space and options.num_samples > 1:
        text = "a space file without a range makes every trial the same: add --num-samples 1"
        raise InputError(f"{text}, got {options.num_samples}")
    if options.strategy == "pb2":
        from ddray.cluster.pb2 import check_space, segment_ends

        check_space(space, paper, options.num_samples)
        segment_ends(steps)
        if options.time_budget is not None:
            raise InputError("--time-budget can't be used with strategy pb2, whose trials end together")
    return options.num_samples
