"""The NAS tables of a bench: its sets as the proxies of `ddray nas`, one sweep per dataset and size."""

import filecmp
import os
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddray.data import Dataset
from ddray.evaluation.published import read_numbers
from ddray.jobs.preset import yaml_text
from ddray.ranking import get_definition
from ddray.ranking.command import check_compat, run_nas
from ddray.ranking.options import NasRequest
from ddray.ranking.proxies import check_baselines
from ddray.ranking.sweep import NasOptions, choose_architectures, resolve_config
from ddray.ranking.truth import with_column
from ddray.runs.executor import Executor
from ddray.runs.folder import Run
from ddray.system.files import storage_errors
from ddray.system.options import NumericOptions
from ddray.tables.likeness import likeness
from ddray.tables.options import BenchOptions
from ddray.tables.published import find
from ddray.tables.spec import BenchSpec, Limits
from ddray.tables.table import scored_cell, set_means
from ddray.tables.units import Cell, Graph, SweepSpec
from ddray.tables.worker import artifact_name

_FIGURES: Final = (
    *("spearman", "spearman_top20", "kendall", "search_time", "storage_images"),
    *("top1_truth_accuracy", "top1_test_accuracy"),
)
_REQUEST: Final = ("baselines", "compat")
_OF_SWEEP: Final = (
    *("dataset", "num_classes", "size", "protocol", "arch", "target", "augment", "settings", "image_size"),
)
"""Fields of a cell that do not depend on how its sets were distilled."""


@dataclass(frozen=True)
class NasSweep:
    """A sweep of the table with the options of its run, which is one of its own below the bench's."""

    spec: SweepSpec
    options: NasOptions

    @property
    def title(self) -> str:
        """What people read."""
        kind, size = self.spec.cells[0].size
        return f"nas sweep of {self.options.space}: {self.spec.dataset} {kind} {size}"

    @property
    def signature(self) -> dict[str, str]:
        """The keys by which the times of its units are compared with past ones."""
        return {"kind": "nas", "what": self.options.space, "which": self.spec.dataset}

    @property
    def differs(self) -> tuple[str, ...]:
        """What keeps the sweep's figures from being set beside the published ones of its space."""
        conditions = get_definition(self.options.space).published_options
        return tuple(
            f"{name} {yaml_text(ours)}, theirs {yaml_text(theirs)}"
            for name, theirs in conditions.items()
            if (ours := getattr(self.options, name)) != theirs
        )

    @property
    def cells(self) -> list[Cell]:
        """The cells of its sets, with what the sweep changes in the paper's conditions."""
        return [
            cell.model_copy(update={"changes": (*cell.changes, *self.differs)}) for cell in self.spec.cells
        ]

    def baseline(self, proxy: str) -> Cell:
        """Return the cell of a proxy that the sweep adds to the sets, such as `early-stopping (9 steps)`."""
        # Names with [...] are not in any paper.
        name = proxy if "[" in proxy else proxy.partition(" (")[0].replace("-", "_")
        first = self.spec.cells[0]
        source = first.source.model_copy(update={"method": name})
        shared = {field: getattr(first, field) for field in _OF_SWEEP}
        return Cell(**{**shared, "method": proxy, "name": name, "source": source, "changes": self.differs})

    @property
    def planned_cells(self) -> list[Cell]:
        """The cells of its sets and of its baselines."""
        return [*self.cells, *map(self.baseline, self.spec.baselines)]

    def folder(self, run_dir: Path) -> Path:
        """Return the folder of the sweep's run."""
        kind, size = self.spec.cells[0].size
        name = f"{_slug(self.spec.dataset)}-{kind}{size}-{self.options.space}-{self.spec.evaluation_index}"
        return run_dir / "nas" / name

    def num_trainings(self, dataset: Dataset) -> int:
        """Return how many networks the sweep trains on a dataset: on its proxies, and for the truth."""
        options = self.options
        archs = len(choose_architectures(options, resolve_config(options), dataset))
        proxies = len(self.spec.sets) + len(self.spec.baselines)
        truth = options.truth_seeds if options.truth == "whole" else 0
        return archs * (options.seeds * proxies + truth)


def resolve_sweeps(
    graph: Graph, spec: BenchSpec, options: BenchOptions, open_dataset: Callable[[str], Dataset]
) -> list[NasSweep]:
    """Return the NAS sweeps of a graph; what would be refused after their sets are distilled is refused now.

    Raises:
        InputError: an option, a baseline or `compat` is bad.
    """
    sweeps = []
    for sweep in graph.sweeps:
        nas_options = with_column(sweep_options(sweep, spec, options), sweep.dataset)
        check_baselines(sweep.baselines, open_dataset(sweep.dataset))
        check_compat(sweep.evaluate.options.get("compat"), nas_options.space)
        sweeps.append(NasSweep(sweep, nas_options))
    return sweeps


def sweep_options(sweep: SweepSpec, spec: BenchSpec, options: BenchOptions) -> NasOptions:
    """Return a sweep's options within the scale's limits, with the bench's executor and resources.

    Raises:
        InputError: `ddray nas` has no such option, or a value is bad.
    """
    values = {
        **{k: v for k, v in spec.set.items() if k in NumericOptions.model_fields},
        **{k: v for k, v in sweep.evaluate.options.items() if k not in _REQUEST},
        "seed": spec.seed,
        "executor": options.executor,
        "cpus_per_worker": options.cpus_per_unit,
        "gpus_per_worker": options.gpus,
        "num_workers": options.max_concurrent,
        "address": options.address,
        **({} if options.unit_timeout is None else {"unit_timeout": options.unit_timeout}),
    }
    return _within(NasOptions.parse(values, prefix="evaluate.options."), spec.limits)


def _within(options: NasOptions, limits: Limits) -> NasOptions:
    """Return a sweep's options within a scale's limits."""
    config, lower = resolve_config(options), {}
    for name, epochs in (("epochs", config.recipe.epochs), ("truth_epochs", config.truth_recipe.epochs)):
        if limits.epochs is not None and epochs > limits.epochs:
            lower[name] = limits.epochs
    for name in ("seeds", "truth_seeds"):
        if limits.networks is not None:
            lower[name] = min(getattr(options, name), limits.networks)
    # A size limit may leave fewer architectures than the sample.
    if limits.sample is not None and (options.sample is not None or options.max_mflops is None):
        lower["sample"] = min(options.sample or limits.sample, limits.sample)
    return options.model_copy(update=lower)


def score_sweep(
    sweep: NasSweep, executor: Executor, run: Run, *, data_dir: Path | None
) -> list[dict[str, Any]]:
    """Rank architectures on every distilled set of a bench's run; return one cell per row and baseline.

    Raises:
        InputError: an option is bad.
        DdrayError: no architecture finished.
    """
    folder = sweep.folder(run.folder)
    owners = _linked_sets(sweep.spec, folder, run)
    if not owners:
        return []
    result = run_nas(
        NasRequest(
            proxies=tuple(owners),
            baselines=sweep.spec.baselines,
            compat=sweep.spec.evaluate.options.get("compat"),
            dataset=sweep.spec.dataset,
            data_dir=data_dir,
        ),
        sweep.options,
        resolve_config(sweep.options),
        executor,
        run_dir=folder,
        resume=True,
        can_grow=True,  # a failed set may exist when the bench is resumed
    )
    proxies = [proxy.dump() for proxy in result.proxies]
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for row_index, figures in zip(owners.values(), proxies, strict=False):  # baselines follow the sets
        grouped.setdefault(row_index, []).append(figures)
    cells, row_of = sweep.cells, run.ledger.row
    return [
        *(cell_of(cells[index], each, set_means(cells[index], row_of)) for index, each in grouped.items()),
        *(cell_of(sweep.baseline(one["proxy"]), [one]) for one in proxies[len(owners) :]),
    ]


def _linked_sets(sweep: SweepSpec, folder: Path, run: Run) -> dict[Path, int]:
    """Link the sets that were distilled under readable names; return each file with its row's index."""
    rows: dict[Path, int] = {}
    names = [_slug(cell.method) for cell in sweep.cells]
    for row_index, (name, cell) in enumerate(zip(names, sweep.cells, strict=True)):
        # Labels that make the same file name are told apart by their row index.
        file_stem = name if names.count(name) == 1 else f"{name}-row{row_index}"
        for seed_index, key in enumerate(cell.sets):
            row = run.ledger.row(key)
            if row is not None and row.status == "done":
                proxy_file = folder.with_name(f"{folder.name}-sets") / f"{file_stem}-{seed_index}.pt"
                _link(run.folder / artifact_name(key), proxy_file)
                rows[proxy_file] = row_index
    return rows


def cell_of(
    cell: Cell, figures: Sequence[Mapping[str, Any]], of_sets: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return a row's cell: means over its sets of the figures of merit.

    The accuracy is the papers' performance: the top-ranked architecture's on test after training on the whole
    set. Where a truth has no test accuracies, it is the truth's own, which differs from the published ones.
    `of_sets` are means of what the sets' distillations measured.
    """
    means: dict[str, Any] = {"num_archs": min(int(one["num_archs"]) for one in figures), **(of_sets or {})}
    numbers = read_numbers()
    is_like = not likeness(numbers, cell).differs
    for name in _FIGURES:
        values = [value for one in figures if (value := _figure(one, name)) is not None]
        means[name] = statistics.fmean(values) if values else None
        published_number = find(numbers, cell, name) if is_like else None
        if published_number is not None:
            means[f"published_{name}"] = published_number.value
    ranked = [one for one in figures if one["top1_truth_accuracy"] is not None]
    tested = all(one.get("top1_test_accuracy") is not None for one in ranked)
    if not tested:
        cell = cell.model_copy(update={"changes": (*cell.changes, "the truth has no test accuracies")})
    accuracies = [one["top1_test_accuracy" if tested else "top1_truth_accuracy"] for one in ranked]
    return scored_cell(cell, [[value] for value in accuracies], num_sets=len(figures), **means)


def _figure(figures: Mapping[str, Any], name: str) -> float | None:
    """Return one figure of a proxy; `search_time` in minutes, as in the papers."""
    if name == "search_time":
        return None if figures.get("wall_s") is None else float(figures["wall_s"]) / 60
    return None if figures.get(name) is None else float(figures[name])


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
