"""cGAN: samples of a conditional adversarial network (Mirza & Osindero 2014, arXiv:1411.1784; Eq 2).

Generator and discriminator are both given the class. A set is ipc samples of each class. A row of DataDAM's
supplement (Table 3), whose protocol is not published: its numbers are not claimed, and which network made its
CIFAR-10 row is not said.

**Deviations** (paper | ours)

- networks: fully connected, maxout in the discriminator, dropout | convolutional (DCGAN's layers): the class
  joins the noise as a one-hot vector, and the image as a map per class.
- noise: 100 numbers, uniform in [0, 1] | normal.
- generator's loss: log(1 - D(G(z, y), y)) | -log D(G(z, y), y), which does not saturate.
- optimiser: SGD .1, falling, momentum .5 to .7 | Adam 2e-4, betas .5 and .999; batch 100.
- epochs: stopped by the likelihood of validation images | fixed; the last weights are sampled, in eval mode.
- labels of the samples in a step: drawn | those of its real batch.
"""

from typing import Any, ClassVar, Final

from ddray.distillation.method import Target
from ddray.methods.families.generative.config import CganRecipe, GenerativeConfig
from ddray.methods.families.generative.pool import generative_method


class CganConfig(GenerativeConfig):
    """cGAN's settings."""

    search_space: ClassVar = {
        "generator.lr": {"loguniform": [5e-5, 2e-3]},
        "generator.epochs": {"choice": [100, 200, 400]},
    }
    dataset_settings: ClassVar = {
        "digits": {
            "evaluate": {"epochs": 300},
            "method": {"generator": {"epochs": 100, "batch": 64, "width": 32, "lr": 1e-3}},
        }
    }
    quick: ClassVar = {"generator": {"epochs": 1, "batch": 8, "width": 8, "noise_dim": 4}}

    generator: CganRecipe = CganRecipe()
    """The networks, and how they are trained."""


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings; there is no authors' code, so both presets are the same."""
    return {"steps": 0, "evaluate": {"epochs": 1000, "augment": "dsa"}}


METHOD: Final = generative_method("cgan", CganConfig, preset)
