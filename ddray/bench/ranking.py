"""The NAS tables of a bench: its sets as the proxies of `ddray nas`, one sweep per dataset and size."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ddray.bench.units import Cell, Ranking
from ddray.bench.work import artifact_name
from ddray.data import Dataset
from ddray.files import storage_errors
from ddray.nas.proxies import check_baselines
from ddray.nas.rank import NasRequest, check_compat, rank_architectures
from ddray.nas.sweep import Execute, NasOptions, resolve_config
from ddray.report.published import compare, find, read_numbers

_FIGURES: Final = ("spearman", "spearman_top20", "kendall", "search_time", "storage_images")
_REQUEST: Final = ("baselines", "compat")


def nas_options(ranking: Ranking, more: Mapping[str, Any]) -> NasOptions:
    """Return the sweep's options.

    Args:
        ranking: whose `evaluate.options` they are.
        more: executor and resources.

    Raises:
        InputError: `ddray nas` has no such option, or a value is bad.
    """
    own = {k: v for k, v in ranking.evaluate.options.items() if k not in _REQUEST}
    return NasOptions.parse({**own, **more}, prefix="evaluate.options.")


def check_ranking(ranking: Ranking, options: NasOptions, dataset: Dataset) -> None:
    """Refuse what the sweep would refuse once its sets are distilled.

    Raises:
        InputError: a baseline or `compat` is bad.
    """
    held = ranking.evaluate.options
    check_baselines(tuple(held.get("baselines", ())), dataset)
    check_compat(held.get("compat"), options.space)


def sweep_folder(ranking: Ranking, options: NasOptions, run_dir: Path) -> Path:
    """Return the folder of a sweep's own run, below the bench's."""
    kind, size = ranking.sets[0][0].size
    return run_dir / "nas" / f"{_slug(ranking.dataset)}-{kind}{size}-{options.space}-{ranking.number}"


def rank_sets(
    ranking: Ranking,
    options: NasOptions,
    execute: Execute,
    *,
    run_dir: Path,
    has_set: Callable[[str], bool],
    data_dir: Path | None,
) -> list[dict[str, Any]]:
    """Rank architectures on every set that is there; return one cell per row.

    Args:
        ranking: the sets.
        options: the sweep's.
        execute: runs its tasks.
        run_dir: the bench's folder; the sweep is a run of its own below `nas/`.
        has_set: whether a set was distilled.
        data_dir: where datasets are; None is $DDRAY_DATA.

    Raises:
        InputError: an option is bad.
        DdrayError: no architecture finished.
    """
    folder = sweep_folder(ranking, options, run_dir)
    files: list[Path] = []
    owners: list[int] = []
    names = [_slug(cell.method) for cell, _ in ranking.sets]
    for place, (_, keys) in enumerate(ranking.sets):
        # Labels that differ in what a file's name can't hold are told apart by their place.
        own = names[place] if names.count(names[place]) == 1 else f"{names[place]}-row{place}"
        for number, key in enumerate(keys):
            if has_set(key):
                named = folder.with_name(f"{folder.name}-sets") / f"{own}-{number}.pt"
                _link(run_dir / artifact_name(key), named)
                files.append(named)
                owners.append(place)
    if not files:
        return []
    held = ranking.evaluate.options
    request = NasRequest(
        proxies=tuple(files),
        baselines=tuple(held.get("baselines", ())),
        compat=held.get("compat"),
        dataset=ranking.dataset,
        data_dir=data_dir,
        can_grow=True,  # a set that failed may be there when the bench is continued
    )
    found = rank_architectures(
        request, options, resolve_config(options), execute, run_dir=folder, resume=True
    )
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for place, figures in zip(owners, found["proxies"], strict=False):  # baselines stand behind the sets
        grouped.setdefault(place, []).append(figures)
    cells = [cell_of(ranking.sets[place][0], figures) for place, figures in grouped.items()]
    return cells + [
        cell_of(_baseline(ranking, one["proxy"]), [one]) for one in found["proxies"][len(files) :]
    ]


def _baseline(ranking: Ranking, proxy: str) -> Cell:
    """Return the cell of a proxy that the sweep adds to the sets, such as `early-stopping (150 steps)`."""
    name = proxy if "[" in proxy else proxy.partition(" (")[0].replace("-", "_")  # [bug]: of no paper
    first = ranking.sets[0][0]
    return replace(first, method=proxy, name=name, source=first.source.model_copy(update={"method": name}))


def cell_of(cell: Cell, figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row's cell: means over its sets; accuracy is the truth of what the proxy ranks first."""
    kind, size = cell.size
    values = [float(one["top1_truth_accuracy"]) for one in figures if one["top1_truth_accuracy"] is not None]
    std = statistics.stdev(values) if len(values) > 1 else None
    held: dict[str, Any] = {
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
        known = [value for one in figures if (value := _figure(one, name)) is not None]
        held[name] = statistics.fmean(known) if known else None
        number = find(numbers, cell, name)
        if number is not None:
            held[f"published_{name}"] = number.value
    number = find(numbers, cell)
    if number is not None and values:
        held["published"] = compare(number, held["accuracy_mean"], held["standard_error"])
    return held


def _figure(figures: Mapping[str, Any], name: str) -> float | None:
    """Return one figure of a proxy; `search_time` as the papers give it, in minutes."""
    value = figures.get("wall_s" if name == "search_time" else name)
    return None if value is None else float(value) / (60 if name == "search_time" else 1)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", Path(text).name).strip("-")


def _link(source: Path, target: Path) -> None:
    """Give a set a name that the sweep's tables can show; one that was made again replaces the old one."""
    with storage_errors(target):
        if target.exists() and filecmp.cmp(source, target, shallow=False):
            return
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
