"""What a bench returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from ddray.config import Result, added
from ddray.tables.claims import TEST, Verdict

if TYPE_CHECKING:
    import pandas as pd


class BenchCell(Result):
    """One cell: mean over all networks of all its sets, beside the published number if there is one."""

    model_config = ConfigDict(extra="allow")

    method: str
    dataset: str
    protocol: str
    arch: str
    accuracy_mean: float | None
    accuracy_std: float | None
    n: int
    """Networks."""


class BenchResult(Result):
    """What `ddray bench` returns; accuracies are fractions."""

    name: str = Field(exclude=True)
    """The table's."""
    run_dir: str
    cells: list[BenchCell]
    num_failed: int
    failures: list[dict[str, Any]]
    skipped: list[Any]
    anomalies: list[str] = Field(default_factory=list)
    """What looks wrong in the table, one sentence each."""
    claims: list[Verdict] = added([])
    """Of a file with claims: what became of each."""
    wall_s: float

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per cell, the parts of `published` as columns of their own."""
        import pandas as pd

        return pd.json_normalize([cell.dump() for cell in self.cells])


class ClaimsResult(Result):
    """What `ddray claims` returns."""

    name: str = Field(exclude=True)
    """The table's."""
    run_dir: str
    report: str
    """The page."""
    test: str = TEST
    """How claims are decided, in words."""
    claims: list[Verdict]
    num_failed: int
    failures: list[dict[str, Any]]
    wall_s: float


class Forecast(Result):
    """What `ddray bench --dry-run` returns: the units, and what the missing ones are expected to cost."""

    name: str
    scale: str
    units: list[dict[str, Any]]
    cells: list[dict[str, Any]]
    """The table's cells, each with the published number that it is `compared` with, or why it `differs`."""
    num_units: int
    num_missing: int
    pool_known: bool
    """False if some methods say only once they start which networks they need."""
    estimate_s: float | None
    """Seconds of one device for all missing units with an estimate; None if none has one."""
    peak_memory_bytes: int | None
    """Of the largest missing unit; None if none has an estimate."""
    num_without_estimate: int
    num_workers: int | None = None
    """Units at a time on this machine; None for a cluster whose size no option says."""
    estimate_wall_s: float | None = None
    """Seconds until those workers have run them, each after what it needs; None as for `estimate_s`."""
    num_from_smaller: int
    """Estimates that are too high, from far smaller units."""
    nas_sweeps: list[str]
