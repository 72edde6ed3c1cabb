"""The functions behind `ddray nas`: describe a space, rank scores from a file, or run and report a sweep."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch

from ddray.artifact.reading import load
from ddray.config import option_name
from ddray.data import Dataset, SplitName, open_dataset
from ddray.errors import DdrayError, InputError, unknown
from ddray.evaluation.options import PixelKind
from ddray.jobs.score import check_fits, foreign_space
from ddray.ranking import get_definition, space_names
from ddray.ranking.figures_of_merit import figures_of_merit, mean_over_seeds
from ddray.ranking.options import NasModes, NasRequest
from ddray.ranking.proxies import (
    Proxy,
    baseline_proxies,
    check_names,
    file_proxies,
    harness_variants,
    warn_of_seen_val,
)
from ddray.ranking.result import ArchList, NasResult, ProxyResult
from ddray.ranking.spaces import NasSpace, get_space, owners, parse_indices
from ddray.ranking.sweep import (
    NasConfig,
    NasOptions,
    Sweep,
    choose_architectures,
    run_sweep,
    split_for,
)
from ddray.ranking.truth import Truth, read_scores, read_truth
from ddray.runs.executor import Executor
from ddray.runs.ledger import Row
from ddray.system.files import write_atomically, write_text

_NO_TEST = "truth_test_accuracy"


def describe(space_name: str, text: str) -> ArchList:
    """Return index, parameters and FLOPs (millions) and choices of each architecture.

    Args:
        space_name: one of `space_names()`.
        text: `all`, or comma-separated indices.

    Raises:
        InputError: an unknown space or index.
    """
    space = get_space(space_name)
    return ArchList(archs=[space.describe(index) for index in parse_indices(text, space)])


def check_modes(options: Mapping[str, Any]) -> None:
    """Refuse an unknown space or executor, and options that would be ignored.

    Raises:
        InputError: names the first of them.
    """
    get_space(options.get("space", NasOptions().space))
    for name, names in (("executor", ("ray", "local")), ("pixel_space", get_args(PixelKind))):
        if options.get(name, names[0]) not in names:
            raise unknown("--" + name.replace("_", "-"), str(options[name]), names)
    if options.get("executor") == "local":
        _refuse(
            options,
            ("unit_timeout", "num_workers", "address"),
            "with --executor local, which runs unit after unit and waits for each",
        )
    if options.get("scores") is not None:
        _refuse(options, ("proxies", "baselines", "compat", "sets"), "with --scores, which trains nothing")
    elif not options.get("proxies"):
        raise InputError("ddray nas needs --proxy FILE (or --describe, or --scores FILE.csv)")


def _refuse(options: Mapping[str, Any], names: Sequence[str], context: str) -> None:
    """Refuse options that are set."""
    fields = NasOptions.model_fields | NasRequest.model_fields | NasModes.model_fields
    for name in names:
        option = option_name(name, fields[name])
        value = options.get(name, options.get(option))
        if value not in (None, [], ()):
            text = value if isinstance(value, str | int | float) else ", ".join(map(str, value))
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
    truth = read_truth(options, space, indices)
    figures = figures_of_merit(
        scores[None],
        truth.values,
        storage_images=0,
        wall_s=time.perf_counter() - begin,
        chance=None,
        seed=options.seed,
    )
    proxy = ProxyResult.parse({"proxy": path.name, **figures})
    return NasResult(space=options.space, num_archs=len(indices), proxies=[proxy])


def prepare(request: NasRequest, options: NasOptions, config: NasConfig, *, can_grow: bool = False) -> Sweep:
    """Check a request and return its sweep; nothing is trained but the networks of coreset methods.

    Raises:
        InputError: a file, a name or a number is invalid.
    """
    check_compat(request.compat, options.space)
    if options.executor == "local" and options.gpus_per_worker > 0 and not torch.cuda.is_available():
        raise InputError(
            "--gpus-per-worker must be 0 with --executor local where torch sees no GPU, "
            f"got {options.gpus_per_worker:g}"
        )
    named = None if request.dataset is None else _open(request.dataset, request)
    space = foreign_space(named, request.pixel_space)
    sets = [load(path, dataset=named, pixel_space=space) for path in request.proxies]
    dataset = named or _open(sets[0].meta.dataset, request)
    for path, distilled in zip(request.proxies, sets, strict=True):
        check_fits(distilled, dataset, path)
    indices = choose_architectures(options, config, dataset)
    train, val = split_for(dataset, options.seed)
    files = file_proxies(request.proxies, sets)
    warn_of_seen_val(request.proxies, sets, str(SplitName(options.seed)))
    baselines = baseline_proxies(
        request.baselines,
        files,
        dataset,
        train,
        config,
        seed=options.seed,
        device=torch.device("cpu"),
    )
    proxies = (*files, *baselines)
    if request.compat:
        faults = get_definition(options.space).harnesses[request.compat]
        proxies = (*proxies, *harness_variants(proxies, faults))
    check_names(proxies)
    device = "cuda" if options.gpus_per_worker > 0 else "cpu"
    return Sweep(options, config, dataset, train, val, proxies, indices, device, can_grow=can_grow)


def check_compat(compat: str | None, space: str) -> None:
    """Check that a harness is known and applies to the space.

    Raises:
        InputError: the harness is unknown or does not apply; names the valid ones.
    """
    if compat is None or compat in get_definition(space).harnesses:
        return
    if spaces := owners(lambda definition: compat in definition.harnesses):
        raise InputError(f"--compat {compat} needs --space {spaces}, got {space}")
    harnesses = {name for other in space_names() for name in get_definition(other).harnesses}
    raise unknown("--compat", compat, harnesses)


def _open(name: str, request: NasRequest) -> Dataset:
    return open_dataset(name, data_dir=request.data_dir, download=request.download)


def run_nas(
    request: NasRequest,
    options: NasOptions,
    config: NasConfig,
    executor: Executor,
    *,
    run_dir: Path | None,
    resume: bool,
    can_grow: bool = False,
) -> NasResult:
    """Train architectures on proxies, rank them, compare with the truth, and write table, plots and page.

    Args:
        request: the proxies.
        options: the options.
        config: how architectures are trained.
        executor: runs the units.
        run_dir: the run's folder; None creates a numbered one.
        resume: continue the run in the folder.
        can_grow: whether a resumed sweep may have other proxies than before.

    Raises:
        InputError: any invalid input.
        DdrayError: no architecture finished on any proxy (table, plots and page are still written).
    """
    begin = time.perf_counter()
    sweep = prepare(request, options, config, can_grow=can_grow)
    truth = None
    if options.truth != "whole":  # read before anything is trained
        truth = read_truth(options, sweep.space(), sweep.indices)
    run, rows = run_sweep(sweep, executor, run_dir=run_dir, resume=resume)
    ranking = collect(sweep, rows, truth)
    result = NasResult.parse(
        {
            "space": options.space,
            "dataset": sweep.dataset.name,
            "num_archs": len(sweep.indices),
            "num_failed": sum(row.status == "failed" for row in rows),
            "run_dir": str(run.folder),
            "truth": ranking.truth_facts,
            "proxies": ranking.proxies,
            "wall_s": time.perf_counter() - begin,
        }
    )
    _write(run.folder, result, ranking.table)
    if not any(figures["num_archs"] for figures in ranking.proxies):
        raise DdrayError(_why_nothing(run.folder, rows))
    return result


def _why_nothing(folder: Path, rows: Sequence[Row]) -> str:
    """Return why no architecture of a sweep has both a score and a truth."""
    reasons = sorted({row.error or "unknown" for row in rows if row.status == "failed"})
    return (
        f"at least one architecture must finish on a proxy and have a truth, none does in {folder}: "
        f"{'; '.join(reasons) or 'the truth has none of them'}; try smaller ones with --max-mflops"
    )


@dataclass(frozen=True)
class SweepResults:
    """Results computed from a sweep's rows.

    Attributes:
        proxies: figures of merit, one mapping per proxy.
        table: one line per proxy and architecture; test appears in the last column only.
        truth_facts: source of the truth; for a trained one also seconds, images and number diverged.
    """

    proxies: list[dict[str, Any]]
    table: pd.DataFrame
    truth_facts: dict[str, Any]


def collect(sweep: Sweep, rows: Sequence[Row], truth: Truth | None) -> SweepResults:
    """Return the figures and the table for a sweep's rows.

    Args:
        sweep: the sweep.
        rows: its rows.
        truth: truth from a file or table; None takes the `truth` rows.

    Returns:
        Figures and table; None and NaN for a proxy on which nothing finished.
    """
    columns = {index: column for column, index in enumerate(sweep.indices)}
    true_rows = [row for row in rows if row.kind == "truth"]
    facts: dict[str, Any] = {"source": sweep.options.truth}
    if truth is None:
        values = _matrix(true_rows, columns, "val_accuracy")
        test = _matrix(true_rows, columns, "test_accuracy")
        truth = Truth("whole", values, mean_over_seeds(test) if np.isfinite(test).any() else None)
        facts |= {
            "wall_s": sum(row.wall_s for row in true_rows),
            "storage_images": len(sweep.train),
            "num_diverged": _num_diverged(true_rows),
        }
    space = sweep.space()
    # A constant guess scores the share of val's largest class: more than 1/K if class sizes differ.
    chance = float(torch.bincount(sweep.val.labels).max()) / len(sweep.val)
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
        proxies.append({"proxy": proxy.name, **figures, "num_diverged": _num_diverged(proxy_rows)})
        tables.append(_table(proxy, space, sweep.indices, scores, truth))
    return SweepResults(proxies, pd.concat(tables, ignore_index=True), facts)


def _num_diverged(rows: Sequence[Row]) -> int:
    """Return the number of architectures that diverged for at least one seed."""
    return len({row.spec["index"] for row in rows if row.result.get("diverged")})


def _matrix(rows: Sequence[Row], columns: Mapping[int, int], name: str) -> np.ndarray[Any, Any]:
    """Return accuracies [S, A], NaN for failed or missing units."""
    seeds = sorted({row.spec["seed"] for row in rows})
    accuracies = np.full((max(1, len(seeds)), len(columns)), np.nan)
    for row in rows:
        value = row.result.get(name)
        if row.status == "done" and value is not None:
            accuracies[seeds.index(row.spec["seed"]), columns[row.spec["index"]]] = value
    return accuracies


def _table(
    proxy: Proxy, space: NasSpace, indices: Sequence[int], scores: np.ndarray[Any, Any], truth: Truth
) -> pd.DataFrame:
    """Return one line per architecture, the proxy's best first."""
    lines = []
    mean = mean_over_seeds(scores)
    true = mean_over_seeds(np.atleast_2d(truth.values))
    for column, index in enumerate(indices):
        seed_accuracies = [float(value) for value in scores[:, column] if np.isfinite(value)]
        described = {k: v for k, v in space.describe(index).items() if k not in ("index", "name")}
        lines.append(
            {
                "proxy": proxy.name,
                "index": index,
                "name": space.arch_name(index),
                **described,
                "proxy_accuracy": mean[column],
                "proxy_accuracy_std": statistics.stdev(seed_accuracies)
                if len(seed_accuracies) > 1
                else np.nan,
                "proxy_rank": np.nan,
                "truth_accuracy": true[column],
                "truth_rank": np.nan,
                "num_seeds": len(seed_accuracies),
                "failed": not seed_accuracies,
                _NO_TEST: np.nan if truth.test is None else truth.test[column],
            }
        )
    table = pd.DataFrame(lines)
    for name in ("proxy", "truth"):
        table[f"{name}_rank"] = table[f"{name}_accuracy"].rank(ascending=False, method="min")
    return table.sort_values(["proxy_rank", "index"], ignore_index=True)


def _write(folder: Path, result: NasResult, table: pd.DataFrame) -> None:
    """Write results.csv, results.parquet, the scatter plots and report.html."""
    from ddray.ranking.report import save_scatters, write_nas_report

    dumped = result.dump()
    write_text(folder / "results.csv", table.to_csv(index=False))
    write_atomically(folder / "results.parquet", lambda file: table.to_parquet(file, index=False))
    save_scatters(folder, table, dumped["proxies"])
    write_nas_report(folder, dumped, table)
