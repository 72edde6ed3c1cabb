"""`ddray evaluate`: fresh networks trained on a distilled set."""

from pathlib import Path
from typing import Any

from ddray.commands import endings
from ddray.commands.options import Emit, command, retyped
from ddray.config import AbsolutePath, Config
from ddray.errors import DdrayError
from ddray.evaluation.options import EvaluateOptions, EvaluateRunOptions
from ddray.system.options import DataFolder


class FileArgument(Config):
    """The set to evaluate."""

    file: AbsolutePath
    """Distilled set: ours, what `ddray export` wrote, another project's file, or a folder of pictures by
    class."""


@command(
    FileArgument,
    EvaluateOptions,
    EvaluateRunOptions,
    example="ddray evaluate digits.pt --arch convnet3 --arch resnet18 --seeds 5",
    arguments=("file",),
)
def evaluate(emit: Emit, file: Path, **options: Any) -> None:
    """Train fresh networks on a distilled set and report their accuracy."""
    from ddray import api

    result = api.evaluate(file, **options)
    emit(result, lambda: endings.evaluation(file, result, retyped(options, DataFolder)))
    if result.num_failed:
        first = result.failures[0]
        raise DdrayError(
            f"{result.num_failed} networks failed, among them {first['unit']}: {first['reason']}; what the "
            f"others scored is in {result.run_dir}"
        )
