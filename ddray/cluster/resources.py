"""How much of a GPU each worker of a command gets; nothing here opens a CUDA context."""

import logging
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from ddray.cluster.runtime import ray_runtime, total_resource
from ddray.errors import InputError
from ddray.evaluation.options import EvaluateRunOptions
from ddray.jobs.options import PoolOptions, ShardOptions
from ddray.ranking.options import NasOptions
from ddray.system.gpus import num_gpus
from ddray.tables.options import BenchOptions
from ddray.tuning.options import TuneOptions

log = logging.getLogger(__name__)
AnyOptions = TuneOptions | BenchOptions | NasOptions | EvaluateRunOptions | PoolOptions | ShardOptions
Options = TypeVar(
    "Options", TuneOptions, BenchOptions, NasOptions, EvaluateRunOptions, PoolOptions, ShardOptions
)


def with_gpus(options: Options, before: Mapping[str, Any] | None = None) -> Options:
    """Return options with a number of GPUs per worker: the default is one where there are any.

    `before` is the config.yaml of a run that is resumed: its number is the default.

    Raises:
        InputError: GPUs are requested where there are none, or no cluster answers.
    """
    name = next(name for name in type(options).model_fields if name.startswith("gpus_per_"))
    option, per = f"--{name.replace('_', '-')}", name.removeprefix("gpus_per_")
    gpus: float | None = getattr(options, name)
    if gpus is None and before and "device" in before:
        gpus = float(before.get(name, before["device"] == "cuda"))
    elif gpus != 0:
        num = _visible_gpus(options)
        if gpus is None:
            gpus = min(num, 1)
            if gpus:
                log.info("GPUs: %d, one per %s; %s 0 computes on the CPU", num, per, option)
        elif not num:
            raise InputError(f"{option} must be 0 where there is no GPU that torch can use, got {gpus:g}")
    return options.model_copy(update={name: float(gpus)})


def _visible_gpus(options: AnyOptions) -> int:
    """Return how many GPUs the workers can get: the cluster's, or this machine's."""
    uses_ray = getattr(options, "executor", "ray") == "ray"
    is_running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if uses_ray and (is_running or options.address is not None):
        with ray_runtime(options.address):
            return int(total_resource("GPU"))
    return num_gpus()
