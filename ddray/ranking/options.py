"""Options of `ddray nas`, and how it trains architectures: recipes and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator

from ddray.config import Config, merge
from ddray.errors import InputError
from ddray.ranking.recipe import NasRecipe


class CellOptions(Config):
    """The NAS-Bench-201 network that is trained: DC-BENCH's proxy setting."""

    channels: int = Field(default=16, ge=1)
    num_cells: int = Field(default=1, ge=1)
    cell_affine: bool = False


class NasConfig(Config):
    """How architectures are trained."""

    recipe: NasRecipe
    truth_recipe: NasRecipe
    whole_epochs: int | None = Field(default=None, ge=1)
    """Epochs of the baseline `whole`; None takes the recipe's."""
    cells: CellOptions = CellOptions()

    def whole_recipe(self) -> NasRecipe:
        """Return how the baseline `whole` is trained."""
        return self.recipe.model_copy(update={"epochs": self.whole_epochs or self.recipe.epochs})


# No recipe is published for the 720 ConvNets (one follow-up: 200 epochs): ours. NAS-Bench-201: DC-BENCH's.
_RECIPES: Final[dict[str, dict[str, Any]]] = {
    "convnet720": {"epochs": 200, "lr": 0.01, "weight_decay": 5e-4, "batch": 256},
    "nasbench201": {
        "epochs": 50,
        "lr": 0.025,
        "lr_min": 0.001,
        "weight_decay": 3e-4,
        "batch": 64,
        "clip": 5.0,
    },
}
# DC-BENCH trains on proxies for 50 epochs, and on the whole set as a proxy for 10.
_WHOLE_EPOCHS: Final[dict[str, int | None]] = {"convnet720": None, "nasbench201": 10}


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


def resolve_config(options: NasOptions, layers: Sequence[Mapping[str, Any]] = ()) -> NasConfig:
    """Return the training settings: the space's own, then --epochs and --truth-epochs, then --set.

    Epochs set by the user apply to the baseline `whole` too, unless `whole_epochs` is set.

    Raises:
        InputError: an unknown name, an invalid value, or cell options for a space without cells.
    """
    if options.space != "nasbench201" and any("cells" in layer for layer in layers):
        raise InputError(
            f"--set cells.* needs --space nasbench201, got --space {options.space}, which has no cells"
        )
    defaults = _RECIPES[options.space]
    overrides = {} if options.epochs is None else {"epochs": options.epochs}
    recipe = {**defaults, **overrides}
    truth = {**recipe, **({} if options.truth_epochs is None else {"epochs": options.truth_epochs})}
    shared = merge(
        {"recipe": recipe, "truth_recipe": truth}, *({"truth_recipe": _shared(layer)} for layer in layers)
    )
    if not overrides and not any("epochs" in _recipe_of(layer) for layer in layers):
        shared["whole_epochs"] = _WHOLE_EPOCHS[options.space]
    return NasConfig.parse(merge(shared, *layers))


def _shared(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the recipe settings of a --set layer that apply to the truth too: all but the epochs."""
    return {name: value for name, value in _recipe_of(layer).items() if name != "epochs"}


def _recipe_of(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    recipe = layer.get("recipe", {})
    return recipe if isinstance(recipe, Mapping) else {}
