"""Which claims of the papers hold at a size that two cores bear, in claims.md: `make claims`.

Runs `ddray claims` on each file of configs/claims, one after another; a run that was cut off continues. What
came out stands in claims.json, part by part, with command, hardware, commit and date.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from ddray.drawing.text import listed, percent_short
from ddray.runs.ledger import Ledger
from ddray.system.files import write_text
from ddray.tables.claims import TEST, Verdict, claims_table
from reports.scale.lab import Lab, ddray
from reports.sections import commit, hardware, table

_FILES: Final = Path(__file__).resolve().parents[1] / "configs" / "claims"
RECORD: Final = Path(__file__).resolve().parent / "claims.json"
TITLES: Final = {
    "digits": "Methods on digits, ipc 1",
    "cifar10_ipc1": "Methods on CIFAR-10, ipc 1",
    "dc_ipc10": "DC and DSA on digits, ipc 10",
    "dsdm_mnist": "DSDM on MNIST, ipc 1",
    "datadam_parts": "DataDAM's parts on CIFAR-10, ipc 1",
    "dsdm_parts": "DSDM's parts on CIFAR-10, ipc 1",
    "boost_ssdd": "Boost-SSDD's parts, initial images and targets",
    "d3hr": "D3HR's mapping and score on digits, ipc 10",
}
_KEPT: Final = (
    *("method", "ipc", "budget", "protocol", "arch", "accuracy_mean", "accuracy_std", "n", "num_sets"),
    *("seconds", "cut", "along"),
)
_COLUMNS: Final = ("claim", "verdict", "effect", "p", "n", "rows", "on", "budget", "from")


def read(path: Path) -> dict[str, Any]:
    """Return the record; empty if there is none."""
    if not path.is_file():
        return {"test": TEST, "claims": [], "parts": {}}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def measure(lab: Lab, part: str) -> None:
    """Run a part or continue it, and record it."""
    file, folder = _FILES / f"{part}.yaml", lab.folder / "runs" / part
    resume = ("--resume",) if folder.is_dir() else ()
    scale = ("--scale", "smoke") if lab.is_tiny else ()
    out = ddray(lab, "claims", file, *scale, "--run-dir", folder, *resume).out
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    cells = json.loads((folder / "cells.json").read_text(encoding="utf-8"))["cells"]
    record = read(lab.lines)
    record["parts"][part] = {
        "command": " ".join(("OMP_NUM_THREADS=1 ddray claims", f"configs/claims/{part}.yaml", *scale)),
        "cells": [_cell(cell, Ledger(folder)) for cell in cells],
        "num_failed": out["num_failed"],
        "environment": {name: value for name, value in environment.items() if name != "command"},
    }
    others = [claim for claim in record["claims"] if claim["part"] != part]
    record["claims"] = sorted(
        [*others, *({**claim, "part": part} for claim in out["claims"])],
        key=lambda claim: list(TITLES).index(claim["part"]),
    )
    write_text(lab.lines, json.dumps(record, indent=1) + "\n")


def _cell(cell: Mapping[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Return a cell's figures, with its sets' mean losses over the first and the last tenth of the steps."""
    results = [row.result for key in cell["sets"] if (row := ledger.row(key)) is not None]
    losses = [[result.get(name) for result in results] for name in ("first_loss", "final_loss")]
    is_known = bool(results) and None not in chain(*losses)
    means = {"losses": [fmean(values) for values in losses]} if is_known else {}
    return {name: cell[name] for name in _KEPT if name in cell} | means


def overview(record: Mapping[str, Any]) -> list[str]:
    """Return a table of what became of the claims, by part."""
    rows = []
    for part, title in TITLES.items():
        if part not in record["parts"]:
            rows.append((title, "not measured", "", ""))
            continue
        verdicts = [claim["verdict"] for claim in record["claims"] if claim["part"] == part]
        count = Counter(verdicts)
        rows.append((title, *(str(count[name]) for name in ("holds", "fails", "undecided"))))
    return table(("claims", "hold", "fail", "undecided"), rows)


def page(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of claims.md."""
    lines = [
        *("# Measured: claims of the papers", ""),
        "Written by `make claims`; do not edit. Each is one comparison of two rows of a table.",
        f"Test: {TEST}. A claim *holds* or *fails* where p is below .05, by the sign of the effect.",
        "Effect: points of test accuracy, with its 95 % interval (not adjusted). n: pairs of sets x networks",
        "on each. Budget: what was cut of the preset's; at the papers' own the answers may be others.",
        "Loss: means over the first and the last tenth of the steps.",
        "",
        *overview(record),
    ]
    for part, title in TITLES.items():
        if part in record["parts"]:
            lines += [f"## {title}", "", *_part(record, part)]
    return lines


def _part(record: Mapping[str, Any], part: str) -> Iterator[str]:
    """Yield a part's claims, its accuracies, and where they are from."""
    facts = record["parts"][part]
    claims = [
        {k: v for k, v in claim.items() if k != "part"} for claim in record["claims"] if claim["part"] == part
    ]
    shared, lines = claims_table([Verdict.parse(claim) for claim in claims])
    columns = [name for name in _COLUMNS if name in lines[0]]
    yield from (shared, "") if shared else ()
    yield from table(columns, [[line[name] for name in columns] for line in lines])
    cells = facts["cells"]
    several = [name for name in ("ipc", "protocol") if len({cell.get(name) for cell in cells}) > 1]
    rows = [_line(cell, several) for cell in cells]
    heads = ("row", "test %", "sets x networks", "along (step)", "loss", "seconds a set")
    yield from table(heads, rows)
    failed = f" {facts['num_failed']} units failed." if facts["num_failed"] else ""
    yield f"`{facts['command']}`, {hardware(facts)}, {commit(facts)}.{failed}"
    yield ""


def _line(cell: Mapping[str, Any], several: Sequence[str]) -> tuple[str, ...]:
    """Return a cell's accuracies and losses; `several` are what tells the part's cells apart."""
    points = (f"{100 * point['accuracy_mean']:.1f} ({point['step']})" for point in cell.get("along", ()))
    return (
        ", ".join([cell["method"], *(f"{name} {cell[name]}" for name in several)]),
        percent_short(cell["accuracy_mean"], cell["accuracy_std"]),
        f"{cell['num_sets']} x {cell['n'] // cell['num_sets']}",
        ", ".join(points) or "-",
        " to ".join(f"{loss:.4g}" for loss in cell.get("losses", ())) or "-",
        f"{cell['seconds']:.0f}" if "seconds" in cell else "-",
    )


def main() -> None:
    """Measure the parts that are named, or all, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m reports.claims", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", help=f"of {listed([*TITLES])}; default all; `render`: the page alone"
    )
    parser.add_argument("--folder", type=Path, default=Path("build") / "claims", help="runs and $DDRAY_HOME")
    parser.add_argument("--lines", type=Path, default=RECORD, help="the record")
    parser.add_argument("--tiny", action="store_true", help="show that the parts work; measures nothing")
    options = parser.parse_args()
    if unknown := {*options.parts} - {*TITLES, "render"}:
        parser.error(f"parts must be of {listed([*TITLES])}, got {', '.join(sorted(unknown))}")
    (options.folder / "runs").mkdir(parents=True, exist_ok=True)
    lab = Lab(options.folder.absolute(), options.lines.absolute(), 1, options.tiny)
    for part in options.parts or TITLES:
        if part != "render":
            measure(lab, part)
    record = read(lab.lines)
    write_text(lab.lines.with_suffix(".md"), "\n".join(page(record)))


if __name__ == "__main__":
    main()
