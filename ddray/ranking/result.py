"""What a NAS sweep returns."""

from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ConfigDict

from ddray.config import Result


class ProxyResult(Result):
    """How a proxy's ranking compares with the true one; None where it is undefined."""

    model_config = ConfigDict(extra="allow")

    proxy: str
    spearman: float | None
    spearman_ci95: list[float] | None
    spearman_top20: float | None
    kendall: float | None
    top1_truth_accuracy: float | None
    top1_test_accuracy: float | None = None
    """Performance: of the best-ranked architecture, trained on the whole set and scored on test."""
    best_truth_accuracy: float | None
    num_tied: int
    storage_images: int | float
    wall_s: float


class NasResult(Result):
    """What `ddray nas` returns; of scores from a file, `space`, `num_archs`, `truth` and `proxies` only."""

    space: str
    dataset: str | None = None
    num_archs: int
    num_failed: int = 0
    run_dir: str | None = None
    truth: dict[str, Any] | None = None
    """Where the true accuracies come from (source, column, dataset, split, epochs, seeds), what they cost."""
    proxies: list[ProxyResult]
    wall_s: float | None = None

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per proxy and architecture, as in results.csv; without a run, one per proxy."""
        if self.run_dir is None:
            return pd.DataFrame([proxy.dump() for proxy in self.proxies])
        return pd.read_csv(Path(self.run_dir) / "results.csv")


class ArchList(Result):
    """What `ddray nas --describe` returns: index, size and choices of each architecture."""

    archs: list[dict[str, Any]]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per architecture."""
        return pd.DataFrame(self.archs)
