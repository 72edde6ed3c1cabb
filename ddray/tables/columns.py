"""The columns of a bench's table: one list for table.csv, the terminal and the report page."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ddray.drawing.text import percent, size_of
from ddray.evaluation import get_protocol, protocol_names
from ddray.ranking.figures_of_merit import is_telling

Entry = Mapping[str, Any]
"""A cell of the command's JSON."""


@dataclass(frozen=True)
class Column:
    """One column.

    `format` gets a cell that has a value, with what `_flat` adds; without it, the value is shown as is. The
    kind `name` tells what a row is, `setting` how it was evaluated, `number` what came out, and `remark` what
    to mind.
    """

    header: str  # its title for people
    name: str  # of its value, by which people sort, in a cell or in what `_flat` adds to it
    format: Callable[[Entry], str] | None = None  # the value as people read it
    kind: Literal["name", "setting", "number", "remark"] = "number"
    csv: tuple[str, ...] = ()  # names of its values in table.csv; what no column has follows by name
    note: Callable[[Entry], str] | None = None  # where the value is from

    def value(self, entry: Entry) -> Any:
        """Return a cell's value; None if the cell has none."""
        return _flat(entry).get(self.name)

    def text_of(self, entry: Entry) -> str:
        """Return a cell's text; `-` if it has no value."""
        flat = _flat(entry)
        if flat.get(self.name) is None:
            return "-"
        return str(flat[self.name]) if self.format is None else self.format(flat)


def _flat(entry: Entry) -> Entry:
    """Return a cell with its size, its published number and why it differs as values of their own."""
    flat = {**entry, "size": entry.get("ipc") or entry.get("budget")}
    flat.pop("compared", None)  # the published number, as printed
    if differs := flat.pop("differs", None):
        flat["differs"] = "; ".join(differs)
    if overridden := flat.pop("overridden", None):
        flat["overridden"] = ", ".join(overridden)
    if published := flat.pop("published", None):
        flat |= {
            "published": published["accuracy_mean"],
            "published_std": published["accuracy_std"],
            "published_source": f"{published['paper']}, {published['table']}",
            "difference": published["difference"],
            "difference_se": published["difference_se"],
        }
    return flat


def short(value: float) -> str:
    """Return a number with three digits; from 1000 on as a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _field(name: str, header: str | None = None, kind: Literal["name", "setting"] = "name") -> Column:
    return Column(header or name, name, kind=kind, csv=(name,))


def _figure(name: str, header: str, text: Callable[[float], str] = short, *, csv: bool = False) -> Column:
    return Column(header, name, lambda entry: text(entry[name]), csv=(name,) if csv else ())


_COLUMNS: Final = (
    _field("method"),
    _field("dataset"),
    _field("target", "scored on"),
    Column("size", "size", size_of, "name", csv=("ipc", "budget")),
    _field("protocol"),
    _field("teacher", kind="setting"),
    _field("augment", "augmentation", kind="setting"),
    _field("settings", kind="setting"),
    _field("generator"),
    _field("arch"),
    Column(
        "accuracy %",
        "accuracy_mean",
        lambda entry: percent(entry["accuracy_mean"], entry["accuracy_std"]),
        csv=("accuracy_mean", "accuracy_std"),
    ),
    _figure("balanced_accuracy_mean", "balanced %", percent, csv=True),
    Column(
        "n (sets)",
        "n",
        lambda entry: f"{entry['n']} ({entry['num_sets']})",
        csv=("n", "num_sets", "standard_error"),
    ),
    Column(
        "published %",
        "published",
        lambda entry: percent(entry["published"], entry["published_std"]),
        csv=("published", "published_std", "published_source"),
        note=lambda entry: str(_flat(entry).get("published_source")),
    ),
    _figure("difference", "difference", lambda value: f"{100 * value:+.2f}", csv=True),
    _figure("difference_se", "in SE", "{:+.1f}".format, csv=True),
    Column("cut", "cut", kind="remark", csv=("cut",)),
    Column("overridden", "overridden", kind="remark", csv=("overridden",)),
    Column("differs", "differs", kind="remark", csv=("differs",)),
)


def _seconds(entry: Entry) -> str:
    """Return a distillation's seconds; in brackets with pool and whitening, where there were any."""
    seconds = entry["seconds"]
    total = entry.get("seconds_with_pool", seconds) + entry.get("whitening_s", 0.0)
    return short(seconds) if total == seconds else f"{short(seconds)} ({short(total)})"


def _correlation(name: str, header: str) -> Column:
    return Column(header, name, lambda entry: short(entry[name]) if is_telling(entry, name) else "too few")


# The ranking's figures, then what the report page adds to a cell.
_FIGURES: Final = (
    _correlation("spearman", "Spearman"),
    _figure("published_spearman", "published Spearman"),
    _correlation("spearman_top20", "Spearman, top 20 %"),
    _figure("published_spearman_top20", "published, top 20 %"),
    _figure("search_time", "search, minutes"),
    _figure("published_search_time", "published minutes"),
    _figure("storage_images", "images"),
    _figure("published_storage_images", "published images"),
    _figure("storage_floats", "storage", "{:,.0f}".format),
    _figure("storage_with_generator_floats", "with generator", "{:,.0f}".format),
    _figure("approximation_mse", "MSE"),
    Column("seconds (with pool and whitening)", "seconds", _seconds),
    _figure("sampling_seconds_per_class", "sampling, s a class"),
    _figure("peak_memory_bytes", "peak MB", lambda value: f"{value / 1e6:,.0f}"),
)
MEASURED: Final = (
    *("seconds", "seconds_with_pool", "whitening_s", "sampling_seconds_per_class", "peak_memory_bytes"),
)
"""Figures that differ from run to run: they stand in costs.csv, not in table.csv."""


def name_columns() -> list[str]:
    """Return the columns of table.csv that tell what a row is and how it was evaluated."""
    return [name for column in _COLUMNS if column.kind in ("name", "setting") for name in column.csv]


def columns_of(entries: Iterable[Entry]) -> list[Column]:
    """Return the columns that some cell has a value for, in order."""
    entries = list(entries)
    protocols = {entry["protocol"] for entry in entries} & {*protocol_names()}
    measures = [
        _figure(name, f"{measure.title} %", percent) if measure.is_fraction else _figure(name, measure.title)
        for protocol in sorted(protocols)
        for name, measure in get_protocol(protocol).measures.items()
        if measure.in_tables
    ]
    columns = (*_COLUMNS, *measures, *_FIGURES)
    return [column for column in columns if any(column.value(entry) is not None for entry in entries)]


def csv_row(entry: Entry) -> dict[str, Any]:
    """Return a cell's line in table.csv: the columns' values, then the figures by name."""
    flat = _flat(entry)
    values = {name: flat.get(name) for column in _COLUMNS for name in column.csv}
    further = sorted(entry.keys() - values.keys() - {*MEASURED, "sets", "stage", "along", "compared"})
    return {**values, **{name: entry[name] for name in further}}


def generators_of(entries: Iterable[Entry]) -> list[str]:
    """Return the generators of some cells, as a table's title names them."""
    names = dict.fromkeys(entry["generator"] for entry in entries if "generator" in entry)
    return [f"generator {name}" for name in names]


def comparisons_of(entries: Iterable[Entry]) -> Iterator[tuple[str, ...]]:
    """Yield, for people, which planned cells are set beside which numbers, and why others are not.

    A line has a method, dataset, size, the networks, the published number of each, and what differs.
    """
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        if "compared" in entry or "differs" in entry:
            source = _number_of(entry)
            where = f"{entry['dataset']} on {entry['target']}" if "target" in entry else entry["dataset"]
            table = f"{source['paper']}, {source['table']}" if source else ""
            name = (entry["method"], where, size_of(entry), entry.get("teacher", ""), table)
            groups.setdefault((*name, "; ".join(entry.get("differs", ()))), []).append(entry)
    for (method, where, size, teacher, table, differs), cells in groups.items():
        archs = ", ".join(str(cell["arch"]) for cell in cells)
        values = ", ".join(f"{_number_of(cell)['value']:g}" for cell in cells) if table else ""
        network = f"{archs}; teacher {teacher}" if teacher else archs
        yield method, where, size, network, f"{values} ({table})" if table else "-", differs or "-"


def _number_of(entry: Entry) -> Mapping[str, Any]:
    """Return the published number that is compared or near, as `likeness.described` has it."""
    return entry.get("compared") or entry.get("published") or {}
