"""Whether a cell is set beside a published number: only like with like.

That is, if dataset, resolution, protocol, teacher, network and number of images are the paper's, and nothing
cuts or changes what the method's preset does; else the cell says what differs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ddray.data.catalog import KNOWN
from ddray.data.reference import DatasetRef
from ddray.evaluation.published import Conditions, Number, conditions_of
from ddray.nets.names import parse_arch
from ddray.tables.published import (
    TOP1,
    WITHOUT_SIZE,
    find,
    has_teachers,
    is_called,
    method_names,
    metric_of,
    network_names,
    published_name,
    same_size,
    same_teacher,
    teacher_of,
)
from ddray.tables.units import Cell

_LAST_CHANNELS: Final = 512  # of KRR-ST's networks, which the linear probe of Boost-SSDD trains


@dataclass(frozen=True)
class Likeness:
    """What a cell is set beside, or why it is not."""

    number: Number | None  # of the cell's method, dataset, size, teacher and network
    differs: tuple[str, ...]  # what is not as in the paper

    @property
    def compared(self) -> Number | None:
        """The number that the cell is set beside."""
        return None if self.differs else self.number


def likeness(numbers: Sequence[Number], cell: Cell) -> Likeness:
    """Return what a cell is set beside, or why it is not.

    A cell without a number of its network, teacher or size differs from its method's in the table that it
    names. Where there are none, and where it names no table, it is neither.
    """
    number = find(numbers, cell)
    reasons = list(_nearest(numbers, cell) if number is None else _conditions(number, cell))
    if number is not None or reasons:
        reasons += cell.changes
    return Likeness(number, tuple(reasons))


def described(number: Number) -> dict[str, Any]:
    """Return a published number as JSON: what it is of, and the value as printed."""
    names = ("paper", "table", "method", "dataset", "target", "ipc", "budget", "arch", "teacher", "setting")
    fields = {name: getattr(number, name) for name in names}
    values = {"value": number.value, "std": number.std, "unit": number.unit}
    return {**{name: value for name, value in fields.items() if value not in ("", None)}, **values}


def _conditions(number: Number, cell: Cell) -> Iterator[str]:
    """Yield which of a number's conditions are not the cell's."""
    stated = conditions_of(number)
    if not _is_protocol(cell.protocol, stated.protocol):
        yield f"protocol {cell.protocol}, theirs {stated.protocol}"
    if stated.space not in (None, cell.arch):
        yield f"space {cell.arch}, theirs {stated.space}"
    yield from _image_conditions(number, cell, stated)
    yield from _teacher_conditions(number, cell, stated)
    if number.arch and not _is_their_convnet(cell, stated):
        norm = (
            f"batch norm, {_LAST_CHANNELS} channels at last"
            if stated.protocol == "linear"
            else f"{stated.norm} norm"
        )
        yield f"network {cell.arch}, theirs {number.arch} with {norm}"
    if unstated := [*stated.unstated, *_blanks(number, stated)]:
        yield f"not stated in the paper: {', '.join(unstated)}"


def _is_protocol(protocol: str, theirs: str) -> bool:
    """Return whether accuracies are of the paper's protocol, as those of `robust` are of `hard`."""
    if {"nas", "steps"} & {protocol, theirs}:
        return protocol == theirs
    return metric_of(protocol) == metric_of(theirs) and has_teachers(protocol) == has_teachers(theirs)


def _image_conditions(number: Number, cell: Cell, stated: Conditions) -> Iterator[str]:
    """Yield a resolution, and a number of images, that are not the paper's."""
    base = DatasetRef.parse(cell.dataset).base
    pixels = stated.pixels.get(base) or (max(KNOWN[base].shape[1:]) if base in KNOWN else None)
    if cell.image_size is not None and pixels not in (None, cell.image_size):
        yield f"resolution {cell.image_size} px, theirs {pixels} px"
    if number.method in stated.counts_images and cell.num_images not in (None, number.budget):
        yield f"{cell.num_images} images, theirs {number.budget}"


def _teacher_conditions(number: Number, cell: Cell, stated: Conditions) -> Iterator[str]:
    """Yield teachers that are not the paper's: of the labels, where the table names none, and of the sets."""
    theirs = number.teacher or stated.teacher
    if theirs is None or not (has_teachers(cell.protocol) and has_teachers(stated.protocol)):
        return
    if not number.teacher and not is_called(teacher_of(cell), theirs):
        yield f"teacher {teacher_of(cell)}, theirs {theirs}"
    if cell.distilled_with is not None and not is_called(cell.distilled_with, theirs):
        yield f"distilled with {cell.distilled_with}, theirs with {theirs}"


def _is_their_convnet(cell: Cell, stated: Conditions) -> bool:
    """Return whether a ConvNet has the paper's norm and width, or is the one of the distillation."""
    if cell.protocol == "nas" or not cell.arch.startswith("convnet"):
        return True
    arch = parse_arch(cell.arch)
    if stated.protocol == "linear":
        channels = arch.width * 2 ** (arch.depth - 1)
        return arch.doubling and arch.norm == "batch" and channels == _LAST_CHANNELS
    is_plain = not arch.doubling and stated.norm in (None, arch.norm)
    return is_plain or cell.arch == cell.distilled_in


def _blanks(number: Number, stated: Conditions) -> Iterator[str]:
    """Yield what a table leaves open of a number."""
    if not number.dataset:
        yield "the dataset"
    if number.method not in WITHOUT_SIZE and number.ipc is None and number.budget is None:
        yield "the number of images"
    if not number.arch and stated.space is None:
        yield "the network"


def _nearest(numbers: Sequence[Number], cell: Cell) -> Iterator[str]:
    """Yield how a cell differs from the accuracies that its table has of its method."""
    source = cell.source
    near = [
        number
        for number in numbers
        if number.method in method_names(cell)
        and "accuracy" in number.metric
        and source.paper in (None, number.paper)
        and source.table in (None, number.table)
        and source.setting in (None, number.setting)
    ]
    if not near or (source.paper is None and source.table is None):
        return
    for ours, theirs, is_alike in _aspects(cell):
        alike = list(filter(is_alike, near))
        if not alike:
            yield f"{ours}, theirs {_listed(map(theirs, near))}"
        near = alike or near


def _aspects(
    cell: Cell,
) -> Iterator[tuple[str, Callable[[Number], object], Callable[[Number], bool]]]:
    """Yield what numbers are looked up by: the cell's in words, a number's, and whether they agree."""
    dataset, target = published_name(cell.dataset), published_name(cell.target)
    metric, archs = metric_of(cell.protocol) or TOP1, ("", *network_names(cell.arch))
    yield f"protocol {cell.protocol}", lambda n: conditions_of(n).protocol, lambda n: n.metric == metric
    yield f"dataset {dataset}", lambda n: n.dataset, lambda n: n.dataset in ("", dataset)
    if target != dataset:
        yield (
            f"scored on {target}",
            lambda n: n.target or n.dataset,
            lambda n: (n.target or n.dataset) == target,
        )
    yield f"{cell.size[0]} {cell.size[1]}", _size_text, lambda n: same_size(n, cell)
    if has_teachers(cell.protocol):
        yield f"teacher {teacher_of(cell)}", lambda n: n.teacher, lambda n: same_teacher(n, cell)
    yield f"network {cell.arch}", lambda n: n.arch, lambda n: n.arch in archs


def _size_text(number: Number) -> str:
    return f"{number.budget} images" if number.ipc is None else f"ipc {number.ipc}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))
