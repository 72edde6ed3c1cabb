"""The NAS tables of a bench: its sets as the proxies of `ddray nas`, one sweep per dataset and size."""

import filecmp
import os
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ddray.data import Dataset
from ddray.evaluation.published import read_numbers
from ddray.ranking.command import check_compat, run_nas
from ddray.ranking.options import NasRequest
from ddray.ranking.proxies import check_baselines
from ddray.ranking.sweep import NasOptions, resolve_config
from ddray.runs.executor import Executor
from ddray.system.files import storage_errors
from ddray.tables.published import compare, find
from ddray.tables.units import Cell, SweepSpec
from ddray.tables.worker import artifact_name

_FIGURES: Final = ("spearman", "spearman_top20", "kendall", "search_time", "storage_images")
_REQUEST: Final = ("baselines", "compat")


def nas_options(sweep: SweepSpec, resources: Mapping[str, Any]) -> NasOptions:
    """Return the sweep's options.

    Args:
        sweep: the sweep; the options are from its `evaluate.options`.
        resources: executor and resources.

    Raises:
        InputError: `ddray nas` has no such option, or a value is bad.
    """
    sweep_options = {k: v for k, v in sweep.evaluate.options.items() if k not in _REQUEST}
    return NasOptions.parse({**sweep_options, **resources}, prefix="evaluate.options.")


def check_sweep(sweep: SweepSpec, options: NasOptions, dataset: Dataset) -> None:
    """Refuse now what the sweep would refuse after its sets are distilled.

    Raises:
        InputError: a baseline or `compat` is bad.
    """
    evaluation_options = sweep.evaluate.options
    check_baselines(tuple(evaluation_options.get("baselines", ())), dataset)
    check_compat(evaluation_options.get("compat"), options.space)


def sweep_folder(sweep: SweepSpec, options: NasOptions, run_dir: Path) -> Path:
    """Return the folder of a sweep's own run, below the bench's."""
    kind, size = sweep.sets[0][0].size
    return run_dir / "nas" / f"{_slug(sweep.dataset)}-{kind}{size}-{options.space}-{sweep.evaluation_index}"


def score_sweep(
    sweep: SweepSpec,
    options: NasOptions,
    executor: Executor,
    *,
    run_dir: Path,
    has_set: Callable[[str], bool],
    data_dir: Path | None,
) -> list[dict[str, Any]]:
    """Rank architectures on every distilled set; return one cell per row.

    Args:
        sweep: the sets.
        options: the sweep's options.
        executor: runs its tasks.
        run_dir: the bench's folder; the sweep is a run of its own below `nas/`.
        has_set: returns whether a set was distilled.
        data_dir: where datasets are; None is $DDRAY_DATA.

    Raises:
        InputError: an option is bad.
        DdrayError: no architecture finished.
    """
    folder = sweep_folder(sweep, options, run_dir)
    owners = _linked_sets(sweep, folder, run_dir, has_set)
    if not owners:
        return []
    evaluation_options = sweep.evaluate.options
    request = NasRequest(
        proxies=tuple(owners),
        baselines=tuple(evaluation_options.get("baselines", ())),
        compat=evaluation_options.get("compat"),
        dataset=sweep.dataset,
        data_dir=data_dir,
    )
    result = run_nas(
        request,
        options,
        resolve_config(options),
        executor,
        run_dir=folder,
        resume=True,
        can_grow=True,  # a failed set may exist when the bench is resumed
    )
    proxies = [proxy.dump() for proxy in result.proxies]
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for row_index, figures in zip(owners.values(), proxies, strict=False):  # baselines follow the sets
        grouped.setdefault(row_index, []).append(figures)
    cells = [cell_of(sweep.sets[row_index][0], figures) for row_index, figures in grouped.items()]
    return cells + [
        cell_of(_baseline(sweep, baseline["proxy"]), [baseline]) for baseline in proxies[len(owners) :]
    ]


def _linked_sets(
    sweep: SweepSpec, folder: Path, run_dir: Path, has_set: Callable[[str], bool]
) -> dict[Path, int]:
    """Link the sets that were distilled under readable names; return each file with its row's index."""
    rows: dict[Path, int] = {}
    names = [_slug(cell.method) for cell, _ in sweep.sets]
    for row_index, (_, keys) in enumerate(sweep.sets):
        # Labels that make the same file name are told apart by their row index.
        name = names[row_index]
        file_stem = name if names.count(name) == 1 else f"{name}-row{row_index}"
        for seed_index, key in enumerate(keys):
            if has_set(key):
                proxy_file = folder.with_name(f"{folder.name}-sets") / f"{file_stem}-{seed_index}.pt"
                _link(run_dir / artifact_name(key), proxy_file)
                rows[proxy_file] = row_index
    return rows


def _baseline(sweep: SweepSpec, proxy: str) -> Cell:
    """Return the cell of a proxy that the sweep adds to the sets, such as `early-stopping (150 steps)`."""
    # Names with [...] are not in any paper.
    name = proxy if "[" in proxy else proxy.partition(" (")[0].replace("-", "_")
    first = sweep.sets[0][0]
    return replace(first, method=proxy, name=name, source=first.source.model_copy(update={"method": name}))


def cell_of(cell: Cell, figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row's cell: means over its sets; the accuracy is the top-ranked architecture's true one."""
    kind, size = cell.size
    values = [float(one["top1_truth_accuracy"]) for one in figures if one["top1_truth_accuracy"] is not None]
    std = statistics.stdev(values) if len(values) > 1 else None
    scored_cell: dict[str, Any] = {
        "method": cell.method,
        "dataset": cell.dataset,
        kind: size,
        "arch": cell.arch,
        "protocol": "nas",
        **({} if cell.settings is None else {"settings": cell.settings}),
        "accuracy_mean": statistics.fmean(values) if values else None,
        "accuracy_std": std,
        "n": len(values),
        "num_sets": len(figures),
        "num_archs": min(int(one["num_archs"]) for one in figures),
        "standard_error": None if std is None else std / len(values) ** 0.5,
    }
    numbers = read_numbers()
    for name in _FIGURES:
        figure_values = [value for one in figures if (value := _figure(one, name)) is not None]
        scored_cell[name] = statistics.fmean(figure_values) if figure_values else None
        published_number = find(numbers, cell, name)
        if published_number is not None:
            scored_cell[f"published_{name}"] = published_number.value
    published_number = find(numbers, cell)
    if published_number is not None and values:
        scored_cell["published"] = compare(
            published_number, scored_cell["accuracy_mean"], scored_cell["standard_error"]
        )
    return scored_cell


def _figure(figures: Mapping[str, Any], name: str) -> float | None:
    """Return one figure of a proxy; `search_time` in minutes, as in the papers."""
    value = figures.get("wall_s" if name == "search_time" else name)
    return None if value is None else float(value) / (60 if name == "search_time" else 1)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", Path(text).name).strip("-")


def _link(source: Path, target: Path) -> None:
    """Link a set under a readable name for the sweep's tables; a set distilled again replaces the old one."""
    with storage_errors(target):
        if target.exists() and filecmp.cmp(source, target, shallow=False):
            return
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)
