"""`ddray tune`: a search for hyperparameters."""

from typing import Any

from ddray.commands import display, endings
from ddray.commands.options import Emit, command, retyped
from ddray.config import Config
from ddray.jobs.options import PlanOptions
from ddray.system.options import DataFolder, RunOptions
from ddray.tuning.options import TuneOptions


class DryRun(Config):
    """Whether the search is run."""

    dry_run: bool = False
    """Print the trials and their expected cost; run nothing."""


@command(
    PlanOptions,
    TuneOptions,
    RunOptions,
    DryRun,
    example="ddray tune --method datadam --dataset digits --ipc 1 --num-samples 16",
)
def tune(emit: Emit, dry_run: bool = False, **options: Any) -> None:
    """Search a method's hyperparameters on val over a Ray cluster; score the winner on test once."""
    from ddray import api

    if dry_run:
        costs = api.forecast_tune(**options)
        emit(costs, lambda: [*display.search_forecast_tables(costs), display.without("--dry-run")])
        return
    result = api.tune(**options)
    teachers = [word for teacher in options.get("teachers", ()) for word in ("--teacher", teacher)]
    emit(result, lambda: endings.tune_tables(result, [*teachers, *retyped(options, DataFolder)]))
