"""The published number of a bench's cell, and the distance of ours from it in standard errors."""

import functools
from collections.abc import Sequence
from typing import Any, Final

from ddray.data.reference import DatasetRef
from ddray.evaluation import get_protocol, protocol_names
from ddray.evaluation.published import Number, conditions_of
from ddray.tables.units import Cell

# Our names and what papers call them, the likeliest first; () where papers mean another network by our name.
_ARCHS: Final[dict[str, tuple[str, ...]]] = {
    "mobilenet_v2": ("mobilenet_v2", "mobilenet"),
    "vit_tiny": ("vit_tiny", "vit"),
    "resnet10": (),
    "resnet10_idc": ("resnet10",),
    "densenet121": (),
    "densenet_idc": ("densenet121",),
    "convnet3": ("convnet3", "convnet_w128", "convnet"),
    "convnet3_bn": ("convnet3", "convnet"),
    "resnet10_ap": ("resnet_ap10",),
    "vgg11_tv": ("vgg11",),
}
_METHODS: Final = {
    "mmd_pixel": ("mmd_pixel", "mmd"),
    "random_ssl": ("random_ssl", "random"),
    "kmeans_ssl": ("kmeans_ssl", "kmeans"),
}
TOP1: Final = "top1_accuracy"
# Rows that train on the whole dataset and so have no size, unlike the other rows of their tables.
WITHOUT_SIZE: Final = ("early_stopping", "whole")
_DEFAULT_TEACHER: Final = "resnet18"
# Runs behind a published mean, where the paper states it; otherwise a mean counts as one run.
_RUNS: Final = {"boost_ssdd": 3, "dsdm": 5}


def find(numbers: Sequence[Number], cell: Cell, metric: str | None = None) -> Number | None:
    """Return the published number of a cell, or None.

    If the cell's source names no `setting`, a number without one wins, then the likelier name of the network,
    then the first in file order. If it names no `table`, only numbers of the cell's own protocol match. A
    `metric` is looked up instead of the protocol's own.
    """
    source, archs = cell.source, ("", *network_names(cell.arch))
    dataset, target = published_name(cell.dataset), published_name(cell.target)
    candidates = [
        number
        for number in numbers
        if number.method in method_names(cell)
        and number.metric == (metric or metric_of(cell.protocol) or TOP1)
        and number.dataset in ("", dataset)
        and (number.target or number.dataset or target) == target
        and number.arch in archs
        and same_size(number, cell)
        and same_teacher(number, cell)
        and source.paper in (None, number.paper)
        and source.table in (None, number.table)
        and source.setting in (None, number.setting)
    ]
    # A number without dataset or arch is from an ablation: it matches only if its table is named.
    if source.table is None:
        candidates = [n for n in candidates if n.dataset and n.arch and _same_protocol(n, cell)]
    return min(candidates, key=lambda number: (bool(number.setting), archs.index(number.arch)), default=None)


def published_name(name: str) -> str:
    """Return what papers call a dataset, in whatever size: with other labels or clips, its full name."""
    reference = DatasetRef.parse(name)
    return reference.base if reference.content().keys() <= {"can_flip", "image_size"} else name


def method_names(cell: Cell) -> tuple[str, ...]:
    """Return what papers may call a cell's method."""
    return (cell.source.method,) if cell.source.method else _METHODS.get(cell.name, (cell.name,))


@functools.cache
def metric_of(protocol: str) -> str | None:
    """Return the metric of a protocol's published accuracies; None if no paper has any."""
    if protocol == "nas":
        return "nas_top1_accuracy"
    return get_protocol(protocol).published_metric if protocol in protocol_names() else None


@functools.cache
def has_teachers(protocol: str) -> bool:
    """Return whether a protocol trains on soft labels."""
    return protocol in protocol_names() and "teachers" in get_protocol(protocol).options


def network_names(arch: str) -> tuple[str, ...]:
    """Return the names that papers may give a network; ConvNets match by depth, whatever the norm."""
    base, *suffixes = arch.split("_")
    if arch not in _ARCHS and base.startswith("convnet") and ("x2" in suffixes or set(suffixes) <= {"bn"}):
        return _ARCHS.get(base, (base,))
    return _ARCHS.get(arch, (arch,))


def same_size(number: Number, cell: Cell) -> bool:
    """Return whether the sizes match; ipc k of K classes equals a budget of k * K images."""
    kind, size = cell.size
    if number.method in WITHOUT_SIZE or (number.ipc is None and number.budget is None):
        return cell.source.table is not None
    if kind == "ipc":
        return number.ipc == size or (number.ipc is None and number.budget == size * cell.num_classes)
    return number.budget == size


def _same_protocol(number: Number, cell: Cell) -> bool:
    """Return whether number and cell have the same protocol; never for protocols that no paper reports."""
    metric = metric_of(cell.protocol)
    if metric != TOP1:  # the metric already decides
        return metric is not None
    soft = has_teachers(conditions_of(number).protocol)
    return soft == has_teachers(cell.protocol) and (not soft or bool(number.teacher))


def same_teacher(number: Number, cell: Cell) -> bool:
    """Return whether the soft labels come from the same teacher; true for other protocols."""
    if not has_teachers(cell.protocol) or not number.teacher:
        return True
    teacher = teacher_of(cell)
    if "+" in teacher:
        return number.teacher == f"ensemble of {teacher.count('+') + 1}"
    return is_called(teacher, number.teacher)


def teacher_of(cell: Cell) -> str:
    """Return who labels a cell's images softly."""
    return cell.teacher or _DEFAULT_TEACHER


def is_called(network: str, theirs: str) -> bool:
    """Return whether papers may call a network so."""
    return theirs in network_names(network)


def compare(number: Number, mean: float, standard_error: float | None) -> dict[str, Any]:
    """Return a published accuracy as fractions, and ours minus theirs, also in standard errors.

    The standard error of the difference is sqrt(ours^2 + theirs^2). Theirs is std / sqrt(runs); a paper that
    does not state its runs counts as one run, which makes the distance look smaller, never larger. A number
    printed without a deviation is not exact, so it gets no distance in standard errors; nor does the mean of
    a single network, whose `standard_error` is None.
    """
    scale = 0.01 if number.unit == "percent" else 1.0
    theirs = None if number.std is None else scale * number.std
    difference, error = mean - scale * number.value, None
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
