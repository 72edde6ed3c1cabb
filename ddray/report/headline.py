"""What a run came to, in one line: the title of its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ddray.drawing.text import percent_short
from ddray.report.board import matrix_of
from ddray.report.runs import RunView, SetView, grouped
from ddray.tables.along import group_of
from ddray.tables.columns import Entry
from ddray.tuning.report import search_title


def headline(run: RunView) -> str:
    """Return a run's result, such as `datadam on cifar10, ipc 1: 32.6 % (preset 32.0)`."""
    if run.command == "tune":
        return _of_search(run)
    if run.cells:
        return of_cells(run.cells, run.title)
    if run.sets:
        return _of_set(run.sets[0])
    return run.title


def of_cells(cells: Sequence[Entry], title: str) -> str:
    """Return what cells came to: the best of one column, or who leads most; `title` names their table."""
    first = next(iter(grouped(cells, lambda cell: cell["protocol"]).values()), [])
    matrix = matrix_of(first)
    if not matrix.heads:
        return title
    if len(matrix.heads) == 1:
        best, *others = (row[0].entry for _, row in matrix.rows if row[0] is not None)
        beside = best["arch"]
        if others:
            beside = f"next: {others[0]['method']} {percent_short(others[0]['accuracy_mean'])}"
        return f"{named(best)}: {percent_short(best['accuracy_mean'])} % ({beside})"
    ((leader, count),) = Counter(matrix.leaders()).most_common(1)
    return f"{leader} leads in {count} of {len(matrix.heads)} columns ({title})"


def named(cell: Entry) -> str:
    """Return what a cell scored, such as `dm on digits, ipc 1`; another protocol than `hard` is named."""
    group = group_of(cell).removesuffix(", hard")
    return f"{cell['method']} on {group}"


def _of_search(run: RunView) -> str:
    by_label = {str(cell["method"]): cell["accuracy_mean"] for cell in run.cells}
    preset = next((mean for label, mean in by_label.items() if label.endswith(", preset")), None)
    best = next((mean for label, mean in by_label.items() if label.endswith(", searched")), preset)
    return search_title(run.config, best, preset)


def _of_set(view: SetView) -> str:
    where = f"{view.label} on {view.group}"
    if not view.losses:
        return f"{where}: distilled, not evaluated"
    first, last = view.losses[0][1], view.losses[-1][1]
    return f"{where}: {view.losses[-1][0]:,} steps, loss {first:.3g} to {last:.3g}, not evaluated"
