"""The sets along a distillation: one file per step, kept through interruptions."""

from dataclasses import dataclass
from pathlib import Path


def snapshot_steps(every: int | None, num_steps: int) -> tuple[int, ...]:
    """Return the steps whose sets are kept: every so many, without the last, whose set is the result."""
    return () if every is None else tuple(range(every, num_steps, every))


@dataclass(frozen=True)
class Snapshots:
    """Where the sets of `steps` (ascending) are kept; those of a run share the whitening in its folder."""

    folder: Path
    steps: tuple[int, ...]
    run_dir: Path | None = None

    def path(self, step: int) -> Path:
        """Return the file of a step's set."""
        return snapshot_file(self.folder, step)

    def missing(self, before: int) -> list[int]:
        """Return the steps before this one whose set is not there."""
        return [step for step in self.steps if step < before and not self.path(step).is_file()]


def snapshot_file(folder: Path, step: int) -> Path:
    """Return the file of a step's set in a folder of snapshots."""
    return folder / f"{step:07d}.pt"
