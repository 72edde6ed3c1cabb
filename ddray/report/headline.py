"""What a run came to, in one line: the title of its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ddray.drawing.text import percent_short
from ddray.ranking.report import sweep_title, telling_correlations
from ddray.report.board import matrix_of
from ddray.report.runs import RunView, SetView, grouped
from ddray.report.scored import without_stages
from ddray.tables.along import group_of
from ddray.tables.columns import Entry
from ddray.tuning.report import search_title


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

    That is the score of a single method (the first, of several), the best of a single column, or who leads
    in most columns.
    """
    first = next(iter(grouped(without_stages(cells), lambda cell: cell["protocol"]).values()), [])
    matrix = matrix_of(first)
    if not matrix.heads:
        return title
    if len(matrix.rows) == 1:
        entry = next(cell for cell in first if cell["accuracy_mean"] is not None)
        return _scored(entry, str(entry["arch"]))
    if len(matrix.heads) == 1:
        best, second, *_ = (row[0].entry for _, row in matrix.rows if row[0] is not None)
        return _scored(best, f"next: {second['method']} {percent_short(second['accuracy_mean'])}")
    ((leader, count),) = Counter(matrix.leaders()).most_common(1)
    return f"{leader} leads in {count} of {len(matrix.heads)} columns ({title})"


def _scored(cell: Entry, beside: str) -> str:
    """Return a cell's score, such as `dm on digits, ipc 1: 71.2 % (convnet3)`; `hard` is not named."""
    where = f"{cell['method']} on {group_of(cell)}".removesuffix(", hard")
    cut = f"; cut: {cell['cut']}" if cell.get("cut") else ""
    return f"{where}: {percent_short(cell['accuracy_mean'])} % ({beside}{cut})"


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
