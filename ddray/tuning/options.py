"""Options of `ddray tune`."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ddray.config import AbsolutePath, Names, named
from ddray.errors import InputError, unknown
from ddray.ranking import DEFAULT_SPACE
from ddray.system.options import Gpus, GpuWorkers

Strategy = Literal["asha-tpe", "tpe", "random", "grid", "pb2"]
Objective = Literal["val-accuracy", "nas-spearman"]

LOGGERS: Final = ("mlflow", "wandb")
"""What `--log-to` takes, each an extra of its name."""
StartPoints = Annotated[
    tuple[AbsolutePath | dict[str, Any], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str | Path | dict) else value),
]
"""Files or mappings of names to values, or a single one."""


class TuneOptions(GpuWorkers):
    """How a search is run (of these, space, protocol and teachers change what a trial is)."""

    space: AbsolutePath | dict[str, Any] | None = None
    """YAML of ranges by setting: lr_img, pool.epochs, evaluate.lr, arch, steps; default the method's shipped
    one."""
    num_samples: int = Field(default=16, ge=1)
    """Trials, the preset among them. With --resume, a larger number extends a search."""
    start_points: StartPoints = named("start_point", "start_points")
    """YAML of values for some of the space's names, or a best.yaml, tried after the preset; the other
    names keep the preset's values; repeatable."""
    strategy: Strategy = "asha-tpe"
    """asha-tpe, tpe, random, grid or pb2."""
    protocol: str | None = None
    """hard, soft, linear or another protocol of `ddray evaluate`: how sets are scored on val, and at the end
    on test; default the method's own."""
    teachers: Names = named("teacher", "teachers")
    """soft: who labels; several are averaged; default resnet18."""
    objective: Objective = "val-accuracy"
    """val-accuracy, or nas-spearman: how sets rank architectures scored on val."""
    nas_sample: int = Field(default=16, ge=3)
    """Architectures that nas-spearman ranks."""
    nas_space: str = DEFAULT_SPACE
    """Space of these architectures: that of `ddray nas`."""
    nas_epochs: int = Field(default=50, ge=1)
    """Epochs of each of them, on a trial's set and on the whole train part."""
    final_sets: int = Field(default=3, ge=1)
    """Fresh seeds on which the winner and the preset are scored on test."""
    log_to: Names = ()
    """wandb or mlflow, besides TensorBoard's files in the run folder (an extra of that name); repeatable."""
    cpus_per_trial: float = Field(default=1.0, gt=0)
    """CPU cores per trial."""
    gpus_per_trial: Gpus | None = None
    """GPUs per trial, at most 1; fractions share one; default 1 where the cluster has GPUs, else 0."""
    shards: int | None = Field(default=None, ge=1)
    """Distil every set in so many groups of classes, each by a worker of its own, to the same bytes; CPUs and
    GPUs per trial are then those of each worker."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time."""
    time_budget: float | None = Field(default=None, gt=0)
    """Seconds after which no trial starts."""
    address: str | None = None
    """Ray cluster to connect to; default a local one."""

    @model_validator(mode="after")
    def _loggers_are_there(self) -> Self:
        """Refuse loggers whose package is missing, and a strategy without Ray Tune's trials."""
        for name in self.log_to:
            if name not in LOGGERS:
                raise unknown("--log-to", name, LOGGERS)
            if self.strategy == "pb2":
                raise InputError(
                    f"--log-to must be left out with strategy pb2, whose trials log nothing, got {name}"
                )
            if importlib.util.find_spec(name) is None:
                raise InputError(
                    f"--log-to {name} needs a package that is missing: pip install 'ddray[{name}]'"
                )
        return self
