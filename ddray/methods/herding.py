"""Herding (Welling 2009; as in iCaRL, Rebuffi et al. 2017): images whose running mean follows the class mean.

Chosen per class in the embedding of a ConvNet trained on train: argmin over unused f of
||(k+1) mean - sum - f||.

**Deviations**: peers re-train the feature network for each run; ours is one pool entry.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.selection import (
    FeatureConfig,
    herding_order,
    per_class,
    pool_features,
    selection_method,
    take,
)


class HerdingConfig(FeatureConfig):
    """Herding's settings."""


def select(ctx: DistillContext, config: HerdingConfig) -> tuple[Tensor, Tensor]:
    """Return herding's images and their labels."""
    features = pool_features(ctx, config.feature_epochs)
    labels = ctx.split.labels
    indices = per_class(
        labels, ctx.dataset.num_classes, ctx.ipc, lambda rows: herding_order(features[rows], ctx.ipc)
    )
    return take(ctx, indices)


METHOD: Final = selection_method(HerdingConfig, select)
