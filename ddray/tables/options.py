"""Options of `ddray bench`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ddray.config import Names, named
from ddray.system.options import DataOptions, Gpus, GpuWorkers, NumericOptions


class BenchOptions(DataOptions, NumericOptions, GpuWorkers):
    """How a bench is run (of these, scale, settings and device change what a unit computes)."""

    scale: str = "paper"
    """paper: as written; cpu: minutes to hours; smoke: does it run."""
    sets: Names = named("set", "sets")
    """key=value for every method, over the file's `set`; a row's own settings win; repeatable."""
    retry_failed: bool = False
    """With --resume: run crashed units again; a diverged one would diverge again."""
    executor: Literal["ray", "local"] = "ray"
    """ray, or local: one after another in this process."""
    cpus_per_unit: float = Field(default=1.0, gt=0)
    """CPU cores per unit."""
    gpus_per_unit: Gpus | None = None
    """GPUs per unit, at most 1; fractions share one; default 1 where the cluster has GPUs, else 0."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Units at a time."""
    unit_timeout: float | None = Field(default=None, gt=0)
    """Seconds after which a unit counts as hung (on Ray); it is retried, then marked failed."""
    address: str | None = None
    """Ray cluster to connect to; default a local one."""

    @model_validator(mode="after")
    def _local_ignores_nothing(self) -> Self:
        if self.executor == "local":
            for name in ("max_concurrent", "unit_timeout", "address"):
                value = getattr(self, name)
                if value is not None and (name, value) != ("max_concurrent", 1):
                    option = "--" + name.replace("_", "-")
                    raise ValueError(
                        f"{option} must be left out with --executor local, which runs one unit at a time "
                        f"and waits for each; got {value}"
                    )
        return self
