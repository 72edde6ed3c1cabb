"""DC-VAE: samples of a dual contradistinctive autoencoder (Parmar et al., CVPR 2021, arXiv:2011.10063).

An autoencoder without a pixel loss: a discriminator tells real images from samples and reconstructions (the
set-level loss), and an instance's reconstruction must be nearer to it than to other images, in features of
the discriminator's first and last block (the instance-level loss, InfoNCE with a queue and a momentum
encoder). A set is ipc samples of each class. A row of DataDAM's supplement (Table 3), whose protocol is not
published: its numbers are not claimed.

**Deviations** (authors' code | ours)

- labels: dropped | the decoder's batch norm and the discriminator's projection are given the class, the
  encoder is not: a class's samples are then labelled, and no class has to do with its own images alone.
- networks: residual ones for 32 px | BigGAN's blocks for all sizes, spectrally normalised in decoder and
  discriminator; the encoder is the discriminator's trunk without it.
- weights: the discriminator's samples and reconstructions .5 each; the divergence 1e-6, summed over batch and
  units; each contrast .5 | the same; the coders' own two terms .5 each.
- contrast: 16 dimensions, 8,192 keys, temperature .07, momentum .999, in an optimiser step of its own for
  encoder, decoder and the discriminator's trunk | the same; the first block's maps are averaged over places.
- steps: 5 of the discriminator (64 images) for each of the others (128) | the same; an epoch is a pass of the
  discriminator over the images, its last steps left out if they are fewer than 5.
- epochs: 800, weights' average .999 | the same; settings for digits are ours.
- statistics of the decoder's batch norms, when it is sampled: averaged in training, over samples and
  reconstructions | of samples alone, taken after training: with the others, digits come out black.
"""

from typing import Any, ClassVar, Final

from ddray.distillation.method import Target
from ddray.methods.families.generative.config import DcVaeRecipe, GenerativeConfig
from ddray.methods.families.generative.pool import generative_method


class DcVaeConfig(GenerativeConfig):
    """DC-VAE's settings."""

    search_space: ClassVar = {
        "generator.lr": {"loguniform": [5e-5, 2e-3]},
        "generator.contrast_weight": {"choice": [0.1, 0.5, 1.0]},  # without it, it is no DC-VAE
        "generator.critic_steps": {"choice": [1, 2, 5]},
    }
    dataset_settings: ClassVar = {
        "digits": {
            "evaluate": {"epochs": 300},
            "method": {
                "generator": {
                    **{"epochs": 40, "batch": 24, "width": 6, "critic_steps": 2, "lr": 4e-4},
                    **{"ema": 0.98, "noise_dim": 32, "queue": 512},
                }
            },
        }
    }
    quick: ClassVar = {
        "generator": {
            **{"epochs": 1, "batch": 8, "width": 2, "noise_dim": 4, "critic_steps": 1},
            **{"contrast_dim": 2, "queue": 8},
        }
    }

    generator: DcVaeRecipe = DcVaeRecipe()
    """The networks, and how they are trained."""


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings; both presets are the authors' code's for CIFAR-10."""
    return {"steps": 0, "evaluate": {"epochs": 1000, "augment": "dsa"}}


METHOD: Final = generative_method("dc_vae", DcVaeConfig, preset)
