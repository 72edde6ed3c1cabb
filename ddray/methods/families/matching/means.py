"""Shared by the distribution-matching methods (DM, MMD-pixel, DataDAM): images that match class means.

A method supplies per-sample statistics of images [N, C, H, W] -> tuple of [N, D_l] and a loss on their
per-class means [K, D_l]; everything here is vectorised over classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.distillation.method import DistillContext, Distiller, Target
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import ImagesConfig, ImagesEngine, Statistics
from ddray.nets import Net
from ddray.system.numerics import current

MeansLoss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class MatchingConfig(ImagesConfig):
    """Settings of every method that learns images by matching means."""

    quick: ClassVar = {"batch_real": 8}

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
    if precision == "fp32" and not current().bf16("statistics"):
        return statistics

    def cast(net: Net, images: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            results = statistics(net, images)
        return tuple(values.float() for values in results)

    return cast


class MeanMatching(ImagesEngine):
    """Images learned so that class means of their statistics match the real ones; a fresh network per step.

    Args:
        ctx: what to work on.
        config: the shared settings.
        statistics: per-sample statistics of images under a network.
        loss: from real and synthetic class means [K, D_l] to a scalar.
    """

    _momentum = "momentum_buffer"

    def __init__(
        self, ctx: DistillContext, config: MatchingConfig, statistics: Statistics, loss: MeansLoss
    ) -> None:
        super().__init__(ctx, config)
        self._loss = loss
        self._branch.net.requires_grad_(False)
        self._labels_cpu = self._labels.cpu()
        self._statistics = statistics = in_precision(statistics, config.precision, ctx.device)
        self._real_statistics = torch.compile(statistics, dynamic=False) if ctx.compile else statistics

    def step(self) -> dict[str, Tensor]:
        """Draw a network and a batch, match, update the images."""
        branch, sizes = self._branch, (self._ctx.dataset.num_classes, self._ctx.ipc, -1)
        self._step += 1
        branch.renew(self._step)
        index, plan = branch.draw(self._ctx.generator("step", self._step))
        real = branch.class_means(index, plan, self._real_statistics)
        synthetic = self._statistics(branch.net, branch.augmented(self._images, plan, self._labels_cpu))
        loss = self._loss(real, [values.view(sizes).mean(1) for values in synthetic])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": loss.detach()}


def squared_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Return the sum over classes of ||mean real_c - mean syn_c||^2, for one statistic's means [K, D]."""
    return (real[0] - synthetic[0]).square().sum()


def means_method(config_class: type[MatchingConfig], statistics: Statistics) -> type[Distiller]:
    """Return a method that minimises `squared_distance` of class means of `statistics`.

    Args:
        config_class: its settings.
        statistics: per-sample statistic of images under a network, as a tuple of one [N, D].
    """

    def preset(name: str, target: Target) -> dict[str, Any]:
        return {"steps": 20_000, "evaluate": {"epochs": 1000, "augment": "dsa"}}

    def start(ctx: DistillContext, config: MatchingConfig) -> MeanMatching:
        return MeanMatching(ctx, config, statistics, squared_distance)

    return make_method(config_class, preset, start)
