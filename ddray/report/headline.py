"""What a run came to, in one line: the title of its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ddray.drawing.text import listed, percent_short, size_of
from ddray.ranking.report import sweep_title, telling_correlations
from ddray.report.board import matrix_of
from ddray.report.runs import RunView, SetView
from ddray.report.scored import without_stages
from ddray.system.grouping import grouped
from ddray.tables.along import group_of
from ddray.tables.columns import Entry
from ddray.tuning.report import search_title

_MAX_NAMED: Final = 3
"""Leaders that a title names; of more it tells the number."""


def headline(run: RunView, rankings: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a run's result, such as `datadam on cifar10, ipc 1: 32.6 % (preset 32.0)`.

    `rankings` are those of a sweep: `{"proxy", "spearman", "num_archs"}`.
    """
    if run.command == "tune":
        return _of_search(run)
    if run.command == "nas" and rankings:
        num_archs = max(ranking["num_archs"] for ranking in rankings)
        correlations = telling_correlations(rankings)
        return sweep_title(str(run.config.get("space")), run.config.get("dataset"), num_archs, correlations)
    if without_stages(run.cells):
        return of_cells(run.cells, run.title)
    if run.sets:
        return _of_set(run.sets[0])
    return run.title


def of_cells(cells: Sequence[Entry], title: str) -> str:
    """Return what cells came to; `title` names their table.

    That is the score of a single method (the first, of several), the best of a single column, who leads in
    most columns, or how the best of a sweep ranks. No set along the steps, or replaced since, stands for it.
    """
    first = next(iter(grouped(without_stages(cells), lambda cell: cell["protocol"]).values()), [])
    if first and first[0]["protocol"] == "nas":
        return _of_sweeps(first, title)
    matrix = matrix_of(first)
    if not matrix.heads:
        return title
    if len(matrix.rows) == 1:
        entry = next(cell for cell in first if cell["accuracy_mean"] is not None)
        return _scored(entry, str(entry["arch"]))
    if len(matrix.heads) == 1:
        best, second, *_ = (row[0].entry for _, row in matrix.rows if row[0] is not None)
        is_tie = best["accuracy_mean"] == second["accuracy_mean"]
        score = f"{second['method']} {percent_short(second['accuracy_mean'])}"
        return _scored(best, f"{'tied' if is_tie else 'next'}: {', '.join([score, *_cut(second)])}")
    cut = {method for method, row in matrix.rows if any(mark and mark.entry.get("cut") for mark in row)}
    leaders = [f"{method} (cut)" if method in cut else method for method in matrix.leaders()]
    return f"{_leads(leaders, len(matrix.heads), 'column')} ({title})"


def _of_sweeps(cells: Sequence[Entry], title: str) -> str:
    """Return how the best row of a table's NAS sweep ranks, or who does best in most sweeps."""
    sweeps = grouped(cells, lambda cell: (group_of(cell), cell["arch"], cell.get("settings")))
    by_sweep = [
        (
            group[0],
            max(cell.get("num_archs", 0) for cell in group),
            telling_correlations(map(_as_proxy, group)),
        )
        for group in sweeps.values()
    ]
    if len(by_sweep) == 1:
        ((first, num_archs, correlations),) = by_sweep
        where = " at ".join(filter(None, (str(first["dataset"]), size_of(first))))
        return sweep_title(str(first["arch"]), where, num_archs, correlations)
    values = [{name: rho for name, rho in each.items() if rho is not None} for *_, each in by_sweep]
    leaders = [name for each in values for name, rho in each.items() if rho == max(each.values())]
    return f"{_leads(leaders, len(by_sweep), 'sweep')} by Spearman ({title})" if leaders else title


def _as_proxy(cell: Entry) -> dict[str, Any]:
    name = f"{cell['method']} (cut)" if cell.get("cut") else str(cell["method"])
    return {"proxy": name, "spearman": cell.get("spearman"), "num_archs": cell.get("num_archs")}


def _leads(leaders: Sequence[str], num: int, column: str) -> str:
    """Return who leads in most of `num` columns; `leaders` has each as often as it leads."""
    counts = Counter(leaders)
    most = max(counts.values())
    names = [name for name, count in counts.items() if count == most]
    if len(names) == 1:
        return f"{names[0]} leads in {most} of {num} {column}s"
    who = listed(names) if len(names) <= _MAX_NAMED else f"{len(names)} methods"
    return f"{who} lead in {most} {column if most == 1 else f'{column}s'} each"


def _scored(cell: Entry, beside: str) -> str:
    """Return a cell's score, such as `dm on digits, ipc 1: 71.2 % (convnet3)`; `hard` is not named."""
    where = f"{cell['method']} on {group_of(cell)}".removesuffix(", hard")
    return f"{where}: {percent_short(cell['accuracy_mean'])} % ({'; '.join([*_cut(cell), beside])})"


def _cut(cell: Entry) -> list[str]:
    return [f"cut: {cell['cut']}"] if cell.get("cut") else []


def _of_search(run: RunView) -> str:
    # A label's first cell is the search's own: one of its sets may have been scored again.
    by_label = {str(cell["method"]): cell["accuracy_mean"] for cell in reversed(run.cells)}
    preset = next((mean for label, mean in by_label.items() if label.endswith(", preset")), None)
    best = next((mean for label, mean in by_label.items() if label.endswith(", searched")), preset)
    return search_title(run.config, best, preset)


def _of_set(view: SetView) -> str:
    where = f"{view.label} on {view.group}"
    if not view.losses:
        return f"{where}: distilled, not evaluated"
    first, last = view.losses[0][1], view.losses[-1][1]
    return f"{where}: {view.losses[-1][0]:,} steps, loss {first:.3g} to {last:.3g}, not evaluated"
