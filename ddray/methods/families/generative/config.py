"""Settings of the generators' training, and of the methods that sample them."""

from typing import Literal

from pydantic import Field

from ddray.config import Config
from ddray.distillation.method import MethodConfig


class GmmnRecipe(Config):
    """How the moment matching networks are trained; defaults are the authors' code's on CIFAR-10."""

    epochs: int = Field(default=8000, ge=1)
    """Passes over the largest class: 40,000 steps of CIFAR-10's 5,000 images a class."""
    batch: int = Field(default=1000, ge=2)
    """Real images, and as many samples, of each class in a step; never more than the largest class has."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD, its momentum .9 and .99 from a quarter of the steps on; or Adam."""
    lr: float = Field(default=2.0, gt=0)
    """Learning rate; a tenth of it from a quarter of the steps on."""
    noise_dim: int = Field(default=10, ge=1)
    """Inputs, uniform in [-1, 1]."""
    hidden: tuple[int, ...] = Field(default=(64, 256, 256, 1024), min_length=1)
    """Widths of the hidden layers."""
    scales: tuple[float, ...] = Field(default=(2.0, 5.0, 10.0, 20.0, 40.0, 80.0), min_length=1)
    """s of the kernel, the sum of exp(-d^2 / 2s) over pixels in [0, 1]."""


class CganRecipe(Config):
    """How the conditional GAN is trained."""

    epochs: int = Field(default=200, ge=1)
    """Passes over the real images."""
    batch: int = Field(default=100, ge=2)
    """Real images in a step, and as many samples."""
    lr: float = Field(default=2e-4, gt=0)
    """Learning rate of both networks (Adam, betas .5 and .999)."""
    noise_dim: int = Field(default=100, ge=1)
    """Inputs besides the class, normally distributed."""
    width: int = Field(default=128, ge=2, multiple_of=2)
    """Channels at a quarter of the images' side; half of them at half of it."""


class BigGanRecipe(Config):
    """How BigGAN is trained; defaults are DiffAugment's code's on CIFAR-10."""

    epochs: int = Field(default=1000, ge=1)
    """Passes of the discriminator over the real images."""
    batch: int = Field(default=50, ge=2)
    """Real images in a discriminator's step; the generator's samples as many in each of its steps."""
    critic_steps: int = Field(default=4, ge=1)
    """Steps of the discriminator for each of the generator's."""
    lr: float = Field(default=2e-4, gt=0)
    """Learning rate of both networks (Adam, betas 0 and .999)."""
    noise_dim: int = Field(default=128, ge=1)
    """Inputs besides the class, normally distributed."""
    width: int = Field(default=64, ge=1)
    """A quarter of the channels of every block."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the moving average of the generator's weights, which is what is sampled."""
    ema_start: int = Field(default=1000, ge=0)
    """The generator's steps before; the average is a copy until then."""
    augment: bool = True
    """Whether the discriminator sees all images under DiffAugment's translation and cutout."""


class DcVaeRecipe(Config):
    """How DC-VAE is trained; defaults are the authors' code's on CIFAR-10."""

    epochs: int = Field(default=800, ge=1)
    """Passes of the discriminator over the real images."""
    batch: int = Field(default=64, ge=2)
    """Real images in a discriminator's step; twice as many in the others, as far as there are."""
    critic_steps: int = Field(default=5, ge=1)
    """Steps of the discriminator for each of encoder and decoder."""
    lr: float = Field(default=2e-4, gt=0)
    """Learning rate of all networks (Adam, betas 0 and .9)."""
    noise_dim: int = Field(default=128, ge=1)
    """Latent units."""
    width: int = Field(default=64, ge=1)
    """A quarter of the channels of every block."""
    kl_weight: float = Field(default=1e-6, ge=0)
    """Weight of the divergence, summed over batch and units."""
    contrast_weight: float = Field(default=0.5, ge=0)
    """Weight of each contrastive loss, after the first block and after the last."""
    contrast_dim: int = Field(default=16, ge=1)
    """Dimensions that images are compared in."""
    queue: int = Field(default=8192, ge=1)
    """Earlier real images that a reconstruction must tell from its own."""
    temperature: float = Field(default=0.07, gt=0)
    """What cosines are divided by."""
    key_momentum: float = Field(default=0.999, ge=0, le=1)
    """Decay of the moving average of the discriminator that embeds the real images."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the moving average of the decoder's weights, which is what is sampled."""
    statistics_batches: int = Field(default=50, ge=1)
    """Batches of samples that give its batch norms their statistics, once it is trained."""


class GenerativeConfig(MethodConfig):
    """What all methods that sample a generator have; each adds its `generator`."""

    generator_seed: int = Field(default=0, ge=0)
    """Seed of the generator's training; runs of all seeds share the generator and sample it anew."""
