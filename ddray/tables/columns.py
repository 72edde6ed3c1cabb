"""The columns of a bench's table: one list for table.csv, the terminal and the report page."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, Final, Literal

from ddray.drawing.text import percent
from ddray.evaluation import get_protocol, protocol_names

Entry = Mapping[str, Any]
"""A cell of the command's JSON."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        header: its title for people.
        value: a cell's value, by which people sort; None if the cell has none.
        text: the value as people read it; called for cells that have one.
        kind: `name` tells what a row is, `setting` how it was evaluated, `number` what came out.
        csv: values by their names in table.csv; default: those of the JSON that no column has, by name.
        note: where the value is from.
    """

    header: str
    value: Callable[[Entry], Any]
    text: Callable[[Entry], str]
    kind: Literal["name", "setting", "number"] = "number"
    csv: Mapping[str, Callable[[Entry], Any]] | None = None
    note: Callable[[Entry], str] | None = None

    def text_of(self, entry: Entry) -> str:
        """Return a cell's text; `-` if it has no value."""
        return "-" if self.value(entry) is None else self.text(entry)


def short(value: float) -> str:
    """Return a number with three digits; from 1000 on as a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def size_of(entry: Entry) -> str:
    """Return `ipc 10` or `100 images`; empty without a size."""
    if "budget" in entry:
        return f"{entry['budget']} images"
    return f"ipc {entry['ipc']}" if "ipc" in entry else ""


def _field(name: str, header: str | None = None, kind: Literal["name", "setting"] = "name") -> Column:
    get = methodcaller("get", name)
    return Column(header or name, get, lambda entry: str(entry[name]), kind, {name: get})


def _figure(name: str, header: str, text: Callable[[float], str] = short) -> Column:
    return Column(header, methodcaller("get", name), lambda entry: text(entry[name]))


def _published(name: str, entry: Entry) -> Any:
    return entry.get("published", {}).get(name)


def _source(entry: Entry) -> str | None:
    return f"{entry['published']['paper']}, {entry['published']['table']}" if "published" in entry else None


_COLUMNS: Final = (
    _field("method"),
    _field("dataset"),
    _field("target", "scored on"),
    Column(
        "size",
        lambda entry: entry.get("ipc") or entry.get("budget"),
        size_of,
        "name",
        {name: methodcaller("get", name) for name in ("ipc", "budget")},
    ),
    _field("protocol"),
    _field("teacher", kind="setting"),
    _field("augment", "augmentation", kind="setting"),
    _field("settings", kind="setting"),
    _field("arch"),
    Column(
        "accuracy %",
        methodcaller("get", "accuracy_mean"),
        lambda entry: percent(entry["accuracy_mean"], entry["accuracy_std"]),
        csv={name: methodcaller("get", name) for name in ("accuracy_mean", "accuracy_std")},
    ),
    Column(
        "n (sets)",
        methodcaller("get", "n"),
        lambda entry: f"{entry['n']} ({entry['num_sets']})",
        csv={name: methodcaller("get", name) for name in ("n", "num_sets", "standard_error")},
    ),
    Column(
        "published %",
        partial(_published, "accuracy_mean"),
        lambda entry: percent(entry["published"]["accuracy_mean"], entry["published"]["accuracy_std"]),
        csv={
            "published": partial(_published, "accuracy_mean"),
            "published_std": partial(_published, "accuracy_std"),
            "published_source": _source,
        },
        note=lambda entry: str(_source(entry)),
    ),
    Column(
        "difference",
        partial(_published, "difference"),
        lambda entry: f"{100 * entry['published']['difference']:+.2f}",
        csv={"difference": partial(_published, "difference")},
    ),
    Column(
        "in SE",
        partial(_published, "difference_se"),
        lambda entry: f"{entry['published']['difference_se']:+.1f}",
        csv={"difference_se": partial(_published, "difference_se")},
    ),
)
_RANKING: Final = (
    _figure("spearman", "Spearman"),
    _figure("published_spearman", "published Spearman"),
    _figure("spearman_top20", "Spearman, top 20 %"),
    _figure("published_spearman_top20", "published, top 20 %"),
    _figure("search_time", "search, minutes"),
    _figure("published_search_time", "published minutes"),
    _figure("storage_images", "images"),
    _figure("published_storage_images", "published images"),
)
# The report page adds these to a cell.
_OF_SETS: Final = (_figure("storage", "storage", "{:,}".format), _figure("wall_s", "seconds"))


def columns_of(entries: Iterable[Entry]) -> list[Column]:
    """Return the columns that some cell has a value for, in order."""
    entries = list(entries)
    protocols = {entry["protocol"] for entry in entries} & {*protocol_names()}
    measures = [
        _figure(name, measure.title)
        for protocol in sorted(protocols)
        for name, measure in get_protocol(protocol).measures.items()
        if measure.in_tables
    ]
    columns = (*_COLUMNS, *measures, *_RANKING, *_OF_SETS)
    return [column for column in columns if any(column.value(entry) is not None for entry in entries)]


def csv_row(entry: Entry) -> dict[str, Any]:
    """Return a cell's line in table.csv: the columns' values, then the figures by name."""
    values = {name: get(entry) for column in _COLUMNS for name, get in (column.csv or {}).items()}
    return {**values, **{name: entry[name] for name in sorted(entry) if name not in values}}
