"""Options of `ddray nas`, and how it trains architectures: recipes and overrides."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ddray.config import Config
from ddray.ranking.recipe import NasRecipe


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
    """Options of `ddray nas`."""

    space: str = "convnet720"
    sample: int | None = Field(default=None, ge=1)
    """Architectures, stratified by cost; None takes the whole space."""
    max_mflops: float | None = Field(default=None, gt=0)
    """Leave out architectures that need more multiply-adds per image (millions)."""
    seeds: int = Field(default=1, ge=1)
    """Networks per architecture and proxy."""
    epochs: int | None = Field(default=None, ge=1)
    truth: str = "whole"
    truth_epochs: int | None = Field(default=None, ge=1)
    truth_seeds: int = Field(default=1, ge=1)
    truth_column: str | None = None
    seed: int = 0
    executor: Literal["ray", "local"] = "ray"
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    num_workers: int | None = Field(default=None, ge=1)
    unit_timeout: float | None = Field(default=None, gt=0)
    """Seconds after which a unit counts as hung; it is retried, then marked failed. None: `patience`."""
    address: str | None = None

    @model_validator(mode="after")
    def _truth_has_columns(self) -> Self:
        if self.truth == "whole" and self.truth_column is not None:
            raise ValueError(
                "--truth-column needs --truth table, api:FILE or a CSV file (whole has no columns), "
                f"got {self.truth_column}"
            )
        return self
