"""K-means in the teacher's space over the whole unlabelled set (Boost-SSDD's second baseline).

For each of m centroids the nearest real image not yet taken, with its own representation.

**Deviations**

- A budget of N: the paper takes N images, and their representations on top; ours counts both, so that fewer
  fit. The paper's count is `method.count=images`, as in the table files.
- One start of k-means++ (scikit-learn); the paper does not say how many.
"""

from typing import Final

from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.selection import kmeans_order
from ddray.methods.families.ssl.budget import ssl_selection
from ddray.seeding import derive_seed


def choose(ctx: DistillContext, features: Tensor, m: int) -> Tensor:
    """Return the indices nearest to m centroids."""
    return kmeans_order(features, m, derive_seed(ctx.seed, "distill", "kmeans"))


METHOD: Final = ssl_selection(choose)
