"""`ddray distill`: a dataset to a few images per class."""

from typing import Any

from ddray.commands import endings
from ddray.commands.options import Emit, command, retyped
from ddray.jobs.options import DistillOptions, PlanOptions, ShardOptions
from ddray.system.options import DataFolder


@command(
    PlanOptions,
    DistillOptions,
    ShardOptions,
    example="ddray distill --method datadam --dataset digits --ipc 1 --out digits.pt",
)
def distill(emit: Emit, **options: Any) -> None:
    """Distil a dataset to a few images per class."""
    from ddray import api

    result = api.distill_to_run(**options)
    emit(result, lambda: endings.distill_tables(result, retyped(options, DataFolder)))
