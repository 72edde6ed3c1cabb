"""Minimax fine-tuning of a generator (Gu et al., CVPR 2024): representative and diverse latents of a class.

Beside the diffusion loss, the clean latents predicted at a random level are drawn towards the real latents of
their class that they resemble least (Eq 4), and away from the class's earlier predictions that they resemble
most (Eq 5). Both are compared with the last ones, which memories keep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddray.config import Config
from ddray.data import Split
from ddray.methods.families.diffusion.ancestral import (
    Coefficients,
    betas_of,
    clean_latents,
    respaced,
    split_output,
    variational_bound,
)
from ddray.methods.families.diffusion.fit import Checkpoint, TrainingStage
from ddray.methods.families.diffusion.model import DiffusionModel
from ddray.methods.families.diffusion.train import epoch_batch
from ddray.seeding import derive
from ddray.system.numerics import has_bf16
from ddray.system.transfer import to_device


class MinimaxRecipe(Config):
    """How a generator is fine-tuned; defaults are the paper's and its code's."""

    epochs: int = Field(default=8, ge=1)
    batch: int = Field(default=8, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate (AdamW, constant, without weight decay)."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the moving average of the weights, from the first step on; it is what is sampled."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of labels replaced by the null label."""
    lambda_r: float = Field(default=0.002, ge=0)
    """Weight of the representativeness term (Eq 4)."""
    lambda_d: float = Field(default=0.008, ge=0)
    """Weight of the diversity term (Eq 5)."""
    memory: int = Field(default=64, ge=1)
    """Real latents, and predictions, of each class that are remembered."""


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that fine-tuning changes, by name: biases and the classes' embeddings."""
    return {
        name: parameter
        for name, parameter in transformer.named_parameters()
        if name.endswith(".bias") or "class_embedder" in name
    }


def minimax_terms(
    latents: Tensor, groups: Tensor, real: Tensor, predicted: Tensor, filled: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both terms, a mean over the G classes of a batch each; scalars.

    Representativeness is 1 - the lowest cosine of a class's latents with its real ones, diversity the highest
    cosine with its earlier predictions, each over all pairs; 0 for a class without memories.

    Args:
        latents: predicted x0 [N, D].
        groups: the number of each one's class among those in the batch, 0..G-1, [N].
        real: the real latents that are remembered of each one's class, [N, M, D].
        predicted: likewise its predictions, [N, M, D].
        filled: whether there is a memory, [N, M].
    """
    unit = F.normalize(latents, dim=1)[:, None]
    to_real = (unit * F.normalize(real, dim=2)).sum(2)
    to_predicted = (unit * F.normalize(predicted, dim=2)).sum(2)
    # [G, N]; a class has as many memories whichever of its latents asks.
    outside = groups != torch.arange(len(groups), device=groups.device)[:, None]
    lowest = to_real.masked_fill(~filled, torch.inf).amin(1).expand_as(outside)
    highest = to_predicted.masked_fill(~filled, -torch.inf).amax(1).expand_as(outside)
    lowest = lowest.masked_fill(outside, torch.inf).amin(1)
    highest = highest.masked_fill(outside, -torch.inf).amax(1)
    num_classes = (~outside).any(1).sum()
    nothing = lowest.isinf()
    representativeness = torch.where(nothing, 0.0, 1 - lowest).sum() / num_classes
    return representativeness, torch.where(nothing, 0.0, highest).sum() / num_classes


class Memories:
    """The last real latents and predictions of every class, first in, first out.

    Attributes:
        real: [K, M, D], a ring per class, on the device.
        predicted: likewise.
        counts: how many of each class have joined so far, int64 [K] on the CPU.
    """

    def __init__(self, num_classes: int, size: int, dim: int, device: torch.device) -> None:
        self.real = torch.zeros(num_classes, size, dim, device=device)
        self.predicted = torch.zeros_like(self.real)
        self.counts = torch.zeros(num_classes, dtype=torch.int64)

    def terms(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return `minimax_terms` of predictions [N, D] of classes [N], which are on the CPU."""
        device, size = latents.device, self.real.shape[1]
        groups: Tensor = torch.unique(labels, return_inverse=True)[1]
        filled = torch.arange(size) < self.counts[labels, None]
        rows = to_device(labels, device)
        return minimax_terms(
            latents,
            to_device(groups, device),
            self.real[rows],
            self.predicted[rows],
            to_device(filled, device),
        )

    @torch.no_grad()
    def join(self, labels: Tensor, real: Tensor, predicted: Tensor) -> None:
        """Add real latents and predictions [N, D] of classes [N], which are on the CPU, in their order."""
        size, device = self.real.shape[1], self.real.device
        same = labels == labels[:, None]
        rank, num_new = same.tril(-1).sum(1), same.sum(1)
        last = (rank >= num_new - size).nonzero().flatten()  # no place is written twice
        slots = (self.counts[labels] + rank)[last] % size
        rows, slots, last = (to_device(index, device) for index in (labels[last], slots, last))
        self.real[rows, slots] = real.detach()[last]
        self.predicted[rows, slots] = predicted.detach()[last]
        self.counts += labels.bincount(minlength=len(self.counts))

    def state_dict(self) -> dict[str, Any]:
        """Return copies on the CPU."""
        tensors = {"real": self.real, "predicted": self.predicted, "counts": self.counts}
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.real.copy_(state["real"])
        self.predicted.copy_(state["predicted"])
        self.counts = state["counts"].clone()


@dataclass(frozen=True)
class Draws:
    """What a step of fine-tuning draws, on the CPU."""

    index: Tensor
    """Of the batch's images, [N]."""
    flipped: Tensor
    """Whether an image is mirrored, [N]."""
    steps: Tensor
    """The level of each, [N]."""
    dropped: Tensor
    """Whether its label is, [N]."""
    noise: Tensor
    """[N, D]."""
    posterior: Tensor
    """Of the real latents, [N, D]."""

    @classmethod
    def of(cls, seed: int, step: int, index: Tensor, *, dim: int, num_levels: int, dropout: float) -> "Draws":
        """Return a step's draws; they depend on the seed and the step alone."""
        generator, num = derive(seed, "minimax", step), len(index)
        return cls(
            index,
            torch.rand(num, generator=generator) < 0.5,
            torch.randint(num_levels, (num,), generator=generator),
            torch.rand(num, generator=generator) < dropout,
            *torch.randn(2, num, dim, generator=generator),
        )


@dataclass
class Finetuning:
    """Losses of the fine-tuning of a generator, in place."""

    model: DiffusionModel
    split: Split
    ids: Sequence[int]
    """The generator's label of each class."""
    recipe: MinimaxRecipe
    seed: int
    can_flip: bool
    """Whether images are mirrored."""

    def __post_init__(self) -> None:
        self.device = next(self.model.transformer.parameters()).device
        betas = betas_of(self.model)
        self._levels = respaced(betas, len(betas)).on(self.device)
        self._ids, self._bf16 = torch.tensor(list(self.ids)), has_bf16(self.device)
        channels, height, width = self.model.latent_shape
        self._dim = channels * height * width
        self.per_epoch = -(-len(self.split) // self.recipe.batch)
        self.memories = Memories(len(self.ids), self.recipe.memory, self._dim, self.device)

    def __call__(self, step: int) -> Tensor:
        """Return a step's loss; its latents join the memories."""
        recipe = self.recipe
        index = epoch_batch(self.seed, "minimax", step, self.per_epoch, len(self.split), recipe.batch)
        num_levels, dropout = len(self._levels.timesteps), recipe.label_dropout
        draws = Draws.of(self.seed, step, index, dim=self._dim, num_levels=num_levels, dropout=dropout)
        labels, steps = self.split.labels[index], to_device(draws.steps, self.device)
        clean, noise = self._encoded(draws), to_device(draws.noise, self.device)
        at = self._levels.at(steps)
        noisy = at.root_alpha * clean + at.root_noise * noise
        predicted, learned = self._predicted(noisy, steps, labels, draws.dropped)
        loss = F.mse_loss(predicted, noise)
        if learned is not None:
            first = (steps == 0)[:, None]
            loss = loss + variational_bound(clean, noisy, predicted.detach(), learned, at, first).mean()
        return loss + self._terms(noisy, predicted, at, labels, clean)

    @torch.no_grad()
    def _encoded(self, draws: Draws) -> Tensor:
        """Return a sample [N, D] of the posterior of each image, half of them mirrored, scaled."""
        pixels = to_device(self.split.images[draws.index], self.device).float() / 255
        if self.can_flip:
            flipped = to_device(draws.flipped, self.device)[:, None, None, None]
            pixels = torch.where(flipped, pixels.flip(3), pixels)
        posterior = self.model.vae.encode(self.model.fit(pixels)).latent_dist
        noise = to_device(draws.posterior, self.device)
        latents: Tensor = posterior.mean.flatten(1) + posterior.std.flatten(1) * noise
        return latents * float(self.model.vae.config.scaling_factor)

    def _predicted(
        self, noisy: Tensor, steps: Tensor, labels: Tensor, dropped: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return noise and v [N, D] that the network predicts; `labels` and `dropped` are on the CPU."""
        model = self.model
        labels = to_device(torch.where(dropped, model.num_classes, self._ids[labels]), self.device)
        shaped = torch.unflatten(noisy, 1, model.latent_shape)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            # In eval mode, or diffusers would drop labels too.
            output = model.transformer(shaped, timestep=steps, class_labels=labels).sample
        return split_output(output.float(), model.latent_shape[0])

    def _terms(
        self, noisy: Tensor, predicted: Tensor, at: Coefficients, labels: Tensor, clean: Tensor
    ) -> Tensor:
        """Return both terms with their weights; without any, nothing is remembered."""
        recipe = self.recipe
        if recipe.lambda_r == recipe.lambda_d == 0:
            return noisy.new_zeros(())
        latents = clean_latents(noisy, predicted, at)
        representativeness, diversity = self.memories.terms(latents, labels)
        self.memories.join(labels, clean, latents)
        return recipe.lambda_r * representativeness + recipe.lambda_d * diversity


def finetune(finetuning: Finetuning, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], float]:
    """Fine-tune a generator in place, from its checkpoint if there is one.

    Returns the weights that have changed, by name, and the last epoch's mean loss. DivergedError if a loss
    becomes NaN.
    """
    model, recipe = finetuning.model, finetuning.recipe
    parameters = trained_parameters(model.transformer)
    loss = TrainingStage(
        name="minimax diffusion transformer",
        net=model.transformer,
        optimizer=torch.optim.AdamW(parameters.values(), lr=recipe.lr, weight_decay=0.0),
        loss=finetuning,
        lr=lambda step: recipe.lr,
        per_epoch=finetuning.per_epoch,
        epochs=recipe.epochs,
        ema=recipe.ema,
        is_warm=False,
        trained=list(parameters.values()),
        memory=finetuning.memories,
    ).run(Checkpoint(checkpoint))
    return {name: parameter.detach() for name, parameter in parameters.items()}, loss
