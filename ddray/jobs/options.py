"""Options of `ddray distill`, which `ddray tune` shares, and of `ddray pool train`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ddray.config import AbsolutePath, Names, named
from ddray.system.options import (
    DataFolder,
    DataOptions,
    DeviceOptions,
    Gpus,
    GpuWorkers,
    NumericOptions,
    RunOptions,
)


class PlanOptions(DataOptions, NumericOptions):
    """What is distilled, and with which settings."""

    method: str
    """Method or baseline, such as datadam, dm, random."""
    dataset: str = "digits"
    """Dataset name, or a folder (see `ddray data list`)."""
    ipc: int | None = None
    """Images per class (self-supervised methods: --budget)."""
    budget: int | None = None
    """Images of storage, for self-supervised methods."""
    preset: str = "paper"
    """paper: as printed; repo: as in the authors' code; for d3hr also d4m, D4M's style without its text."""
    config: AbsolutePath | None = None
    """YAML that overrides preset and shipped config."""
    sets: Names = named("set", "sets")
    """key=value, such as lr_img=0.5 of the method or evaluate.epochs=300; repeatable."""
    steps: int | None = None
    """Steps of a run (in a search: of a full trial); 0 writes the initial images. With --resume, a larger
    number extends a run."""
    seed: int = 0
    """Every draw is derived from it."""


class DistillOptions(RunOptions, DeviceOptions):
    """How and where a distillation is run."""

    out: AbsolutePath | None = None
    """Artifact; default <run dir>/distilled.pt."""
    val_seed: int | None = None
    """Leave out the val tenth that tune and nas with this seed score on."""
    val_images: int | None = Field(default=None, ge=1)
    """Leave out this many images instead: those that nas with this seed and --val-images ranks by."""


class ShardOptions(DataFolder, GpuWorkers):
    """How a distillation is cut into shards of classes, and where these are run."""

    shards: int | None = Field(default=None, ge=1)
    """Distil so many groups of classes apart, each with its classes' images alone; the set is the same."""
    executor: Literal["ray", "local"] = "ray"
    """Where shards are run: ray, or local: one after another in this process."""
    cpus_per_shard: float = Field(default=1.0, gt=0)
    """CPU cores per shard."""
    gpus_per_shard: Gpus | None = None
    """GPUs per shard, at most 1; fractions share one; default 1 where the cluster has GPUs, else 0."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Shards at a time; default as many as fit."""
    address: str | None = None
    """Ray cluster to connect to; default a local one."""

    @model_validator(mode="after")
    def _ignores_nothing(self) -> Self:
        unused = set(type(self).model_fields) - {"shards", "data_dir"} if self.shards is None else set()
        if self.executor == "local":
            unused |= {"cpus_per_shard", "gpus_per_shard", "max_concurrent", "address"}
        for name in sorted(name for name in unused if getattr(self, name) != self._default(name)):
            why = "without --shards" if self.shards is None else "with --executor local"
            raise ValueError(f"--{name.replace('_', '-')} must be left out {why}, got {getattr(self, name)}")
        return self

    @classmethod
    def _default(cls, name: str) -> object:
        return cls.model_fields[name].default


class PoolOptions(DataOptions, DeviceOptions):
    """What a pool is to hold."""

    kind: str
    """supervised: networks trained on labels; trajectory: experts for mtt and datm; ssl: the self-supervised
    methods' teacher; diffusion: D3HR's generator."""
    dataset: str = "digits"
    """Dataset name, or a folder (see `ddray data list`)."""
    arch: str | None = None
    """supervised, trajectory: default auto, the field's ConvNet; ssl: default resnet18."""
    num_models: int | None = None
    """supervised, trajectory: networks, on seeds that count up; default 1."""
    epochs: int | None = None
    """Epochs of training; supervised: default 20, trajectory: 50."""
    sets: Names = named("set", "sets")
    """key=value of the recipe, such as batch=64, trajectory also pixel_space=zca; repeatable."""
    seed: int | None = None
    """supervised, trajectory: the first network's, ssl: the teacher's; default 0."""
    out: AbsolutePath | None = None
    """Pool folder, default $DDRAY_HOME/pool; diffusion: DiTPipeline folder."""
    num_workers: int | None = Field(default=None, ge=1)
    """supervised: train each network on so many workers at once (Ray Train), which share its batches;
    trajectory: so many networks at a time, each on a worker; default in this process."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPU cores per worker; default 1."""
    gpus_per_worker: Gpus | None = None
    """GPUs per worker, 0 or 1; default 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """Ray cluster to connect to; default a local one."""

    def limited(self) -> list[str]:
        """Return the options that are set and that only some kinds take."""
        names = ("arch", "num_models", "seed", "num_workers")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _workers_are_asked_for(self) -> Self:
        for name in ("cpus_per_worker", "gpus_per_worker", "address"):
            if self.num_workers is None and getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} needs --num-workers N, got {getattr(self, name)} without it")
        if self.num_workers is not None and self.device != "auto":
            raise ValueError(
                f"--device must be left out with --num-workers, got {self.device}; --gpus-per-worker 0 "
                "computes on CPUs"
            )
        return self

    @property
    def cpus(self) -> float:
        """CPU cores of a worker."""
        return self.cpus_per_worker or 1.0

    @property
    def gpus(self) -> float:
        """GPUs of a worker; 0 until the default is resolved (`cluster.resources`)."""
        return self.gpus_per_worker or 0.0
