"""What the units of a run took: seconds of a device, and peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ddray.report.runs import RunView, name_of
from ddray.runs.costs import device_seconds
from ddray.runs.ledger import Ledger, Row
from ddray.system.grouping import grouped

_MAX_UNITS: Final = 100


def unit_costs(run: RunView) -> dict[str, Any]:
    """Return what the page shows of a run's units, those of a bench's NAS sweeps among them.

    `kinds` holds a line per kind; `units` the longest ones, and `num_left` says how many are left out. What
    was joined from shards took what these took.
    """
    rows = [row for row in (*run.rows, *_of_sweeps(run)) if row.status == "done" and not _is_joined(row)]
    lines = [_line(row) for row in rows]
    kinds = [
        {
            "kind": kind,
            "units": len(group),
            "seconds": sum(line["seconds"] for line in group),
            "longest": max(line["seconds"] for line in group),
            "peak": max((line["peak"] for line in group if line["peak"] is not None), default=None),
        }
        for kind, group in grouped(lines, lambda line: line["kind"]).items()
    ]
    longest = sorted(lines, key=lambda line: -line["seconds"])
    return {
        "title": run.title,
        "kinds": kinds,
        "units": longest[:_MAX_UNITS],
        "num_left": max(0, len(longest) - _MAX_UNITS),
    }


def _is_joined(row: Row) -> bool:
    return row.kind == "distill" and "shards" in row.result


def _line(row: Row) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "unit": name_of(row),
        "seconds": device_seconds(row),
        "peak": row.result.get("peak_memory_bytes"),
    }


def _of_sweeps(run: RunView) -> Sequence[Row]:
    folders = sorted((run.folder / "nas").glob("*/ledger"))
    return [row for folder in folders for row in Ledger(folder.parent).rows()]
