"""ddray as a library: the commands as functions, on objects as well as files.

Every function takes the options of its command by name (`--num-samples` is `num_samples`; repeatable ones
also by their plural, such as `archs`), raises `InputError` instead of exiting, and returns a typed result.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.export import export_set
from ddray.artifact.options import ForeignOptions
from ddray.artifact.reading import check_options, dataset_of
from ddray.artifact.reading import load as load_set
from ddray.config import parse_overrides, takes
from ddray.data import Dataset, SplitName, open_dataset
from ddray.data.own import Own, store
from ddray.distillation.loop import run_distillation
from ddray.errors import InputError, InterruptedRunError
from ddray.evaluation.options import EvaluateOptions, EvaluateResult, EvaluateRunOptions
from ddray.jobs import distill as distill_job
from ddray.jobs import score
from ddray.jobs.context import make_context, make_distiller, on_device
from ddray.jobs.options import DistillOptions, PlanOptions, ShardOptions
from ddray.jobs.plan import Plan, plan_of
from ddray.nets.names import register_net
from ddray.ranking.options import NasModes, NasOptions, NasRequest, named_file
from ddray.ranking.result import NasResult
from ddray.runs.folder import read_config
from ddray.runs.recovery import recovering
from ddray.system.options import RunOptions
from ddray.tables.options import BenchOptions
from ddray.tables.result import BenchResult, ClaimsResult, Forecast
from ddray.tables.spec import BenchSpec, read_spec
from ddray.tuning.costs import SearchForecast
from ddray.tuning.options import TuneOptions
from ddray.tuning.result import TuneResult

AnyDataset: TypeAlias = str | Path | Dataset | Own
"""A name, a path, an open dataset, a torch Dataset, or (images, labels) as `data.own.store` takes."""

__all__ = ["bench", "claims", "distill", "evaluate", "export", "load", "nas", "tune"]


def _plan(
    options: dict[str, Any],
    settings: Mapping[str, Any] | None,
    default_ipc: int | None = 1,
    protocol: str = "hard",
) -> Plan:
    """Return the run that keyword arguments ask for; `dataset` and `test` are as `_named` takes them."""
    name, opened = _named(options.get("dataset"), options.get("test"))
    if name is not None:
        options = {**options, "dataset": name}
    if options.get("ipc") is None and options.get("budget") is None:
        options = {**options, "ipc": default_ipc}
    return plan_of(PlanOptions.pick(options), opened, settings, protocol)


def _named(dataset: AnyDataset | None, test: Own | None) -> tuple[str | None, Dataset | None]:
    """Return what a dataset is reopened by, and itself if it is open; own images are stored."""
    if dataset is not None and not isinstance(dataset, str | Path | Dataset):
        return str(store(dataset, test)), None
    if test is not None:
        raise InputError(
            f"test must be left out unless dataset is a torch Dataset or tensors, got {dataset!r}"
        )
    if isinstance(dataset, Dataset):
        return dataset.name, dataset
    return None if dataset is None else str(dataset), None


@takes(PlanOptions, DistillOptions, ShardOptions)
def distill(
    method: str,
    dataset: AnyDataset = "digits",
    *,
    test: Own | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> DistilledSet:
    """Distil a dataset and return the set; without `run_dir` nothing is written but `out`.

    Args:
        method: its name; built in, or from an installed package.
        dataset: a name, a path, an open dataset, a torch Dataset, or (images, labels).
        test: the test half of a torch Dataset or of tensors; default a fixed, stratified 20%.
        settings: overrides as for --set, such as `{"steps": 50, "method.lr_img": 0.5}`.
        options: see below. `ipc` is 1 by default; an existing run in `run_dir` is resumed, and with `steps`
            extended.

    Raises:
        InputError: a name or a value is invalid.
        DivergedError: the loss became NaN.
        InterruptedRunError: a signal ended the run; the same call with its `run_dir` continues it.
    """
    plan = _plan({**options, "method": method, "dataset": dataset, "test": test}, settings)
    how, shards = DistillOptions.pick({"resume": True, **options}), ShardOptions.pick(options)
    if shards.address is not None and how.run_dir is None:
        raise InputError("address needs a run_dir that all nodes share, got none")
    if how.run_dir is not None or how.out is not None or shards.shards is not None:
        with tempfile.TemporaryDirectory() as folder:  # for a run that only its set is wanted of
            run_dir = how.run_dir or Path(folder) / "run"
            how = how.model_copy(update={"run_dir": run_dir})
            more_steps = {**options, **(settings or {})}.get("steps") is not None
            try:
                return load_set(Path(_distil(plan, how, shards, more_steps).artifact))
            except InterruptedRunError as error:
                if run_dir.is_relative_to(folder):  # which ends here: nothing goes on from it
                    raise KeyboardInterrupt from error
                raise
    name = SplitName(how.val_seed, how.val_images)
    split, _ = name.carve(plan.dataset.train())
    with on_device(how.device) as device:
        ctx = make_context(plan, split, split_name=str(name), device=device)
        return recovering(lambda: run_distillation(make_distiller(plan), ctx).distilled)


@takes(PlanOptions, DistillOptions, ShardOptions)
def distill_to_run(method: str, **options: Any) -> distill_job.DistillResult:
    """Distil a dataset in a run folder and return what was measured: `ddray distill`."""
    plan = _plan({**options, "method": method}, None, default_ipc=None)
    how, shards = DistillOptions.pick(options), ShardOptions.pick(options)
    return _distil(plan, how, shards, options.get("steps") is not None)


def _distil(
    plan: Plan, how: DistillOptions, shards: ShardOptions, more_steps: bool
) -> distill_job.DistillResult:
    if shards.shards is not None:
        from ddray.cluster.shards import distill_on

        return distill_on(plan, how, shards, more_steps)
    with on_device(how.device) as device:
        return distill_job.distill(plan, **{**dict(how), "device": device}, more_steps=more_steps)


@takes(ForeignOptions)
def load(path: str | Path, *, dataset: str | Path | Dataset | None = None, **options: Any) -> DistilledSet:
    """Read a distilled set: ours, or another project's, whose dataset must be named.

    Args:
        path: the file, or a folder of pictures by class.
        dataset: for another project's file: what it was distilled from.
        options: see below; of a file of several runs, `index` must name one.

    Raises:
        InputError: the file is not a distilled set.
    """
    file, foreign = Path(path).expanduser().absolute(), ForeignOptions.pick(options)
    name = dataset or dataset_of(file)
    opened = name if isinstance(name, Dataset) or name is None else open_dataset(str(name))
    distilled = load_set(file, score.foreign_request(opened, foreign), foreign.index)
    check_options(foreign, [distilled])
    return distilled


@takes(EvaluateOptions, EvaluateRunOptions)
def evaluate(
    distilled: DistilledSet | str | Path,
    *,
    dataset: AnyDataset | None = None,
    test: Own | None = None,
    **options: Any,
) -> EvaluateResult:
    """Train fresh networks on a set and score them on test.

    Args:
        distilled: the set, or its file.
        dataset: what to test on, as `distill` takes it; default the set's dataset.
        test: the test half of a torch Dataset or of tensors, as `distill` took it.
        options: see below. Among `archs` may also be functions `(image_shape, num_classes)` that return a
            fresh nn.Module each time; their `__qualname__` is the network's name. `save`, `run_dir` and
            `max_concurrent` keep the record in a run folder.

    Raises:
        InputError: a name or a value is invalid.
        InterruptedRunError: a signal ended an evaluation in a run folder; `resume` continues it.
    """
    name, opened = _named(dataset, test)
    for option in {"arch", "archs"} & options.keys():
        options[option] = _arch_names(options[option])
    parsed, how = EvaluateOptions.pick({**options, "dataset": name}), EvaluateRunOptions.pick(options)
    with _files([distilled]) as (path,):
        if how.has_folder:
            from ddray.cluster.evaluation import evaluate_in_folder

            return evaluate_in_folder(path, parsed, how, opened)
        with on_device(how.device) as device:
            return recovering(score.evaluate, path, parsed, device=device, dataset=opened)


def _arch_names(archs: Any) -> Any:
    """Return architectures with functions that make networks replaced by their names."""
    several = archs if isinstance(archs, list | tuple) else [archs]
    names = [arch if isinstance(arch, str) else register_net(arch) for arch in several]
    if any(names.count(name) > several.count(arch) for name, arch in zip(names, several, strict=True)):
        raise InputError(f"archs must be functions of different names, got {', '.join(names)}")
    return names


@contextlib.contextmanager
def _files(sets: Sequence[DistilledSet | str | Path]) -> Iterator[list[Path]]:
    """Yield the files of sets; one in memory is written for the time being, named by its method."""
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = []
        for one in sets:
            if isinstance(one, DistilledSet):
                path = Path(folder) / f"{one.meta.method}{len(paths) or ''}.pt"
                one.save(path)
            else:
                path = Path(one).expanduser().absolute()
            paths.append(path)
        yield paths


@takes(PlanOptions, TuneOptions, RunOptions)
def tune(
    method: str,
    *,
    dataset: AnyDataset = "digits",
    test: Own | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> TuneResult:
    """Search a method's hyperparameters on val over a Ray cluster, and score the winner on test once.

    Args:
        method: its name; built in, or from an installed package.
        dataset: a name, a path, an open dataset, a torch Dataset, or (images, labels).
        test: the test half of a torch Dataset or of tensors; default a fixed, stratified 20%.
        settings: overrides as for --set, such as `{"steps": 50, "evaluate.seeds": 1}`.
        options: see below; `space` may be a mapping of names to ranges. `ipc` is 1 by default. With protocol
            `soft`, what is set under `evaluate` are that protocol's settings.

    Raises:
        InputError: a name or a value is invalid.
        InterruptedRunError: a signal ended the search; `resume` continues it.
        DdrayError: no trial finished.
    """
    from ddray.cluster.tune import tune as search

    run = RunOptions.pick(options)
    before = read_config(run.run_dir) if run.resume else {}
    named = {**options, "method": method, "dataset": dataset, "test": test}
    return search(*_search(named, settings, before), run_dir=run.run_dir, resume=run.resume)


@takes(PlanOptions, TuneOptions, RunOptions)
def forecast_tune(method: str, **options: Any) -> SearchForecast:
    """Return a search's units and what they are expected to take; nothing is run: `ddray tune --dry-run`."""
    from ddray.cluster.tune import forecast

    run_dir = RunOptions.pick(options).run_dir
    return forecast(*_search({**options, "method": method}, None, read_config(run_dir)), run_dir)


def _search(
    options: dict[str, Any], settings: Mapping[str, Any] | None, before: Mapping[str, Any]
) -> tuple[Plan, TuneOptions]:
    from ddray.tuning.settings import with_protocol

    how = with_protocol(TuneOptions.pick(options), options["method"], before)
    return _plan(options, settings, protocol=str(how.protocol)), how


@takes(NasRequest, NasOptions, NasModes, RunOptions)
def nas(
    proxies: DistilledSet | str | Path | Sequence[DistilledSet | str | Path] = (),
    *,
    dataset: AnyDataset | None = None,
    test: Own | None = None,
    **options: Any,
) -> NasResult:
    """Rank architectures on distilled sets, and compare with their ranking on the whole dataset.

    Args:
        proxies: one or several distilled sets, or their files, also as `name=FILE`.
        dataset: the real data, as `distill` takes it; default the first set's.
        test: the test half of a torch Dataset or of tensors.
        options: see below.

    Raises:
        InputError: a name or a value is invalid.
        DdrayError: no architecture finished on any proxy.
    """
    from ddray.cluster.executor import nas_executor
    from ddray.cluster.resources import with_gpus
    from ddray.ranking import command
    from ddray.ranking.spaces import resolve_config

    name, opened = _named(dataset, test)
    options |= {} if name is None else {"dataset": name}
    modes = NasModes.pick(options)
    sets = [proxies] if isinstance(proxies, DistilledSet | str | Path) else list(proxies)
    command.check_modes({**options, "proxies": sets})
    parsed = NasOptions.pick(options)
    if modes.scores is not None:
        return command.compare_scores(modes.scores, parsed)
    run = RunOptions.pick(options)
    parsed = with_gpus(parsed, read_config(run.run_dir) if run.resume else {})
    with _files([one if isinstance(one, DistilledSet) else named_file(one).path for one in sets]) as paths:
        named = [
            path if isinstance(one, DistilledSet) else one for path, one in zip(paths, sets, strict=True)
        ]
        return command.run_nas(
            NasRequest.pick({**options, "proxies": named}),
            parsed,
            resolve_config(parsed, (parse_overrides(modes.sets),)),
            nas_executor(parsed),
            run_dir=run.run_dir,
            resume=run.resume,
            dataset=opened,
        )


@takes(BenchOptions, RunOptions)
def bench(file: str | Path | Mapping[str, Any], **options: Any) -> BenchResult:
    """Run a table, methods x datasets x sizes x seeds, and set its numbers beside the published ones.

    Args:
        file: the bench file, or what it would hold.
        options: see below.

    Raises:
        InputError: the table or an option is bad.
        DdrayError: no cell was scored.
    """
    from ddray.cluster.executor import bench_executor
    from ddray.cluster.resources import with_gpus
    from ddray.cluster.runtime import sigterm_as_sigint
    from ddray.tables.run import prepare, run_bench

    run, parsed = RunOptions.pick(options), BenchOptions.pick(options)
    spec = _spec(file, parsed)
    parsed = with_gpus(parsed, read_config(run.run_dir) if run.resume else {})
    prepared = prepare(spec, parsed)
    with sigterm_as_sigint():
        return run_bench(prepared, bench_executor(parsed), run_dir=run.run_dir, resume=run.resume)


@takes(BenchOptions, RunOptions)
def claims(file: str | Path | Mapping[str, Any], **options: Any) -> ClaimsResult:
    """Run a table and say which of its claims hold, by a paired test over its sets.

    Args:
        file: the bench file with `claims`, or what it would hold.
        options: see below.

    Raises:
        InputError: the table or an option is bad, or it has no claims.
        DdrayError: no cell was scored.
    """
    from ddray.report.page import write_page

    if not _spec(file, BenchOptions.pick(options)).claims:
        raise InputError("a file must have claims: [{say, better, worse}] for this, got none")
    result = bench(file, **options)
    page = Path(result.run_dir) / "report.html"
    write_page([page.parent], page, planes=False)
    facts = {name: getattr(result, name) for name in ClaimsResult.model_fields if name in result}
    return ClaimsResult(**facts, report=str(page))


@takes(BenchOptions, RunOptions)
def forecast(file: str | Path | Mapping[str, Any], **options: Any) -> Forecast:
    """Return a table's units and their expected cost; nothing is run: `ddray bench --dry-run`."""
    from ddray.cluster.resources import with_gpus
    from ddray.tables.dry_run import dry_run

    parsed, run_dir = BenchOptions.pick(options), RunOptions.pick(options).run_dir
    spec = _spec(file, parsed)
    return dry_run(spec, with_gpus(parsed, read_config(run_dir)), run_dir=run_dir)


def _spec(file: str | Path | Mapping[str, Any], options: BenchOptions) -> BenchSpec:
    source = file if isinstance(file, Mapping) else Path(file).expanduser().absolute()
    sets = {**parse_overrides(options.sets), **options.numerics()}
    return read_spec(source, options.scale, options.content(), sets)


def export(distilled: DistilledSet | str | Path, out: str | Path, *, form: str | None = None) -> Path:
    """Write a set for other tools, PNG files by class, a parquet file or DD-Ranking's, and return the path.

    Args:
        distilled: the set, or its file.
        out: a new folder (for DD-Ranking too), or the parquet file.
        form: folder, parquet or ddranking; default parquet if `out` ends in `.parquet`, else folder.

    Raises:
        InputError: the form is unknown or does not fit the name, `out` exists, or the set has no pictures.
        StorageError: it can't be written.
    """
    target = Path(out).absolute()
    export_set(distilled if isinstance(distilled, DistilledSet) else load(distilled), target, form)
    return target
