"""What an evaluation returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from ddray.config import Result

if TYPE_CHECKING:
    import pandas as pd


class ArchResult(Result):
    """One architecture's networks: accuracies as fractions, and the protocol's own measures by name."""

    model_config = ConfigDict(extra="allow")

    arch: str
    accuracy_mean: float
    accuracy_std: float | None
    """Sample standard deviation; None for one network."""
    per_seed: list[float]
    num_images: int
    """Images trained on, as decoded."""
    wall_s: float


class EvaluateResult(Result):
    """What `ddray evaluate` returns, with the protocol's own details; accuracies are fractions."""

    model_config = ConfigDict(extra="allow")

    protocol: str
    split: str
    teacher: dict[str, Any] | None = None
    """Under protocol `soft`: who labels (`arch`), how well (`accuracy`); `each` if several are averaged."""
    results: list[ArchResult]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per architecture."""
        import pandas as pd

        return pd.DataFrame([result.dump() for result in self.results])
