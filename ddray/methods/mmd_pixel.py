"""MMD-pixel: distribution matching in pixel space, a linear kernel (DataDAM supplement 2.1, Table 3).

DM's loss with the identity as embedding: sum_c ||mean real_c - mean syn_c||^2.

**Deviations**: the supplement gives no step size, count or augmentation; ours are DM's but for `lr_img` .1
(the loss is quadratic with curvature 2/ipc, times the square of the augmentation's gain: DM's rate of 1
overshoots at ipc 1). With `augment=none` its optimum is the class mean (see `class_mean`), whatever the
network.
"""

from typing import Final

from ddray.methods.families.matching.means import MatchingConfig, means_method


class MMDPixelConfig(MatchingConfig):
    """MMD-pixel's settings: DM's."""

    lr_img: float = 0.1
    """Learning rate of the images (SGD)."""


METHOD: Final = means_method(
    MMDPixelConfig, lambda net, images: (images.flatten(1),), coupling=lambda config, arch: None
)
