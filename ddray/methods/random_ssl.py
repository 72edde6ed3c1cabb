"""Random images with the teacher's representations of them: the first self-supervised baseline.

Drawn from the whole unlabelled set, without classes (Boost-SSDD Sec 4, Baselines).

**Deviations**

- The paper takes N images for a budget of N; ours counts the representations too, so that fewer fit: the
  paper's number is that of `--budget N * (1 + D / (C * H * W))`.
"""

from typing import Final

import torch
from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.ssl.budget import ssl_selection


def choose(ctx: DistillContext, features: Tensor, m: int) -> Tensor:
    """Return m random indices, without repetition."""
    return torch.randperm(len(features), generator=ctx.generator("random images"))[:m]


METHOD: Final = ssl_selection(choose)
