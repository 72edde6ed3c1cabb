"""K-center (Sener & Savarese 2018): the image nearest to the class mean, then always the farthest one.

Chosen per class in the embedding of a ConvNet trained on train.

**Deviations**: peers re-train the feature network for each run; ours is one pool entry.
"""

from typing import Final

from ddray.methods.families.selection import FeatureConfig, apart, coreset_method, kcenter_order

METHOD: Final = coreset_method(
    FeatureConfig, lambda ctx, features: kcenter_order(features, ctx.ipc), coupling=apart
)
