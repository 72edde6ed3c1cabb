"""What a search returns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddray.config import Result

if TYPE_CHECKING:
    import pandas as pd


class BestTrial(Result):
    """The winner: its settings by name, its score on val, its number."""

    config: dict[str, Any]
    val_accuracy: float | None = None
    val_spearman: float | None = None
    trial: int


class PaperPoint(Result):
    """The preset's settings (trial 0): score on val, and on test as the winner's; None if it failed."""

    val_accuracy: float | None = None
    val_spearman: float | None = None
    test_accuracy_mean: float | None
    test_accuracy_std: float | None
    test_num_networks: int | None = None


class TuneResult(Result):
    """What `ddray tune` returns; accuracies are fractions."""

    run_dir: str
    objective: str
    protocol: str = "hard"
    """What scored the sets."""
    num_trials: int
    num_failed: int
    num_stopped_early: int
    best: BestTrial
    paper_point: PaperPoint
    verdict: str = ""
    """Whether the winner is better than the preset, in words."""
    cut: str | None = None
    """What was lowered of the preset's budget, such as `steps 10 of 8,000`."""
    overridden: list[str] | None = None
    """Names of the other settings that are not the preset's; the search's own start from them."""
    artifact: str
    test_accuracy_mean: float | None
    test_accuracy_std: float | None
    test_num_networks: int
    """Networks behind the score on test."""
    earlier_tests: tuple[int, ...] = ()
    """Of an extended search: after how many trials test had been opened before."""
    wall_s: float

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per trial, read from the run's ledger: its settings, score, status and seconds."""
        import pandas as pd

        from ddray.runs.ledger import Ledger
        from ddray.tuning.study import status_of, trial_rows

        return pd.DataFrame(
            {
                "trial": row.spec["number"],
                **(row.spec.get("params") or row.result.get("params") or {}),
                self.objective: row.result.get(self.objective),
                "status": status_of(row),
                "wall_s": row.wall_s,
            }
            for row in trial_rows(Ledger(Path(self.run_dir)))
        )
