"""Herding (Welling 2009; as in iCaRL, Rebuffi et al. 2017): images whose running mean follows the class mean.

Chosen per class in the embedding of a ConvNet trained on train: argmin over unused f of
||(k+1) mean - sum - f||.

**Deviations**: peers re-train the feature network for each run; ours is one pool entry.
"""

from typing import Final

from ddray.methods.families.selection import FeatureConfig, apart, coreset_method, herding_order

METHOD: Final = coreset_method(
    FeatureConfig, lambda ctx, features: herding_order(features, ctx.ipc), coupling=apart
)
