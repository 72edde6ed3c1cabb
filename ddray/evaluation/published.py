"""The papers' 950 published numbers (reports/published.csv).

docs/published.md has the conventions, doubtful cells and contradictions within the papers.
"""

import csv
import functools
from typing import Annotated

from pydantic import BeforeValidator, Field

from ddray.config import Config
from ddray.system.shipped import shipped

_BLANK_IS_NONE = BeforeValidator(lambda text: text or None)


class Number(Config):
    """One published number, as printed."""

    paper: str
    """datadam, dsdm, boost_ssdd or d3hr."""
    table: str
    """Such as `Table 3`."""
    dataset: str
    """The set distilled."""
    target: str = Field(validation_alias="target_dataset")
    """The set evaluated on, where the table has several."""
    method: str
    """The paper's row."""
    ipc: Annotated[int | None, _BLANK_IS_NONE]
    """Images per class; None where the paper counts differently."""
    budget: Annotated[int | None, _BLANK_IS_NONE] = Field(validation_alias="budget_images")
    """Storage in images."""
    arch: str
    """The evaluated network; "" if not stated."""
    teacher: str
    """Source of soft labels or target representations; "" if none."""
    metric: str
    """Such as `top1_accuracy`."""
    setting: str
    """Anything else that the row or column states."""
    value: float
    std: Annotated[float | None, _BLANK_IS_NONE]
    """Its standard deviation."""
    unit: str
    """percent, fraction, images, minutes, ..."""


@functools.cache
def read_numbers() -> tuple[Number, ...]:
    """Return all published numbers, in the file's order."""
    with shipped("reports", "published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(map(Number.parse, csv.DictReader(file)))
