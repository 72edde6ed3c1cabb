"""The functions behind `ddray nas`: rank scores from a file, or run and report a sweep."""

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.reading import check_options, dataset_of, load_all
from ddray.config import option_name
from ddray.data import Dataset, carve_val, open_dataset
from ddray.errors import DdrayError, InputError, unknown
from ddray.jobs.score import check_fits, foreign_request
from ddray.ranking import get_definition, space_names
from ddray.ranking.figures_of_merit import Array, figures_of_merit, mean_over_seeds, top1_test_accuracy
from ddray.ranking.options import NamedFile, NasModes, NasRequest
from ddray.ranking.proxies import Proxy, baseline_proxies, file_proxies, harness_variants
from ddray.ranking.result import NasResult, ProxyResult
from ddray.ranking.spaces import get_space, owners
from ddray.ranking.sweep import NasConfig, NasOptions, Sweep, choose_architectures, run_sweep, split_of
from ddray.ranking.truth import Truth, read_scores, read_truth, with_column
from ddray.runs.executor import Executor
from ddray.runs.folder import read_config
from ddray.runs.ledger import Row
from ddray.system.files import write_atomically, write_text
from ddray.system.options import RunOptions

_FIELDS: Final = {
    name: field
    for config in (NasRequest, NasModes, NasOptions, RunOptions)
    for name, field in config.model_fields.items()
}
_OF_SCORES: Final = ("scores", "space", "truth", "truth_column", "seed")
"""What `--scores` uses; the seed is the bootstrap's."""


def check_modes(options: Mapping[str, Any]) -> None:
    """Refuse an unknown space or executor, and options that would be ignored.

    Raises:
        InputError: names the first of them.
    """
    get_space(options.get("space", NasOptions().space))
    executors = ("ray", "local")
    if options.get("executor", executors[0]) not in executors:
        raise unknown("--executor", str(options["executor"]), executors)
    if options.get("executor") == "local":
        context = "with --executor local, which runs unit after unit and waits for each"
        _refuse(options, ("unit_timeout", "num_workers", "address"), context)
    if options.get("scores") is not None:
        _refuse_all_but(_OF_SCORES, options, "with --scores, which trains nothing")
    elif not options.get("proxies"):
        raise InputError("ddray nas needs --proxy FILE (or --describe, or --scores FILE.csv)")


def check_described(options: Mapping[str, Any]) -> None:
    """Refuse options beside `describe` that would be ignored; InputError names the first."""
    _refuse_all_but(("describe", "space"), options, "with --describe, which lists a space")


def _refuse_all_but(used: Collection[str], options: Mapping[str, Any], context: str) -> None:
    _refuse(options, [name for name in _FIELDS if name not in used], context)


def _refuse(options: Mapping[str, Any], names: Sequence[str], context: str) -> None:
    """Refuse options that are set."""
    for name in names:
        option = option_name(name, _FIELDS[name])
        value = options.get(name, options.get(option))
        if value not in (None, [], (), False):
            text = value if isinstance(value, str | int | float | Path) else ", ".join(map(str, value))
            raise InputError(f"--{option} must be left out {context}, got {text}")


def compare_scores(path: Path, options: NasOptions) -> NasResult:
    """Compare scores from a file with a truth; nothing is trained.

    Raises:
        InputError: the scores or the truth can't be read.
    """
    begin = time.perf_counter()
    space = get_space(options.space)
    indices, scores = read_scores(path, space)
    if options.truth == "whole":
        raise InputError("--scores needs --truth table, api:FILE or a CSV file: nothing is trained")
    options = with_column(options, None)
    truth = read_truth(options, space, indices)
    wall_s = time.perf_counter() - begin
    figures = figures_of_merit(scores[None], truth.values, storage_images=0, wall_s=wall_s, seed=options.seed)
    performance = top1_test_accuracy(scores, truth.values, truth.test)
    proxy = ProxyResult.parse({"proxy": path.name, **figures, "top1_test_accuracy": performance})
    facts = {"source": options.truth, **truth.facts}
    return NasResult(space=options.space, num_archs=len(indices), truth=facts, proxies=[proxy])


def prepare(
    request: NasRequest,
    options: NasOptions,
    config: NasConfig,
    *,
    can_grow: bool = False,
    dataset: Dataset | None = None,
    earlier: Collection[str] = (),
) -> Sweep:
    """Check a request and return its sweep; nothing is trained but the networks of coreset methods.

    An open `dataset` stands in for the request's. `earlier` are the proxies of a sweep that is resumed.

    Raises:
        InputError: a file, a name or a number is invalid.
    """
    check_compat(request.compat, options.space)
    opening = request.opening()
    name = request.dataset or next(filter(None, map(dataset_of, (file.path for file in request.files))), None)
    named = None if dataset is None else dataset.with_options(**request.content())
    if named is None and name is not None:
        named = open_dataset(name, **opening)
    files, sets = _read_proxies(request, named)
    dataset = named or open_dataset(sets[0].meta.dataset, **opening)
    options = with_column(options, dataset.name)
    for file, distilled in zip(files, sets, strict=True):
        check_fits(distilled, dataset, file.path)
    indices = choose_architectures(options, config, dataset)
    split, images = split_of(options), dataset.train()
    train, val = carve_val(images, seed=options.seed, fraction=split.fraction(len(images)))
    proxies = file_proxies(files, sets, str(split), earlier)
    proxies += baseline_proxies(request.baselines, proxies, dataset, train, config, split=split)
    if request.compat:
        proxies += harness_variants(proxies, get_definition(options.space).harnesses[request.compat])
    names = [proxy.name for proxy in proxies]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"proxies must have different names, 2 are called {repeated[0]}; use --proxy NAME=FILE"
        )
    return Sweep(
        options, config, dataset, train, val, tuple(proxies), indices, options.device, can_grow=can_grow
    )


def _read_proxies(request: NasRequest, dataset: Dataset | None) -> tuple[list[NamedFile], list[DistilledSet]]:
    """Return the sets of all files; each of a file's several runs has a name of its own, and is a proxy."""
    files, sets, reading = [], [], foreign_request(dataset, request)
    for file in request.files:
        loaded = load_all(file.path, reading, request.index)
        for run_index, distilled in enumerate(loaded):
            run = f"#{run_index}" if len(loaded) > 1 else ""
            path = file.path.with_name(f"{file.path.name}{run}")
            files.append(NamedFile(path=path, name=None if file.name is None else f"{file.name}{run}"))
            sets.append(distilled)
    check_options(request, sets)
    return files, sets


def check_compat(compat: str | None, space: str) -> None:
    """Check that a harness is known and applies to the space.

    Raises:
        InputError: the harness is unknown or does not apply; names the valid ones.
    """
    if compat is None or compat in get_definition(space).harnesses:
        return
    if spaces := owners(compat, attrgetter("harnesses")):
        raise InputError(f"--compat {compat} needs --space {spaces}, got {space}")
    harnesses = {name for other in space_names() for name in get_definition(other).harnesses}
    raise unknown("--compat", compat, harnesses)


def run_nas(
    request: NasRequest,
    options: NasOptions,
    config: NasConfig,
    executor: Executor,
    *,
    run_dir: Path | None,
    resume: bool,
    can_grow: bool = False,
    dataset: Dataset | None = None,
) -> NasResult:
    """Train architectures on proxies, rank them, compare with the truth, and write table, plots and page.

    The run's folder is `run_dir` (None creates a numbered one). `can_grow`: a resumed sweep may have other
    proxies than before. An open `dataset` stands in for the request's.

    Raises:
        InputError: any invalid input.
        DdrayError: no architecture finished on any proxy (table, plots and page are still written).
    """
    begin = time.perf_counter()
    earlier = read_config(run_dir).get("proxies", {}) if resume else {}
    sweep = prepare(request, options, config, can_grow=can_grow, dataset=dataset, earlier=earlier)
    truth = None
    if options.truth != "whole":  # read before anything is trained
        truth = read_truth(sweep.options, sweep.space(), sweep.indices)
    run, rows = run_sweep(sweep, executor, run_dir=run_dir, resume=resume)
    ranking = collect(sweep, rows, truth)
    failed = [row for row in rows if row.status == "failed"]
    result = NasResult.parse(
        {
            "space": options.space,
            "dataset": sweep.dataset.name,
            "num_archs": len(sweep.indices),
            "num_failed": len(failed),
            "run_dir": str(run.folder),
            "truth": ranking.truth_facts,
            "proxies": ranking.proxies,
            "wall_s": time.perf_counter() - begin,
        }
    )
    _write(run.folder, result, ranking.table)
    if not any(figures["num_archs"] for figures in ranking.proxies):
        reasons = "; ".join(sorted({row.error or "unknown" for row in failed}))
        raise DdrayError(
            "at least one architecture must finish on a proxy and have a truth, none does in "
            f"{run.folder}: {reasons or 'the truth has none of them'}; try smaller ones with --max-mflops"
        )
    return result


class SweepResults(NamedTuple):
    """Results computed from a sweep's rows."""

    proxies: list[dict[str, Any]]
    """Figures of merit, one mapping per proxy; None where nothing finished."""
    table: pd.DataFrame
    """One line per proxy and architecture; test is the last column."""
    truth_facts: dict[str, Any]
    """Source of the truth; for a trained one also seconds, images and number diverged."""


def collect(sweep: Sweep, rows: Sequence[Row], truth: Truth | None) -> SweepResults:
    """Return the figures and the table for a sweep's rows; without a `truth`, the `truth` rows are it."""
    columns = {index: column for column, index in enumerate(sweep.indices)}
    true_rows = [row for row in rows if row.kind == "truth"]
    facts: dict[str, Any] = {"source": sweep.options.truth, **({} if truth is None else truth.facts)}
    if truth is None:
        test = mean_over_seeds(_matrix(true_rows, columns, "test_accuracy"))
        truth = Truth("whole", _matrix(true_rows, columns, "val_accuracy"), test)
        facts |= {
            "dataset": sweep.dataset.name,
            "split": "val",
            "epochs": sweep.config.truth_recipe.epochs,
            "seeds": sweep.options.truth_seeds,
            "wall_s": sum(row.wall_s for row in true_rows),
            "storage_images": len(sweep.train),
            "top1_test_accuracy": top1_test_accuracy(truth.values, truth.values, truth.test),
            "num_diverged": _num_diverged(true_rows),
        }
    # A constant guess scores the share of val's largest class: more than 1/K if class sizes differ.
    chance = float(torch.bincount(sweep.val.labels).max()) / len(sweep.val)
    space = sweep.space()
    described = pd.DataFrame([space.describe(index) for index in sweep.indices])
    proxies, tables = [], []
    for proxy in sweep.proxies:
        proxy_rows = [row for row in rows if row.kind == "nas" and row.spec["proxy"] == proxy.name]
        scores = _matrix(proxy_rows, columns, "val_accuracy")
        figures = figures_of_merit(
            scores,
            truth.values,
            storage_images=proxy.storage_images,
            wall_s=sum(row.wall_s for row in proxy_rows),
            chance=chance,
            num_val=len(sweep.val),
            seed=sweep.options.seed,
        )
        performance = top1_test_accuracy(scores, truth.values, truth.test)
        counts = {"num_diverged": _num_diverged(proxy_rows)}
        proxies.append({"proxy": proxy.name, **figures, "top1_test_accuracy": performance, **counts})
        tables.append(_table(proxy, described, scores, truth))
    return SweepResults(proxies, pd.concat(tables, ignore_index=True), facts)


def _num_diverged(rows: Sequence[Row]) -> int:
    """Return the number of architectures that diverged for at least one seed."""
    return len({row.spec["index"] for row in rows if row.result.get("diverged")})


def _matrix(rows: Sequence[Row], columns: Mapping[int, int], name: str) -> Array:
    """Return accuracies [S, A], NaN for failed or missing units."""
    seeds = sorted({row.spec["seed"] for row in rows})
    accuracies = np.full((max(1, len(seeds)), len(columns)), np.nan)
    for row in rows:
        value = row.result.get(name)
        if row.status == "done" and value is not None:
            accuracies[seeds.index(row.spec["seed"]), columns[row.spec["index"]]] = value
    return accuracies


def _table(proxy: Proxy, described: pd.DataFrame, scores: Array, truth: Truth) -> pd.DataFrame:
    """Return one line per architecture, the proxy's best first."""
    by_arch = [accuracies[np.isfinite(accuracies)].tolist() for accuracies in scores.T]
    score, true = (pd.Series(mean_over_seeds(np.atleast_2d(side))) for side in (scores, truth.values))
    table = described.assign(
        proxy_accuracy=score,
        proxy_accuracy_std=[statistics.stdev(each) if len(each) > 1 else np.nan for each in by_arch],
        proxy_rank=score.rank(ascending=False, method="min"),
        truth_accuracy=true,
        truth_rank=true.rank(ascending=False, method="min"),
        num_seeds=[len(each) for each in by_arch],
        failed=[not each for each in by_arch],
        truth_test_accuracy=np.nan if truth.test is None else truth.test,
    )
    table.insert(0, "proxy", proxy.name)
    return table.sort_values(["proxy_rank", "index"], ignore_index=True)


def _write(folder: Path, result: NasResult, table: pd.DataFrame) -> None:
    """Write results.csv, results.parquet, the scatter plots and report.html."""
    from ddray.ranking.report import save_scatters, write_nas_report

    dumped = result.dump()
    write_text(folder / "results.csv", table.to_csv(index=False))
    write_atomically(folder / "results.parquet", lambda file: table.to_parquet(file, index=False))
    save_scatters(folder, table, dumped["proxies"])
    write_nas_report(folder, dumped, table)
