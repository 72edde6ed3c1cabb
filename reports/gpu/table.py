"""The report as a table for people: README's between its markers. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.gpu.plan import PARTS
from reports.gpu.record import NOTHING_YET

BEGIN, END = "<!-- gpu table: written by make gpu -->", "<!-- end of gpu table -->"
_MOST = 8  # figures of a part in the table; the rest stands in the report


def table(report: Mapping[str, Any]) -> str:
    """Return a report as a Markdown table, with what did not run."""
    if not report["measured"]:
        return NOTHING_YET
    machine = f"{report['device']}, torch {report['torch']}, driver {report['driver']}, {report['date'][:10]}"
    lines = [
        f"{machine}; mean ± sample standard deviation (n):",
        "",
        "| part | measured | |",
        "|---|---|---|",
    ]
    for part in PARTS:
        result = report["parts"][part.name]
        figures = [
            f"{name}: {figure_text(value)}"
            for name, value in result["figures"].items()
            if name.startswith(part.headline)
        ]
        rest = f"; {len(figures) - _MOST} more" if len(figures) > _MOST else ""
        status = " ".join(filter(None, (result["status"], result["reason"])))
        lines.append(f"| {part.title} | {'; '.join(figures[:_MOST])}{rest} | {_cell(status)} |")
    return "\n".join(lines)


def figure_text(value: Mapping[str, Any]) -> str:
    """Return a figure for people: value, deviation, unit, number of repeats."""
    for reason in ("failed", "not_run"):
        if reason in value:
            return reason.replace("_", " ")
    if value["value"] is None:
        return str(value.get("note", "-"))
    spread = "" if value["std"] is None else f" ± {value['std']:.2g}"
    repeats = f" ({value['n']})" if value["n"] > 1 else ""
    return f"{value['value']:.3g}{spread} {value['unit']}{repeats}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def write(readme: Path, report: Mapping[str, Any]) -> None:
    """Set the table between the markers of a page.

    Raises:
        ValueError: the page has no markers.
    """
    text = readme.read_text(encoding="utf-8")
    block = f"{BEGIN}\n{table(report)}\n{END}"
    changed, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.S)
    if count != 1:
        raise ValueError(f"{readme.name} has {count} tables between {BEGIN} and {END}")
    readme.write_text(changed, encoding="utf-8")
