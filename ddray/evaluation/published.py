"""The papers' 950 published numbers (reports/published.csv).

docs/published.md has the conventions, doubtful cells and contradictions within the papers.
"""

import csv
import functools
from dataclasses import dataclass

from ddray.system.shipped import shipped


@dataclass(frozen=True)
class Number:
    """One published number, as printed.

    Attributes:
        paper: datadam, dsdm, boost_ssdd or d3hr.
        table: such as `Table 3`.
        dataset: the set distilled.
        target: the set evaluated on, where the table has several.
        method: the paper's row.
        ipc: images per class; None where the paper counts differently.
        budget: storage in images.
        arch: the evaluated network; "" if not stated.
        teacher: source of soft labels or target representations; "" if none.
        metric: such as `top1_accuracy`.
        setting: anything else that the row or column states.
        value: the number.
        std: its standard deviation.
        unit: percent, fraction, images, minutes, ...
    """

    paper: str
    table: str
    dataset: str
    target: str
    method: str
    ipc: int | None
    budget: int | None
    arch: str
    teacher: str
    metric: str
    setting: str
    value: float
    std: float | None
    unit: str


@functools.cache
def read_numbers() -> tuple[Number, ...]:
    """Return all published numbers, in the file's order."""
    with shipped("reports", "published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Number(
                paper=row["paper"],
                table=row["table"],
                dataset=row["dataset"],
                target=row["target_dataset"],
                method=row["method"],
                ipc=int(row["ipc"]) if row["ipc"] else None,
                budget=int(row["budget_images"]) if row["budget_images"] else None,
                arch=row["arch"],
                teacher=row["teacher"],
                metric=row["metric"],
                setting=row["setting"],
                value=float(row["value"]),
                std=float(row["std"]) if row["std"] else None,
                unit=row["unit"],
            )
            for row in csv.DictReader(file)
        )
