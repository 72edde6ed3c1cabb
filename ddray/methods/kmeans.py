"""K-means: per class, the real image nearest to each of `ipc` centroids (scikit-learn's k-means++).

Clustered in the embedding of a ConvNet trained on train.

**Deviations**: Boost-SSDD's k-means baseline clusters the whole unlabelled set in its teacher's space; this
one is its supervised counterpart, class by class.
"""

from typing import Final

from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.selection import FeatureConfig, apart, coreset_method, kmeans_order
from ddray.seeding import derive_seed


def cluster(ctx: DistillContext, features: Tensor) -> Tensor:
    """Return `ipc` positions among the features [n, D] of one class."""
    seed = derive_seed(ctx.seed, "distill", "kmeans")
    return kmeans_order(features.double(), ctx.ipc, seed, num_starts=3)


METHOD: Final = coreset_method(FeatureConfig, cluster, coupling=apart)
