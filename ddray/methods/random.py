"""Random: `ipc` real images of each class, drawn without repetition (the field's first baseline).

**Deviations**: none; the papers give no more than this.
"""

from typing import Final

from torch import Tensor

from ddray.config import Config
from ddray.distillation.method import DistillContext
from ddray.methods.families.matching.batches import initial_images
from ddray.methods.families.selection import selection_method


def choose_images(ctx: DistillContext, config: Config) -> tuple[Tensor, Tensor]:
    """Return random real images and their labels."""
    return initial_images(ctx, "random")


METHOD: Final = selection_method(Config, choose_images)
