"""Methods that match one mean per class: DM (an embedding) and MMD-pixel (the pixels themselves)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import Config
from ddray.distillation.method import DistillContext, Distiller, Target
from ddray.methods._matching import MatchingConfig, MeanMatching, Statistics


def squared_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Return the sum over classes of ||mean real_c - mean syn_c||^2, for one statistic's means [K, D]."""
    return (real[0] - synthetic[0]).square().sum()


def means_method(config_class: type[MatchingConfig], statistics: Statistics) -> type[Distiller]:
    """Return a method that minimises `squared_distance` of class means of `statistics`.

    Args:
        config_class: its settings.
        statistics: per-sample statistic of images under a network, as a tuple of one [N, D].
    """

    class Means:
        config_type: ClassVar[type[Config]] = config_class

        def __init__(self, config: MatchingConfig, num_steps: int) -> None:
            self._config = config
            self.num_steps = num_steps

        @staticmethod
        def preset(name: str, target: Target) -> dict[str, Any]:
            """Return DM's settings, the same in paper and code."""
            return {"steps": 20_000, "evaluate": {"epochs": 1000, "augment": "dsa"}}

        def setup(self, ctx: DistillContext) -> None:
            """Make the initial images and the matcher."""
            self._ctx = ctx
            self._matcher = MeanMatching(ctx, self._config, statistics, squared_distance)

        def step(self) -> dict[str, Tensor]:
            """Match one batch under one fresh network."""
            return self._matcher.step()

        def snapshot(self) -> DistilledSet:
            """Return the current images as a set."""
            return self._ctx.make_set(self._matcher.images, self._matcher.labels)

        def state_dict(self) -> dict[str, Any]:
            """Return images, momentum and step."""
            return self._matcher.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Continue from a state."""
            self._matcher.load_state_dict(state)

    return Means
