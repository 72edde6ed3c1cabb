"""Pool entries of kind `generator`, and the methods that sample them.

An entry is keyed by system, recipe, its own seed and the real images: runs of all seeds and sizes share it,
and draw their noise by their own seed. Training is saved about once a minute: a killed process goes on.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import Config
from ddray.data import Dataset, Split
from ddray.distillation.method import DistillContext, Distiller, Target
from ddray.errors import unknown
from ddray.methods.families.diffusion.fit import Checkpoint
from ddray.methods.families.diffusion.stages import forget_parts
from ddray.methods.families.factory import Selected, make_method
from ddray.methods.families.generative.config import (
    BigGanRecipe,
    CganRecipe,
    DcVaeRecipe,
    GenerativeConfig,
    GmmnRecipe,
)
from ddray.methods.families.generative.contrast import ContrastiveAutoencoder
from ddray.methods.families.generative.fit import RealImages, Training
from ddray.methods.families.generative.nets import ClassPerceptrons, PlainGenerator, ResidualGenerator, Shape
from ddray.methods.families.generative.systems import BigGan, ConditionalGan, MomentMatching
from ddray.methods.families.selection import apart
from ddray.pool.spec import PoolEntry, PoolSpec, transform_of
from ddray.seeding import derive_seed, forked_global
from ddray.system.files import home
from ddray.system.transfer import to_device

log = logging.getLogger(__name__)

KIND: Final = "generator"
_BATCH: Final = 256
_PREFIX: Final = "weights."

PresetOf = Callable[[str, Target], dict[str, Any]]


@dataclass(frozen=True)
class System:
    """How a system is trained, and how what was trained is opened and sampled.

    Attributes:
        recipe: its settings.
        training: makes networks and optimisers, from the global generator.
        opened: makes the network to sample, for images of a shape and K classes.
        is_uniform: whether the noise is uniform in [-1, 1], not normal.
    """

    recipe: type[Any]
    training: Callable[[RealImages, Any], Training]
    opened: Callable[[Shape, int, Any], nn.Module]
    is_uniform: bool = False


def _residual(shape: Shape, num_classes: int, recipe: BigGanRecipe | DcVaeRecipe) -> nn.Module:
    return ResidualGenerator(
        shape, num_classes, width=recipe.width, noise_dim=recipe.noise_dim, spectral=False
    )


def _plain(shape: Shape, num_classes: int, recipe: CganRecipe) -> nn.Module:
    return PlainGenerator(shape, num_classes, width=recipe.width, noise_dim=recipe.noise_dim)


def _perceptrons(shape: Shape, num_classes: int, recipe: GmmnRecipe) -> nn.Module:
    return ClassPerceptrons(shape, num_classes, noise_dim=recipe.noise_dim, hidden=recipe.hidden)


SYSTEMS: Final[Mapping[str, System]] = {
    "gmmn": System(GmmnRecipe, MomentMatching, _perceptrons, is_uniform=True),
    "cgan": System(CganRecipe, ConditionalGan, _plain),
    "biggan": System(BigGanRecipe, BigGan, _residual),
    "dc_vae": System(DcVaeRecipe, ContrastiveAutoencoder, _residual),
}


def generator_spec(ctx: DistillContext, system: str, recipe: Config, seed: int) -> PoolSpec:
    """Return the spec of a system trained on the real images that are distilled, with a seed of its own."""
    dataset = ctx.dataset
    return PoolSpec(
        kind=KIND,
        dataset=dataset.fingerprint,
        split=ctx.split_name,
        transform=transform_of(dataset, "raw"),
        arch=system,
        recipe=recipe.dump(),
        seed=seed,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        device=ctx.device.type,
    )


def train_generator(
    dataset: Dataset, split: Split, device: torch.device, spec: PoolSpec
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train a spec's system on real images; return the tensors to store and the last epoch's mean losses.

    InputError if the images are spectrograms or the system is unknown, DivergedError if a loss becomes NaN.
    """
    if spec.arch not in SYSTEMS:
        raise unknown("generator", spec.arch, SYSTEMS)
    system = SYSTEMS[spec.arch]
    recipe = system.recipe.parse(spec.recipe, prefix="recipe.")
    seed = derive_seed(spec.seed, "generator", spec.arch)
    real = RealImages(split, dataset.num_classes, dataset.can_flip, seed, device)
    with forked_global(derive_seed(seed, "build")):
        training = system.training(real, recipe)
    losses = training.run(Checkpoint(_checkpoint(spec)))
    weights = {f"{_PREFIX}{name}": tensor for name, tensor in training.generator_state().items()}
    measured = {f"{name}_loss": loss for name, loss in losses.items()}
    return weights, {**measured, "dataset_name": dataset.name}


def _checkpoint(spec: PoolSpec) -> Path:
    """Return the file of an incomplete entry, where `forget_parts` removes it."""
    return home() / "parts" / spec.key / "checkpoint.pt"


def open_generator(entry: PoolEntry, device: torch.device) -> nn.Module:
    """Return an entry's generator, in eval mode."""
    spec = PoolSpec.parse(entry.meta["spec"])
    system = SYSTEMS[spec.arch]
    with forked_global(0):
        net = system.opened(spec.image_shape, spec.num_classes, system.recipe.parse(spec.recipe))
    net.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in entry.tensors.items()})
    return net.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def sample_class(net: nn.Module, noise: Tensor, label: int, shape: Shape) -> Tensor:
    """Return a class's samples [n, C, H, W] in [0, 1] of noise [n, d], batch by batch."""
    parts = []
    for part in torch.split(noise, _BATCH):
        if isinstance(net, ClassPerceptrons):
            label_of = torch.full((1,), label, device=noise.device)
            parts.append(net(part[None], label_of).view(-1, *shape))
        else:
            labels = torch.full((len(part),), label, device=noise.device)
            parts.append((net(part, labels) + 1) / 2)
    return torch.cat(parts)


@dataclass(frozen=True)
class Sampled(Selected):
    """A set of samples; its row says how long the generator was trained."""

    num_epochs: int = 0

    @property
    def measures(self) -> dict[str, float]:
        """Epochs of the generator's training."""
        return {"generator_epochs": float(self.num_epochs)}


def draw_set(ctx: DistillContext, entry: PoolEntry) -> DistilledSet:
    """Return ipc samples of each class as a set.

    A class's noise depends on the seed and the class, and its samples are computed alone: it is the same in
    every shard.
    """
    system, spec = SYSTEMS[entry.meta["spec"]["arch"]], PoolSpec.parse(entry.meta["spec"])
    net, images = open_generator(entry, ctx.device), []
    for label in ctx.classes:
        generator, size = ctx.generator("noise", label), (ctx.ipc, int(spec.recipe["noise_dim"]))
        noise = (
            torch.rand(size, generator=generator) * 2 - 1
            if system.is_uniform
            else torch.randn(size, generator=generator)
        )
        images.append(sample_class(net, to_device(noise, ctx.device), label, ctx.dataset.image_shape))
    pixels = torch.cat(images).contiguous().cpu()
    labels = torch.arange(ctx.classes.start, ctx.classes.stop).repeat_interleave(ctx.ipc)
    distilled = ctx.make_set(ctx.space.encode(pixels), labels)
    return replace(distilled, meta=distilled.meta.model_copy(update={"generator": spec.key}))


def generative_method(name: str, config_class: type[GenerativeConfig], preset: PresetOf) -> type[Distiller]:
    """Return the method that samples a system of `SYSTEMS`: ipc images of each class, in no step."""

    def specs(ctx: DistillContext, config: Any) -> list[PoolSpec]:
        return [generator_spec(ctx, name, config.generator, config.generator_seed)]

    def start(ctx: DistillContext, config: Any) -> Sampled:
        needed = specs(ctx, config)
        entry = ctx.pool.get(needed)[0]
        forget_parts(needed)
        epochs = config.generator.epochs
        log.info("%s: %d samples a class of a generator of %d epochs", name, ctx.ipc, epochs)
        return Sampled(draw_set(ctx, entry), num_epochs=epochs)

    return make_method(config_class, preset, start, specs_of=specs, has_steps=False, coupling=apart)
