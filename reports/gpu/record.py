"""What is measured, on disk: a JSON line as each figure and each part ends, and the report of all parts.

The lines are appended and the report is written anew after every part, so that both are whole whenever the
run is killed. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.gpu.plan import PARTS, Part

Report = dict[str, Any]
NOTHING_YET = "Nothing has been measured on a GPU yet: run `make gpu` on a machine that has one."
_NOT_RUN = "the run has not come to it"


def append(lines: Path, **values: Any) -> None:
    """Append one JSON line, by one write."""
    with lines.open("ab", buffering=0) as file:
        file.write(json.dumps(values).encode() + b"\n")


def read(lines: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; one that a kill cut off is left out."""
    if not lines.is_file():
        return []
    rows = []
    for line in lines.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def not_measured(parts: Iterable[Part], reason: str) -> dict[str, Any]:
    """Return what a report says of parts that have not run."""
    return {
        part.name: {"title": part.title, "status": "not run", "reason": reason, "figures": {}}
        for part in parts
    }


def assembled(
    rows: Sequence[Mapping[str, Any]],
    parts: Sequence[Part],
    machine: Mapping[str, Any],
    earlier: Mapping[str, Any] | None = None,
) -> Report:
    """Return the report of a run's lines.

    Args:
        rows: the lines, in their order.
        parts: those that the run was to do.
        machine: date, device, torch, driver, command: what the figures hold for.
        earlier: a report before this run, whose other parts stay if they are of the same device and torch.
    """
    same = earlier is not None and all(
        earlier.get(name) == machine.get(name) for name in ("device", "torch", "is_dry_run")
    )
    names = [part.name for part in parts]
    results = not_measured(PARTS, "this run was not to do it")
    if earlier is not None and same and earlier.get("measured"):
        results |= earlier["parts"]
    results |= not_measured(parts, _NOT_RUN)
    for row in rows:
        if row["part"] not in names:
            continue
        result = results[row["part"]]
        if "figure" in row:
            result["figures"][row["figure"]] = row["value"]
            result |= {"status": "timeout", "reason": "the run was killed during this part"}
        else:
            result |= {name: row[name] for name in ("status", "reason", "seconds", "date")}
    for result in results.values():
        _judge(result)
    return {"measured": any(result["figures"] for result in results.values()), **machine, "parts": results}


def _judge(result: dict[str, Any]) -> None:
    """Let a part that ended fail if one of its figures did."""
    reasons = [f"{name}: {value['failed']}" for name, value in result["figures"].items() if "failed" in value]
    if result["status"] == "ok" and reasons:
        result |= {"status": "failed", "reason": f"{len(reasons)} of {len(result['figures'])}: {reasons[0]}"}


def write(path: Path, report: Report) -> None:
    """Write a report whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def nothing() -> Report:
    """Return the report before the first run."""
    return {"measured": False, "note": NOTHING_YET, "parts": not_measured(PARTS, "no GPU was at hand")}
