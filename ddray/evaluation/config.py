"""How a distilled set is scored: the `evaluate` section of a run's configuration."""

from __future__ import annotations

from pydantic import Field

from ddray.training.recipe import FinetuneConfig, ProbeConfig, Recipe


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
