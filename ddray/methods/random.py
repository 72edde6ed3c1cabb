"""Random: `ipc` real images of each class, drawn without repetition (the field's first baseline).

**Deviations**: none; the papers give no more than this.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from ddray.config import Config
from ddray.distillation.method import DistillContext
from ddray.methods.families.matching.batches import random_indices
from ddray.methods.families.selection import selection_method, take


class RandomConfig(Config):
    """Random selection has no settings."""


def select(ctx: DistillContext, config: RandomConfig) -> tuple[Tensor, Tensor]:
    """Return random real images and their labels."""
    return take(ctx, random_indices(ctx))


METHOD: Final = selection_method(RandomConfig, select)
