"""BigGAN: samples of a class-conditional GAN (Brock et al., ICLR 2019, arXiv:1809.11096) under DiffAugment.

Spectral norm in both networks, batch norm with gain and bias by class in the generator, the projection
discriminator, the hinge loss, and averaged weights; what the discriminator sees is augmented alike whether
real or sampled (Zhao et al., NeurIPS 2020, arXiv:2006.10738, Eq 2-3, translation and cutout). A set is ipc
samples of each class. A row of DataDAM's supplement (Table 3), whose protocol is not published: its numbers
are not claimed.

**Deviations** (BigGAN's paper | DiffAugment's code for CIFAR-10 | ours)

- attention, shared class embedding, noise for every block: yes | none | none.
- initial weights: orthogonal | N(0, .02), no orthogonal regularisation | the code's.
- discriminator's steps: 2 | 4, each on 50 fresh real images | the code's; an epoch is a pass of the
  discriminator over the images, its last steps left out if they are fewer than 4.
- Adam: 5e-5 and 2e-4 | 2e-4 both, betas 0 and .999, epsilon 1e-8 | the code's, epsilon 1e-6.
- average of weights: .9999 | the same, a copy until step 1,000 | the same, batch norm's statistics with them.
- sampling: standing statistics, truncation | standing statistics | the averaged running statistics, in eval
  mode, without truncation (as IT-GAN samples it).
- images: 128 px and more | 32 px, four blocks in the discriminator, the last two at 8 px | blocks by the
  images' size: the generator doubles 4 px until it covers them, the discriminator halves once less.
- flips of real images: yes | yes | only where a mirrored image keeps its class.
- epochs: - | 1,000 | 1,000; settings for digits are ours.
"""

from typing import Any, ClassVar, Final

from ddray.distillation.method import Target
from ddray.methods.families.generative.config import BigGanRecipe, GenerativeConfig
from ddray.methods.families.generative.pool import generative_method


class BigGanConfig(GenerativeConfig):
    """BigGAN's settings."""

    search_space: ClassVar = {
        "generator.lr": {"loguniform": [5e-5, 2e-3]},
        "generator.critic_steps": {"choice": [1, 2, 4]},
        "generator.augment": {"choice": [True, False]},
    }
    dataset_settings: ClassVar = {
        "digits": {
            "evaluate": {"epochs": 300},
            "method": {
                "generator": {
                    **{"epochs": 40, "batch": 32, "width": 8, "critic_steps": 2, "lr": 4e-4},
                    **{"ema": 0.98, "ema_start": 100, "noise_dim": 32},
                }
            },
        }
    }
    quick: ClassVar = {"generator": {"epochs": 1, "batch": 8, "width": 2, "noise_dim": 4, "critic_steps": 1}}

    generator: BigGanRecipe = BigGanRecipe()
    """The networks, and how they are trained."""


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings; both presets are the code's for CIFAR-10."""
    return {"steps": 0, "evaluate": {"epochs": 1000, "augment": "dsa"}}


METHOD: Final = generative_method("biggan", BigGanConfig, preset)
