"""The training of the moment matching networks, the conditional GAN and BigGAN, step by step."""

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.methods.families.generative.config import BigGanRecipe, CganRecipe, GmmnRecipe
from ddray.methods.families.generative.fit import Average, RealImages, Training, descend
from ddray.methods.families.generative.losses import augmented, guarded_root, hinge, mirrored, mmd2
from ddray.methods.families.generative.nets import (
    ClassPerceptrons,
    PlainDiscriminator,
    PlainGenerator,
    ResidualDiscriminator,
    ResidualGenerator,
    folded_state,
)
from ddray.seeding import derive
from ddray.training.operations import NUM_COLUMNS

_MOMENTUM: Final = (0.9, 0.99)
_DROP: Final = 4  # of the steps a quarter is at the full rate


def placed(nets: Mapping[str, nn.Module], device: torch.device) -> nn.ModuleDict:
    """Return networks on a device, channels-last, in train mode."""
    return nn.ModuleDict(nets).to(device).to(memory_format=torch.channels_last).train()


def rows_for(num: int, generator: torch.Generator) -> Tensor:
    """Return uniform draws [num, 11] for the augmentation of images."""
    return torch.rand(num, NUM_COLUMNS, generator=generator, device=generator.device)


def normal(num: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return normally distributed noise [num, dim]."""
    return torch.randn(num, dim, generator=generator, device=generator.device)


class MomentMatching(Training):
    """A network per class, all at once: the sum over classes of the root of the squared MMD."""

    loss_names: ClassVar = ("mmd",)

    def __init__(self, real: RealImages, recipe: GmmnRecipe) -> None:
        self._real, self._recipe, self.epochs = real, recipe, recipe.epochs
        labels = real.split.labels
        self._counts = torch.bincount(labels, minlength=real.num_classes)
        largest = int(self._counts.max())
        self._batch = min(recipe.batch, largest)
        self.per_epoch = -(-largest // self._batch)
        self._by_class = labels.argsort(stable=True)
        self._first = self._counts.cumsum(0) - self._counts
        self._net = ClassPerceptrons(
            real.shape, real.num_classes, noise_dim=recipe.noise_dim, hidden=recipe.hidden
        )
        self.nets = placed({"generator": self._net}, real.device)
        parameters = list(self._net.parameters())
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=recipe.lr, momentum=_MOMENTUM[0])
            if recipe.optimizer == "sgd"
            else torch.optim.Adam(parameters, lr=recipe.lr)
        )
        self.optimizers = [optimizer]

    def update(self, step: int) -> Tensor:
        """Match a batch of every class; the loss is the mean over classes."""
        self._set_rate(step)
        generator, num_classes = self._real.draws(step), self._real.num_classes
        size = (num_classes, self._batch, self._recipe.noise_dim)
        noise = torch.rand(size, generator=generator, device=generator.device) * 2 - 1
        samples = self._net(noise)
        real, _ = self._real.take(self.index(step))
        pixels = (real.contiguous().view(num_classes, self._batch, -1) + 1) / 2
        distances = guarded_root(mmd2(pixels, samples, self._recipe.scales))
        return descend(self.optimizers[0], distances.sum())[None] / num_classes

    def index(self, step: int) -> Tensor:
        """Return the images of a step, [K * batch] on the CPU, class by class; drawn with repetition."""
        generator = derive(self._real.seed, "batch", step)
        uniform = torch.rand(len(self._counts), self._batch, generator=generator)
        places = (uniform * self._counts[:, None]).long()
        places = torch.minimum(places, self._counts[:, None] - 1).clamp(min=0) + self._first[:, None]
        return self._by_class[places.flatten()]

    def _set_rate(self, step: int) -> None:
        """Set rate and momentum: a tenth, and .99, from a quarter of the steps on."""
        is_late = _DROP * step >= self.per_epoch * self.epochs
        group = self.optimizers[0].param_groups[0]
        group["lr"] = self._recipe.lr * (0.1 if is_late else 1.0)
        if self._recipe.optimizer == "sgd":
            group["momentum"] = _MOMENTUM[is_late]

    def generator_state(self) -> dict[str, Tensor]:
        return self._net.state_dict()


class ConditionalGan(Training):
    """Discriminator and generator by turns, on the logistic loss; the generator's is -log D(G(z, y), y)."""

    loss_names: ClassVar = ("generator", "discriminator")

    def __init__(self, real: RealImages, recipe: CganRecipe) -> None:
        self._real, self._recipe, self.epochs = real, recipe, recipe.epochs
        self.per_epoch = real.per_epoch(recipe.batch)
        shape, num_classes = real.shape, real.num_classes
        self._generator = PlainGenerator(shape, num_classes, width=recipe.width, noise_dim=recipe.noise_dim)
        self._critic = PlainDiscriminator(shape, num_classes, recipe.width)
        self.nets = placed({"generator": self._generator, "critic": self._critic}, real.device)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=recipe.lr, betas=(0.5, 0.999))
            for net in (self._generator, self._critic)
        ]

    def update(self, step: int) -> Tensor:
        """Take the discriminator's step on real images and samples of their classes, and the generator's."""
        images, labels = self._real.batch(step, self._recipe.batch)
        noise = normal(len(labels), self._recipe.noise_dim, self._real.draws(step))
        samples = self._generator(noise, labels)
        logits = self._critic(images, labels), self._critic(samples.detach(), labels)
        of_critic = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()
        of_critic = descend(self.optimizers[1], of_critic)
        self._critic.requires_grad_(False)
        of_generator = F.softplus(-self._critic(samples, labels)).mean()
        of_generator = descend(self.optimizers[0], of_generator)
        self._critic.requires_grad_(True)
        return torch.stack([of_generator, of_critic])

    def generator_state(self) -> dict[str, Tensor]:
        return self._generator.state_dict()


class BigGan(Training):
    """Steps of the discriminator on the hinge loss, then one of the generator, all images augmented."""

    loss_names: ClassVar = ("generator", "discriminator")

    def __init__(self, real: RealImages, recipe: BigGanRecipe) -> None:
        self._real, self._recipe, self.epochs = real, recipe, recipe.epochs
        self._batch = real.size_within(recipe.batch)
        self.per_epoch = max(1, real.per_epoch(recipe.batch) // recipe.critic_steps)
        shape, num_classes, width = real.shape, real.num_classes, recipe.width
        self._generator = ResidualGenerator(
            shape, num_classes, width=width, noise_dim=recipe.noise_dim, spectral=True
        )
        self._critic = ResidualDiscriminator(shape, num_classes, width)
        nets = placed({"generator": self._generator, "critic": self._critic}, real.device)
        self._average = Average(self._generator, recipe.ema, recipe.ema_start)
        nets["average"] = self._average.net
        self.nets = nets
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=recipe.lr, betas=(0.0, 0.999), eps=1e-6)
            for net in (self._generator, self._critic)
        ]

    def update(self, step: int) -> Tensor:
        """Take the discriminator's steps, each on a fresh real batch, and the generator's."""
        generator, losses = self._real.draws(step), []
        for turn in range(self._recipe.critic_steps):
            number = step * self._recipe.critic_steps + turn
            images, labels = self._real.batch(number, self._recipe.batch)
            if self._real.can_flip:
                images = mirrored(images, rows_for(len(images), generator))
            with torch.no_grad():
                samples, drawn = self._samples(generator)
            logits = self._judged(torch.cat([images, samples]), torch.cat([labels, drawn]), generator)
            real, fake = torch.split(logits, self._batch)
            losses.append(descend(self.optimizers[1], hinge(real, (fake, 1.0))))
        self._critic.requires_grad_(False)
        samples, drawn = self._samples(generator)
        loss = descend(self.optimizers[0], -self._judged(samples, drawn, generator).mean())
        self._critic.requires_grad_(True)
        self._average.update(step)
        return torch.stack([loss, torch.stack(losses).mean()])

    def _samples(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a batch of samples and their labels."""
        noise = normal(self._batch, self._recipe.noise_dim, generator)
        labels = self._real.labels_for(self._batch, generator)
        return self._generator(noise, labels), labels

    def _judged(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the discriminator's logits of images, under augmentation drawn for each."""
        if self._recipe.augment:
            images = augmented(images, rows_for(len(images), generator))
        logits: Tensor = self._critic(images.contiguous(memory_format=torch.channels_last), labels)
        return logits

    def generator_state(self) -> dict[str, Tensor]:
        return folded_state(self._average.net)
