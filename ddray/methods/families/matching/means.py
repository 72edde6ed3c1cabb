"""Shared by the distribution-matching methods (DM, MMD-pixel, DataDAM): images that match class means.

A method supplies per-sample statistics of images [N, C, H, W] -> tuple of [N, D_l] and a loss on their
per-class means [K, D_l]; everything here is vectorised over classes.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.distillation.method import DistillContext, Distiller, Target, coupling_by_norm
from ddray.distillation.shards import Part
from ddray.methods.families.factory import Coupling, make_method
from ddray.methods.families.matching.batches import ImagesConfig, ImagesEngine, Statistics, step_graphs
from ddray.methods.families.matching.initial import initial_specs
from ddray.nets import Net
from ddray.pool.spec import PoolSpec
from ddray.system.numerics import current
from ddray.training.compiled import compiled

MeansLoss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class MatchingConfig(ImagesConfig):
    """Settings of every method that learns images by matching means."""

    quick: ClassVar = {"batch_real": 8}
    compiles: ClassVar = True

    lr_img: float = Field(default=1.0, gt=0)
    """Learning rate of the images (SGD)."""
    init: Literal["random", "kcenter", "noise"] = "random"
    """Initial images: random real ones, k-center's choice, or Gaussian noise."""
    augment: Literal["dsa", "dsa_idc", "none"] = "dsa"
    """Siamese augmentation: the same parameters for real and synthetic images, a fresh draw per class."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast of the networks' forward pass; for GPUs (some CPUs take twice as long)."""


def in_precision(statistics: Statistics, precision: str, device: torch.device) -> Statistics:
    """Return `statistics` with the forward pass in `precision` and the results in float32."""
    if precision == "bf16":
        current().computed.add(True)
    elif not current().bf16("statistics"):
        return statistics

    def cast(net: Net, images: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            results = statistics(net, images)
        return tuple(values.float() for values in results)

    return cast


class MeanMatching(ImagesEngine):
    """Images learned so that class means of their statistics match the real ones; a fresh network per step.

    On CUDA what runs under the network are CUDA graphs: augmentation, whose operations a step draws, is not.

    Args:
        ctx: what to work on.
        config: the shared settings.
        statistics: per-sample statistics of images under a network.
        loss: from real and synthetic class means [K, D_l] to a scalar, a sum over whatever classes they are.
    """

    _momentum = "momentum_buffer"

    def __init__(
        self, ctx: DistillContext, config: MatchingConfig, statistics: Statistics, loss: MeansLoss
    ) -> None:
        super().__init__(ctx, config)
        self._loss = loss
        self._branch.net.requires_grad_(False)
        self._class_labels = self._labels.cpu()
        self._statistics = statistics = in_precision(statistics, config.precision, ctx.device)
        self._compiled = compiled(statistics, on=ctx.compile)
        self._real_graphs, self._graphs = (step_graphs(ctx) for _ in range(2))

    @cached_property
    def _groups(self) -> list[slice]:
        return self._branch.groups(self._forward, self._ctx.ipc)

    def grouped(self) -> Self:
        """Return itself, its classes in groups; InputError if the network lacks what it is matched in."""
        _ = self._groups
        return self

    def _forward(self, images: Tensor) -> Any:
        """Compute what a step does of images [N, C, H, W]: for the memory that it takes."""
        return self._statistics(self._branch.net, images)

    def step(self) -> dict[str, Tensor]:
        """Draw a network and a batch, match, update the images."""
        branch, groups = self._branch, self._groups
        self._step += 1
        branch.renew(self._step)
        index, plan = branch.draw(self._ctx.generator("step", self._step))
        gradient = torch.empty_like(self._images)
        total = torch.zeros((), device=gradient.device)
        for classes in groups:
            part = branch.part(classes, self._ctx.ipc)
            real = branch.class_means(index, plan, self._real_statistics, classes)
            images = self._images.detach()[part.here].requires_grad_(True)
            augmented = branch.augmented(images, plan, self._class_labels[part.here], classes)
            compute = partial(self._loss_and_gradient, part)
            args = (branch.padded(augmented.detach(), part), *real)
            loss, outer = compute(*args) if part.is_padded else self._graphs(compute, args)
            (gradient[part.here],) = torch.autograd.grad(augmented, images, part.without_blanks(outer))
            total += loss
        self._images.grad = gradient
        self._optimizer.step()
        return {"loss": total}

    def _real_statistics(self, net: Net, images: Tensor) -> tuple[Tensor, ...]:
        """Return `statistics` of real images, compiled or replayed where they can be."""
        results: tuple[Tensor, ...] = self._real_graphs(partial(self._compiled, net), (images,))
        return results

    def _loss_and_gradient(self, part: Part, images: Tensor, *real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a part of the augmented images [n, C, H, W], and its gradient.

        `images` are those of some classes [G * ipc, C, H, W], in a shard among blanks.
        """
        images = images.detach().requires_grad_(True)
        loss = self._loss_of(part, images, *real)
        return loss.detach(), torch.autograd.grad(loss, images)[0]

    def _loss_of(self, part: Part, images: Tensor, *real: Tensor) -> Tensor:
        """Return the loss of a part of the augmented images [n, C, H, W]."""
        synthetic = [part.without_blanks(values) for values in self._statistics(self._branch.net, images)]
        sizes = (len(real[0]), self._ctx.ipc, -1)
        return self._loss(real, [values.view(sizes).mean(1) for values in synthetic])


def squared_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Return the sum over classes of ||mean real_c - mean syn_c||^2, for one statistic's means [K, D]."""
    return (real[0] - synthetic[0]).square().sum()


def specs_of(ctx: DistillContext, config: ImagesConfig) -> list[PoolSpec]:
    """Return the pool entries that the initial images need."""
    return initial_specs(ctx, config.init)


def coupling_of(config: Config, arch: str) -> str | None:
    """Return why classes depend on each other where networks match in train mode."""
    return coupling_by_norm(arch)


def means_method(
    config_class: type[MatchingConfig], statistics: Statistics, coupling: Coupling | None = None
) -> type[Distiller]:
    """Return a method that minimises `squared_distance` of class means of `statistics`.

    Args:
        config_class: its settings.
        statistics: per-sample statistic of images under a network, as a tuple of one [N, D].
        coupling: as `make_method` takes it; default: not declared.
    """

    def preset(name: str, target: Target) -> dict[str, Any]:
        return {"steps": 20_000, "evaluate": {"epochs": 1000, "augment": "dsa"}}

    def start(ctx: DistillContext, config: MatchingConfig) -> MeanMatching:
        return MeanMatching(ctx, config, statistics, squared_distance).grouped()

    return make_method(config_class, preset, start, specs_of=specs_of, coupling=coupling)
