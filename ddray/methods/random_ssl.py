"""Random images with the teacher's representations of them: the first self-supervised baseline.

Drawn from the whole unlabelled set, without classes (Boost-SSDD Sec 4, Baselines).

**Deviations**

- A budget of N: the paper takes N images, and their representations on top; ours counts both, so that fewer
  fit. The paper's count is `method.count=images`, as in the table files.
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
