"""How a distilled set is scored: the `evaluate` section of a run's configuration."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pydantic import Field

from ddray.config import parse_overrides
from ddray.errors import InputError
from ddray.training.recipe import FinetuneConfig, ProbeConfig, Recipe, named_recipe

if TYPE_CHECKING:
    from ddray.artifact.distilled_set import DistilledSet
    from ddray.evaluation.options import EvaluateOptions


class EvaluateConfig(Recipe):
    """How a distilled set is scored; `evaluate.recipe=vico|idc` sets a whole recipe by name (`RECIPES`)."""

    seeds: int = Field(default=5, ge=1)
    """Networks per architecture."""
    val_seeds: int = Field(default=2, ge=1)
    """Networks per evaluation at a rung of a search (never more than `seeds`)."""
    probe: ProbeConfig = ProbeConfig()
    """Protocol `linear`: the classifier on frozen embeddings."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Protocol `linear` with --finetune: KRR-ST's full fine-tuning."""

    def as_recipe(self) -> Recipe:
        """Return the training part: the fields of `Recipe`."""
        return Recipe.parse({name: getattr(self, name) for name in Recipe.model_fields})


def evaluation_config(distilled: DistilledSet, options: EvaluateOptions) -> EvaluateConfig:
    """Return the evaluation settings: the artifact's own, overridden by the options."""
    option_values = {"seeds": options.seeds, "epochs": options.epochs, "augment": options.augment}
    settings = distilled.meta.config.get("evaluate", {})
    method = distilled.meta.config.get("method", {})
    factor = method.get("factor", 1) if isinstance(method, dict) else 1
    recipe = functools.partial(named_recipe, dataset=distilled.meta.dataset, factor=factor)
    sets = recipe(parse_overrides(options.sets))
    if not isinstance(settings, dict):
        raise InputError(f"meta.config.evaluate must be a mapping, got {settings!r}")
    if options.recipe is not None:
        settings = {**settings, **recipe({"recipe": options.recipe})}
    if options.augment not in (None, settings.get("augment", "dsa")):
        settings = {**settings, "strategy": None, "cutmix": 0.0}
    if options.augment == "none" and options.epochs is None:
        # The peers' length without augmentation.
        settings = {**settings, "epochs": min(300, settings.get("epochs", 300))}
    return EvaluateConfig.parse(
        {**settings, **sets, **{k: v for k, v in option_values.items() if v is not None}}, prefix="evaluate."
    )
