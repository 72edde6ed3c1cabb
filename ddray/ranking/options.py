"""Options of `ddray nas`, and how it trains architectures: recipes and overrides."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ddray.artifact.options import ForeignOptions
from ddray.config import AbsolutePath, Config, Names, added, named
from ddray.ranking import DEFAULT_SPACE, space_names
from ddray.system.options import DataOptions, Gpus, GpuWorkers, NumericOptions, Precision


class NasRecipe(Config):
    """How every architecture is trained: SGD on cross entropy with a cosine learning rate.

    Attributes:
        epochs: also the number of times that the rate falls, with `lr_every` epoch.
    """

    epochs: int = Field(default=200, ge=1)
    lr: float = Field(default=0.01, gt=0)
    lr_min: float = Field(default=0.0, ge=0)
    """Final rate of the cosine."""
    lr_every: Literal["step", "epoch"] = added("step")
    """How often the rate falls: `epoch` is torch's CosineAnnealingLR, stepped after each epoch."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    batch: int = Field(default=256, ge=1)
    clip: float | None = Field(default=None, gt=0)
    """Maximum norm of a network's gradient; None does not clip."""
    augment: Literal["dsa", "none"] = "dsa"
    """DSA with one operation per batch and parameters per sample."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """`bf16`: autocast the forward pass; `auto`: where a probe finds that faster."""
    tf32: bool = added(True)
    """Whether convolutions in float32 are computed in TF32 on GPUs that have it."""
    deterministic: bool = added(False)
    """Whether only deterministic algorithms are used."""

    @property
    def numerics(self) -> Precision:
        """The precision as `system.numerics` names it."""
        if self.precision == "fp32":
            return "tf32" if self.tf32 else "fp32"
        return self.precision

    def num_steps(self, num_images: int) -> int:
        """Return the optimiser steps of a full training on `num_images`."""
        return self.epochs * math.ceil(num_images / self.batch)

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step counted from 0.

        With `lr_every` epoch it is one of `epochs` rates, each for as many steps, whatever `num_steps` is:
        early stopping on the whole set has the rates of its proxy.
        """
        if self.lr_every == "epoch":
            step, num_steps = step * self.epochs // num_steps, self.epochs
        return self.lr_min + 0.5 * (self.lr - self.lr_min) * (1 + math.cos(math.pi * step / num_steps))


class NasConfig(Config):
    """How architectures are trained."""

    recipe: NasRecipe
    truth_recipe: NasRecipe
    whole_epochs: int | None = Field(default=None, ge=1)
    """Epochs of the baseline `whole`; None takes the recipe's."""

    def whole_recipe(self) -> NasRecipe:
        """Return how the baseline `whole` is trained."""
        return self.recipe.model_copy(update={"epochs": self.whole_epochs or self.recipe.epochs})

    def space_options(self) -> dict[str, Any]:
        """Return the options of the space itself: the fields that its own configuration adds."""
        sections = [name for name in type(self).model_fields if name not in NasConfig.model_fields]
        return {name: value for section in sections for name, value in getattr(self, section).dump().items()}


class NasOptions(NumericOptions, GpuWorkers):
    """How architectures are sampled, trained and compared."""

    space: str = Field(default=DEFAULT_SPACE, description=f"{' or '.join(space_names())}.")
    sample: int | None = Field(default=None, ge=1)
    """Architectures; default all."""
    sampling: Literal["cost", "uniform"] = "cost"
    """cost: --sample draws one architecture of each stratum of equal cost; uniform: any, all as likely."""
    max_mflops: float | None = Field(default=None, gt=0)
    """Leave out architectures of more million FLOPs an image."""
    seeds: int = Field(default=1, ge=1)
    """Networks per architecture and proxy."""
    val_images: int | None = Field(default=None, ge=1)
    """Images of train to rank on, the same share of every class; default a tenth."""
    epochs: int | None = Field(default=None, ge=1)
    """Epochs on a proxy; default the space's."""
    truth: str = "whole"
    """whole (train on the full set), table, api:FILE or a CSV file."""
    truth_epochs: int | None = Field(default=None, ge=1)
    """Epochs on the full set; default as --epochs."""
    truth_seeds: int = Field(default=1, ge=1)
    """Networks per architecture on the full set."""
    truth_column: str | None = None
    """Of the table or CSV; the table's default is the dataset's, such as cifar10_test_200_mean."""
    seed: int = 0
    """Every draw is derived from it."""
    executor: Literal["ray", "local"] = "ray"
    """ray, or local: one after another in this process."""
    num_workers: int | None = Field(default=None, ge=1)
    """Ray workers; default all."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPU cores per worker."""
    gpus_per_worker: Gpus | None = None
    """GPUs per worker, at most 1; fractions share one; default 1 where the cluster has GPUs, else 0."""
    unit_timeout: float | None = Field(default=None, gt=0)
    """Seconds after which a unit counts as hung, is retried, then marked failed; default by cost."""
    address: str | None = None
    """Ray cluster to connect to; default a local one."""

    @model_validator(mode="after")
    def _sampling_needs_a_sample(self) -> Self:
        if self.sampling != "cost" and self.sample is None:
            raise ValueError(f"--sampling {self.sampling} needs --sample N, got all architectures")
        return self

    @model_validator(mode="after")
    def _truth_has_columns(self) -> Self:
        if self.truth == "whole" and self.truth_column is not None:
            raise ValueError(
                "--truth-column needs --truth table, api:FILE or a CSV file (whole has no columns), "
                f"got {self.truth_column}"
            )
        return self


class NamedFile(Config):
    """A file, and what people call it: its own name, or what is in it, unless they name it."""

    path: AbsolutePath
    name: str | None = None


def named_file(value: str | Path | NamedFile) -> NamedFile:
    """Return the file of a path or of `name=path`; a path that exists is only that."""
    if isinstance(value, NamedFile):
        return value
    name, equals, path = str(value).partition("=")
    if not equals or not name or "/" in name or Path(value).expanduser().exists():
        return NamedFile.parse({"path": value})
    return NamedFile.parse({"name": name, "path": path})


class NasRequest(DataOptions, ForeignOptions):
    """What a sweep ranks architectures on, besides its options."""

    proxies: Annotated[
        tuple[Path | NamedFile, ...],
        BeforeValidator(
            lambda value: tuple(map(named_file, (value,) if isinstance(value, str | Path) else value))
        ),
    ] = named("proxy", "proxies")
    """Distilled set to train on, or name=FILE; repeatable."""
    baselines: Names = named("baseline", "baselines")
    """early-stopping, whole, random, kcenter, ...; repeatable."""
    dataset: str | None = None
    """Real data; default the first artifact's."""
    compat: str | None = None
    """dcbench: each bug of its harness as a further proxy."""

    @property
    def files(self) -> list[NamedFile]:
        """The sets' files."""
        return [named_file(proxy) for proxy in self.proxies]


class NasModes(Config):
    """What changes how `ddray nas` works."""

    describe: str | None = None
    """all, or indices: list architectures, train nothing."""
    scores: AbsolutePath | None = None
    """CSV (index,score) to rank against --truth, training nothing."""
    sets: Names = named("set", "sets")
    """key=value, such as recipe.lr=0.02; repeatable."""
