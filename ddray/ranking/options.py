"""Options of `ddray nas`, and how it trains architectures: recipes and overrides."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ddray.config import AbsolutePath, Config, Names, named
from ddray.evaluation.options import PixelKind
from ddray.ranking import DEFAULT_SPACE, space_names
from ddray.ranking.recipe import NasRecipe
from ddray.system.options import DataOptions


def _several(value: Any) -> Any:
    """Accept a single file for several."""
    return (value,) if isinstance(value, str | Path) else value


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


class NasOptions(Config):
    """How architectures are sampled, trained and compared."""

    space: str = Field(default=DEFAULT_SPACE, description=f"{' or '.join(space_names())}.")
    sample: int | None = Field(default=None, ge=1)
    """Architectures, stratified by cost; default all."""
    max_mflops: float | None = Field(default=None, gt=0)
    """Leave out architectures of more million FLOPs an image."""
    seeds: int = Field(default=1, ge=1)
    """Networks per architecture and proxy."""
    epochs: int | None = Field(default=None, ge=1)
    """Epochs on a proxy; default the space's."""
    truth: str = "whole"
    """whole (train on the full set), table, api:FILE or a CSV file."""
    truth_epochs: int | None = Field(default=None, ge=1)
    """Epochs on the full set; default as --epochs."""
    truth_seeds: int = Field(default=1, ge=1)
    """Networks per architecture on the full set."""
    truth_column: str | None = None
    """Of the table or CSV; the table's default is cifar10_test_200_mean."""
    seed: int = 0
    """Every draw is derived from it."""
    executor: Literal["ray", "local"] = "ray"
    """ray, or local: one after another in this process."""
    num_workers: int | None = Field(default=None, ge=1)
    """Ray workers; default all."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPU cores per worker."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs per worker; default 1 where this machine has one."""
    unit_timeout: float | None = Field(default=None, gt=0)
    """Seconds after which a unit counts as hung, is retried, then marked failed; default by cost."""
    address: str | None = None
    """Ray cluster to connect to; default a local one."""

    @model_validator(mode="after")
    def _truth_has_columns(self) -> Self:
        if self.truth == "whole" and self.truth_column is not None:
            raise ValueError(
                "--truth-column needs --truth table, api:FILE or a CSV file (whole has no columns), "
                f"got {self.truth_column}"
            )
        return self


class NasRequest(DataOptions):
    """What a sweep ranks architectures on, besides its options."""

    proxies: Annotated[tuple[AbsolutePath, ...], BeforeValidator(_several)] = named("proxy", "proxies")
    """Distilled set to train on; repeatable."""
    baselines: Names = named("baseline", "baselines")
    """early-stopping, whole, random, kcenter, ...; repeatable."""
    dataset: str | None = None
    """Real data; default the first artifact's."""
    pixel_space: PixelKind = "normalized"
    """Of another project's file: normalized, zca or raw."""
    compat: str | None = None
    """dcbench: each bug of its harness as a further proxy."""


class NasModes(Config):
    """What changes how `ddray nas` works."""

    describe: str | None = None
    """all, or indices: list architectures, train nothing."""
    scores: AbsolutePath | None = None
    """CSV (index,score) to rank against --truth, training nothing."""
    sets: Names = named("set", "sets")
    """key=value, such as recipe.lr=0.02; repeatable."""
