"""K-means: per class, the real image nearest to each of `ipc` centroids (scikit-learn's k-means++).

Clustered in the embedding of a ConvNet trained on train.

**Deviations**: Boost-SSDD's k-means baseline clusters the whole unlabelled set in its teacher's space; this
one is its supervised counterpart, class by class.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.selection import FeatureConfig, coreset_method
from ddray.seeding import derive_seed


class KMeansConfig(FeatureConfig):
    """K-means' settings."""


def kmeans_order(features: Tensor, ipc: int, seed: int) -> Tensor:
    """Return `ipc` distinct positions: to each centroid the nearest sample not yet taken.

    Args:
        features: [n, D] of one class.
        ipc: number of clusters.
        seed: decides the initial centroids.
    """
    from sklearn.cluster import KMeans

    features = features.double()
    fit = KMeans(n_clusters=ipc, n_init=3, random_state=seed % 2**32).fit(features.numpy())
    distance = torch.cdist(torch.from_numpy(fit.cluster_centers_).double(), features)
    order: list[int] = []
    for row in distance:
        row[order] = torch.inf
        order.append(int(row.argmin()))
    return torch.tensor(order)


def cluster(ctx: DistillContext, features: Tensor) -> Tensor:
    """Return `ipc` positions among the features [n, D] of one class."""
    return kmeans_order(features, ctx.ipc, derive_seed(ctx.seed, "distill", "kmeans"))


METHOD: Final = coreset_method(KMeansConfig, cluster)
