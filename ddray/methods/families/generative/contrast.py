"""The training of DC-VAE: an autoencoder whose reconstructions a discriminator and a contrast judge."""

from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.methods.families.generative.config import DcVaeRecipe
from ddray.methods.families.generative.fit import Average, RealImages, Training, descend
from ddray.methods.families.generative.losses import divergence, hinge, info_nce
from ddray.methods.families.generative.nets import (
    Encoder,
    ResidualDiscriminator,
    ResidualGenerator,
    Trunk,
    folded_state,
)
from ddray.methods.families.generative.systems import normal, placed
from ddray.seeding import derive

_SHARE: Final = 0.5  # weight of the samples, and of the reconstructions


class Comparer(nn.Module):
    """Embeds images for comparison: a trunk's first maps (their mean over places) and its last features.

    Each goes through a linear layer to length 1.
    """

    def __init__(self, trunk: Trunk, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.layers = nn.ModuleList([nn.Linear(trunk.channels, dim) for _ in range(2)])

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings [2, N, d]."""
        first, last = self.trunk(images)
        embedded = [layer(part) for layer, part in zip(self.layers, (first.mean((2, 3)), last), strict=True)]
        return F.normalize(torch.stack(embedded), dim=2)


class Queue(nn.Module):
    """The embeddings [2, Q, d] of the latest real images; at first random ones."""

    keys: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(2, size, dim), dim=2))

    def push(self, keys: Tensor, step: int) -> None:
        """Replace the oldest by the keys [2, N, d] of step number `step`, N the same in all of them."""
        size, num = self.keys.shape[1], keys.shape[1]
        places = (torch.arange(num, device=keys.device) + step * num) % size
        self.keys.index_copy_(1, places[-size:], keys[:, -size:])


class ContrastiveAutoencoder(Training):
    """By turns: the discriminator, encoder and decoder against it, and the contrast of instances."""

    loss_names: ClassVar = ("autoencoder", "discriminator", "contrast")

    def __init__(self, real: RealImages, recipe: DcVaeRecipe) -> None:
        self._real, self._recipe, self.epochs = real, recipe, recipe.epochs
        self.per_epoch = max(1, real.per_epoch(recipe.batch) // recipe.critic_steps)
        shape, num_classes, width = real.shape, real.num_classes, recipe.width
        self._encoder = Encoder(shape, width, recipe.noise_dim)
        self._decoder = ResidualGenerator(
            shape, num_classes, width=width, noise_dim=recipe.noise_dim, spectral=True
        )
        self._critic = ResidualDiscriminator(shape, num_classes, width)
        self._comparer = Comparer(self._critic.trunk, recipe.contrast_dim)
        self._queue = Queue(recipe.queue, recipe.contrast_dim)
        self.nets = placed(
            {
                "encoder": self._encoder,
                "decoder": self._decoder,
                "critic": self._critic,
                "comparer": self._comparer,
                "queue": self._queue,
            },
            real.device,
        )
        self._keys = Average(self._comparer, recipe.key_momentum)  # embeds the real images
        self._average = Average(self._decoder, recipe.ema)
        self.nets["key_comparer"], self.nets["average"] = self._keys.net, self._average.net
        coders = [*self._encoder.parameters(), *self._decoder.parameters()]
        critic = list(self._critic.parameters())
        self.optimizers = [
            torch.optim.Adam(parameters, lr=recipe.lr, betas=(0.0, 0.9))
            for parameters in (coders, critic, [*coders, *self._comparer.parameters()])
        ]

    def update(self, step: int) -> Tensor:
        """Take the discriminator's steps, one of encoder and decoder against it, and one on the contrast."""
        generator, turns = self._real.draws(step), self._recipe.critic_steps
        of_critic = [self._judge(step * turns + turn, generator) for turn in range(turns)]
        images, labels = self._real.batch(step, 2 * self._recipe.batch, "pairs")
        of_coders = self._deceive(images, labels, generator)
        of_contrast = self._compare(images, labels, generator, step)
        self._keys.update(step)
        self._average.update(step)
        return torch.stack([of_coders, torch.stack(of_critic).mean(), of_contrast])

    def _judge(self, number: int, generator: torch.Generator) -> Tensor:
        """Take a step of the discriminator on a real batch, its reconstructions and as many samples."""
        images, labels = self._real.batch(number, self._recipe.batch)
        with torch.no_grad():
            again = self._reconstruct(images, labels, generator)[0]
            samples, drawn = self._sample(len(images), generator)
        logits = self._critic(torch.cat([images, samples, again]), torch.cat([labels, drawn, labels]))
        real, fake, rebuilt = logits.chunk(3)
        return descend(self.optimizers[1], hinge(real, (fake, _SHARE), (rebuilt, _SHARE)))

    def _deceive(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Take a step of encoder and decoder against the discriminator, and on the divergence."""
        self._critic.requires_grad_(False)
        again, divergent = self._reconstruct(images, labels, generator)
        samples, drawn = self._sample(len(images), generator)
        fake, rebuilt = self._critic(torch.cat([samples, again]), torch.cat([drawn, labels])).chunk(2)
        loss = -_SHARE * (fake.mean() + rebuilt.mean()) + self._recipe.kl_weight * divergent
        loss = descend(self.optimizers[0], loss)
        self._critic.requires_grad_(True)
        return loss

    def _compare(self, images: Tensor, labels: Tensor, generator: torch.Generator, step: int) -> Tensor:
        """Take a step of encoder, decoder and trunk that tells whose reconstruction is whose."""
        queries = self._comparer(self._reconstruct(images, labels, generator)[0])
        with torch.no_grad():
            keys = self._keys.net(images)
        losses = [
            info_nce(*of_layer, self._recipe.temperature)
            for of_layer in zip(queries, keys, self._queue.keys, strict=True)
        ]
        loss = descend(self.optimizers[2], self._recipe.contrast_weight * torch.stack(losses).sum())
        self._queue.push(keys, step)
        return loss

    def _reconstruct(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return reconstructions from a draw of the latent units, and the units' divergence."""
        mean, log_variance = self._encoder(images)
        noise = normal(len(mean), mean.shape[1], generator)
        latent = mean + (0.5 * log_variance).exp() * noise
        return self._decoder(latent, labels), divergence(mean, log_variance)

    def _sample(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return samples and their labels."""
        labels = self._real.labels_for(num, generator)
        return self._decoder(normal(num, self._recipe.noise_dim, generator), labels), labels

    def generator_state(self) -> dict[str, Tensor]:
        # In training the decoder's batch norms average what they see of reconstructions too, whose latent
        # units are not distributed as those of samples are.
        generator = derive(self._real.seed, "statistics", device=self._real.device)
        num, dim = 2 * self._recipe.batch, self._recipe.noise_dim
        samples = [
            (normal(num, dim, generator), self._real.labels_for(num, generator))
            for _ in range(self._recipe.statistics_batches)
        ]
        return folded_state(self._average.net, samples)
