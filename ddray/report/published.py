"""The papers' 950 published numbers (reports/published.csv), and ours beside them in standard errors.

docs/published.md has the conventions, the doubtful cells and the papers' own contradictions.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ddray.shipped import shipped

# Names of ours that a paper calls otherwise, the likeliest first.
_ARCHS: Final = {
    "mobilenet_v2": ("mobilenet_v2", "mobilenet"),
    "vit_tiny": ("vit_tiny", "vit"),
    "densenet_cifar": ("densenet121",),
    "convnet3": ("convnet3", "convnet", "convnet_w128"),
    "resnet10_ap": ("resnet_ap10",),
}
_METHODS: Final = {
    "mmd_pixel": ("mmd_pixel", "mmd"),
    "random_ssl": ("random_ssl", "random"),
    "kmeans_ssl": ("kmeans_ssl", "kmeans"),
}
_METRICS: Final = {"linear": "linear_probe_accuracy", "nas": "nas_top1_accuracy"}
# Protocols with a metric of their own; `robust` reports the accuracy of `hard` beside its scores.
_PROTOCOLS: Final = ("hard", "soft", "robust", *_METRICS)
# All other tables of D3HR are of soft labels (its Sec 5.1), also where they name no teacher.
_HARD_D3HR: Final = ("Table 5",)
# Rows that train on the whole dataset: they have no size, whatever the table's other rows have.
_WHOLE: Final = ("early_stopping", "whole")
# Figures of a cell beside its accuracy, as tables for people head them.
FIGURES: Final = {
    "lrs": "LRS",
    "ars": "ARS",
    "spearman": "Spearman",
    "published_spearman": "published Spearman",
    "spearman_top20": "Spearman, top 20 %",
    "published_spearman_top20": "published, top 20 %",
    "search_time": "search, minutes",
    "published_search_time": "published minutes",
    "storage_images": "images",
    "published_storage_images": "published images",
}
_DEFAULT_TEACHER: Final = "resnet18"
# Runs behind a published mean, where the paper says so; a mean of an unknown number counts as one run.
_RUNS: Final = {"boost_ssdd": 3, "dsdm": 5}


class Wanted(Protocol):
    """What a number is looked up by: a cell of a bench."""

    @property
    def name(self) -> str:
        """The method's name."""

    @property
    def dataset(self) -> str:
        """What was distilled."""

    @property
    def num_classes(self) -> int:
        """Of that dataset."""

    @property
    def size(self) -> tuple[str, int]:
        """(`ipc` or `budget`, value)."""

    @property
    def protocol(self) -> str:
        """How it was scored."""

    @property
    def arch(self) -> str:
        """Canonical name of the network."""

    @property
    def target(self) -> str:
        """The dataset scored on."""

    @property
    def teacher(self) -> str | None:
        """Of the protocol `soft`."""

    @property
    def source(self) -> Any:
        """`ddray.bench.spec.Source`: paper, table, method, setting, each None for any."""


@dataclass(frozen=True)
class Number:
    """One published number, as printed.

    Attributes:
        paper: datadam, dsdm, boost_ssdd or d3hr.
        table: such as `Table 3`.
        dataset: the set distilled.
        target: the set scored on, where the table has several.
        method: the paper's row.
        ipc: images per class; None where the paper counts otherwise.
        budget: images of storage.
        arch: the evaluated network; "" where it is not stated.
        teacher: of soft labels or target representations; "" where there is none.
        metric: such as `top1_accuracy`.
        setting: what else the row or column says.
        value: the number.
        std: its standard deviation.
        unit: percent, fraction, images, minutes, ...
    """

    paper: str
    table: str
    dataset: str
    target: str
    method: str
    ipc: int | None
    budget: int | None
    arch: str
    teacher: str
    metric: str
    setting: str
    value: float
    std: float | None
    unit: str


@functools.cache
def read_numbers() -> tuple[Number, ...]:
    """Return all published numbers, in the file's order."""
    with shipped("reports", "published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Number(
                paper=row["paper"],
                table=row["table"],
                dataset=row["dataset"],
                target=row["target_dataset"],
                method=row["method"],
                ipc=int(row["ipc"]) if row["ipc"] else None,
                budget=int(row["budget_images"]) if row["budget_images"] else None,
                arch=row["arch"],
                teacher=row["teacher"],
                metric=row["metric"],
                setting=row["setting"],
                value=float(row["value"]),
                std=float(row["std"]) if row["std"] else None,
                unit=row["unit"],
            )
            for row in csv.DictReader(file)
        )


def find(numbers: Sequence[Number], wanted: Wanted, metric: str | None = None) -> Number | None:
    """Return the published number of a cell, or None; of its protocol's own metric, or of another.

    Without a `setting` in the cell's source the number without one wins, then the likelier name of the
    network, then the first in the file's order. Without a `table` only numbers of the cell's own protocol are
    taken.
    """
    source = wanted.source
    methods = (source.method,) if source.method else _METHODS.get(wanted.name, (wanted.name,))
    found = [
        number
        for number in numbers
        if number.method in methods
        and number.metric == (metric or _METRICS.get(wanted.protocol, "top1_accuracy"))
        and number.dataset in ("", wanted.dataset)
        and (number.target or number.dataset or wanted.target) == wanted.target
        and number.arch in ("", *_arch_names(wanted.arch))
        and _same_size(number, wanted)
        and _same_teacher(number, wanted)
        and source.paper in (None, number.paper)
        and source.table in (None, number.table)
        and source.setting in (None, number.setting)
    ]
    # A number that says nothing of dataset or arch is of an ablation: it is taken only when it is asked for.
    if source.table is None:
        found = [number for number in found if number.dataset and number.arch]
        found = [number for number in found if _same_protocol(number, wanted)]
    names = ("", *_arch_names(wanted.arch))
    return min(found, key=lambda number: (bool(number.setting), names.index(number.arch)), default=None)


def _arch_names(arch: str) -> tuple[str, ...]:
    """Return what papers may call a network: ConvNets by their depth, whatever the norm and doubling."""
    base, *suffixes = arch.split("_")
    if base.startswith("convnet") and ("x2" in suffixes or set(suffixes) <= {"bn"}):
        return _ARCHS.get(base, (base,))
    return _ARCHS.get(arch, (arch,))


def _same_size(number: Number, wanted: Wanted) -> bool:
    """Return whether the sizes agree; ipc k of K classes is a budget of k * K images."""
    kind, size = wanted.size
    if number.method in _WHOLE:
        return wanted.source.table is not None
    if number.ipc is None and number.budget is None:
        return wanted.source.table is not None
    if kind == "ipc":
        return number.ipc == size or (number.ipc is None and number.budget == size * wanted.num_classes)
    return number.budget == size


def _same_protocol(number: Number, wanted: Wanted) -> bool:
    """Return whether a number was scored as the cell was; what no paper scored so has none."""
    if wanted.protocol not in _PROTOCOLS:
        return False
    if wanted.protocol in _METRICS:  # the metric says it
        return True
    soft = number.paper == "d3hr" and number.table not in _HARD_D3HR
    return soft == (wanted.protocol == "soft") and (not soft or bool(number.teacher))


def _same_teacher(number: Number, wanted: Wanted) -> bool:
    """Return whether the soft labels are of the same teacher; other protocols have none to compare."""
    if wanted.protocol != "soft" or not number.teacher:
        return True
    teacher = wanted.teacher or _DEFAULT_TEACHER
    several = teacher.count("+") + 1
    if several > 1:
        return number.teacher == f"ensemble of {several}"
    return number.teacher in _ARCHS.get(teacher, (teacher,))


def compare(number: Number, mean: float, standard_error: float | None) -> dict[str, Any]:
    """Return a published accuracy as fractions, and ours minus it, also in standard errors.

    The error of the difference is sqrt(ours^2 + theirs^2). Theirs is std / sqrt(runs); a paper that does not
    state its runs counts as one, which makes the distance look smaller, never larger. A number without a
    printed deviation is not exact: it has no distance in standard errors.

    Args:
        number: what was published.
        mean: our accuracy.
        standard_error: of our mean; None if there is but one network.
    """
    scale = 0.01 if number.unit == "percent" else 1.0
    theirs = None if number.std is None else scale * number.std
    difference = mean - scale * number.value
    error = None
    if standard_error is not None and theirs is not None:
        error = (standard_error**2 + theirs**2 / _RUNS.get(number.paper, 1)) ** 0.5
    return {
        "accuracy_mean": scale * number.value,
        "accuracy_std": theirs,
        "paper": number.paper,
        "table": number.table,
        "difference": difference,
        "difference_se": difference / error if error else None,
    }
