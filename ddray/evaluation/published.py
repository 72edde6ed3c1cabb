"""Published numbers (reports/published.csv, 1,122), and their conditions (reports/conditions.yaml).

docs/published.md has the conventions, doubtful cells and contradictions within the papers.
"""

import csv
import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ddray.config import Config, merge, read_yaml
from ddray.system.shipped import shipped

_BLANK_IS_NONE = BeforeValidator(lambda text: text or None)


class Number(Config):
    """One published number, as printed."""

    paper: str
    """datadam, dsdm, boost_ssdd or d3hr; of another method's or protocol's own paper, its name."""
    table: str
    """Such as `Table 3`; `as cited`: printed in other papers; `repository`: in the authors' repository."""
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


class Conditions(Config):
    """What a number was measured under, besides its own fields."""

    protocol: str
    """A protocol of `ddray evaluate`, or `nas`."""
    space: str | None = None
    """The NAS space."""
    teacher: str | None = None
    """Who labels softly where the table names nobody."""
    norm: str | None = "instance"
    """Of its ConvNets; None where their names tell two apart."""
    pixels: Mapping[str, int] = Field(default_factory=dict)
    """Sides of the distilled images by dataset; others are as the dataset comes."""
    counts_images: tuple[str, ...] = ()
    """Methods whose budget counts images alone, without what is stored beside them."""
    unstated: tuple[str, ...] = ()
    """What the paper leaves open."""
    source: str | None = None
    """Where numbers were read that were not read in the paper itself."""


@functools.cache
def _stated() -> dict[str, Any]:
    return read_yaml(shipped("reports", "conditions.yaml"))


def conditions_of(number: Number) -> Conditions:
    """Return the conditions of a published number."""
    paper = _stated()[number.paper]
    general = {name: value for name, value in paper.items() if name not in ("tables", "methods")}
    of_table = paper.get("tables", {}).get(number.table, {})
    return Conditions.parse(merge(general, of_table, paper.get("methods", {}).get(number.method, {})))
