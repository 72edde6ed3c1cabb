"""DSA: dataset condensation with differentiable Siamese augmentation (Zhao & Bilen, ICML 2021; Eq 5-7).

DC, with real and synthetic images of a class under the same augmentation parameters; the network's training
on the synthetic images and the evaluation are augmented too.

**Deviations** (paper and authors' code agree on every setting; both presets are the same)

- DC's, except for the evaluation, which is as published.
- augmentation seeds: wall clock | derived from the run's seed.
"""

from typing import Final, Literal

from ddray.methods.families.matching.gradients import GradientConfig, gradient_method


class DSAConfig(GradientConfig):
    """DSA's settings: DC's, with real initial images and augmentation."""

    init: Literal["random", "kcenter", "noise"] = "random"
    """Initial images: random real ones, k-center's choice, or Gaussian noise."""
    augment: Literal["dsa", "dsa_idc", "none"] = "dsa"
    """Siamese augmentation: the same parameters for real and synthetic images, a fresh draw per class."""


METHOD: Final = gradient_method(DSAConfig, {"epochs": 1000, "augment": "dsa"})
