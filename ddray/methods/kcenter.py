"""K-center (Sener & Savarese 2018): the image nearest to the class mean, then always the farthest one.

Chosen per class in the embedding of a ConvNet trained on train.

**Deviations**: peers re-train the feature network for each run; ours is one pool entry.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.selection import (
    FeatureConfig,
    kcenter_indices,
    pool_features,
    selection_method,
    take,
)


class KCenterConfig(FeatureConfig):
    """K-center's settings."""


def select(ctx: DistillContext, config: KCenterConfig) -> tuple[Tensor, Tensor]:
    """Return k-center's images and their labels."""
    features = pool_features(ctx, config.feature_epochs)
    return take(ctx, kcenter_indices(features, ctx.split.labels, ctx.dataset.num_classes, ctx.ipc))


METHOD: Final = selection_method(KCenterConfig, select)
