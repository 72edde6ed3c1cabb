"""`ddray tune`: a search for hyperparameters."""

from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command
from ddray.jobs.options import PlanOptions
from ddray.system.options import RunOptions
from ddray.tuning.options import TuneOptions


@command(
    PlanOptions,
    TuneOptions,
    RunOptions,
    example="ddray tune --method datadam --dataset digits --ipc 1 --num-samples 16",
)
def tune(emit: Emit, **options: Any) -> None:
    """Search a method's hyperparameters on val over a Ray cluster; score the winner on test once."""
    from ddray import api

    result = api.tune(**options)
    emit(result, lambda: display.tune_tables(result))
