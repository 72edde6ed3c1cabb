"""GMMN: samples of generative moment matching networks (Li et al., ICML 2015, arXiv:1502.02761; Eq 3).

A perceptron for every class maps uniform noise to pixels; what is minimised is the root of the squared
maximum mean discrepancy between a batch of its samples and one of real images, under a sum of Gaussian
kernels. A set is ipc samples of each class. A row of DataDAM's supplement (Table 3), whose protocol is not
published: its numbers are not claimed.

**Deviations** (paper | authors' code | ours)

- bandwidths: a mixture | exp(-d^2 / 2s), s = 2, 5, 10, 20, 40, 80: s, not s^2 | the code's.
- estimate: biased | biased, its root in the loss, scaled by 1,000 over 1,000 samples | the same; the root's
  gradient is 0 where rounding leaves nothing below it.
- classes: none | none | a network per class, all trained at once: the sum of their losses has each one's own
  gradient.
- batch: - | 1,000 images in passes over all of them | as many of each class, drawn with repetition; no more
  than the largest class has.
- steps: - | 40,000, SGD 2 and momentum .9, from 10,000 on .2 and .99 | the same on CIFAR-10, a quarter at the
  full rate elsewhere; digits: Adam.
- the autoencoder's code space (GMMN+AE): half of the paper | - | not built.
- initial weights: - | - | PyTorch's of linear layers.
"""

from typing import Any, ClassVar, Final

from ddray.distillation.method import Target
from ddray.methods.families.generative.config import GenerativeConfig, GmmnRecipe
from ddray.methods.families.generative.pool import generative_method

_STEPS: Final = 40_000
# Images of the largest class.
_PER_CLASS: Final = {
    **{"mnist": 6742, "fashion_mnist": 6000, "svhn": 13_861},
    **{"cifar100": 500, "tiny_imagenet": 500, "imagenette": 993},
}
_CIFAR10: Final = 5000


class GmmnConfig(GenerativeConfig):
    """GMMN's settings."""

    search_space: ClassVar = {
        "generator.lr": {"loguniform": [0.0001, 10.0]},  # Adam's rates, and SGD's
        "generator.noise_dim": {"choice": [10, 32]},
    }
    dataset_settings: ClassVar = {
        "digits": {
            "evaluate": {"epochs": 300},
            "method": {
                "generator": {
                    **{"epochs": 400, "batch": 64, "hidden": [64, 256]},
                    **{"optimizer": "adam", "lr": 1e-3},
                }
            },
        }
    }
    quick: ClassVar = {"generator": {"epochs": 1, "batch": 4, "hidden": [8]}}

    generator: GmmnRecipe = GmmnRecipe()
    """The networks, and how they are trained."""


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings; both presets are the authors' code's, of about 40,000 steps on known datasets."""
    per_epoch = -(-_PER_CLASS.get(target.dataset, _CIFAR10) // GmmnRecipe().batch)
    generator = {"epochs": _STEPS // per_epoch}
    return {"steps": 0, "evaluate": {"epochs": 1000, "augment": "dsa"}, "method": {"generator": generator}}


METHOD: Final = generative_method("gmmn", GmmnConfig, preset)
