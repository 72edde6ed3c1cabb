"""Gradient matching (DC and DSA): the distance of two gradients, and the loops around it."""

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.distillation.method import DistillContext, Distiller, Target
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import ImagesConfig, ImagesEngine
from ddray.nets import is_per_sample
from ddray.training.dsa import DsaPlan

Metric = Literal["layerwise", "mse", "cosine"]
_LOOPS: Final = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
_STATISTICS_IMAGES: Final = 16  # real images per class that batch norm's statistics are fixed on


class GradientConfig(ImagesConfig):
    """Settings of the methods that match gradients."""

    quick: ClassVar = {"batch_real": 8, "batch_train": 16}

    batch_real: int = Field(default=256, ge=1)
    """Real images per class and update; never more than the smallest class of at least ipc images has."""
    metric: Metric = "layerwise"
    """Distance of gradients: cosine by layer and output (the papers'), squared, or cosine of all in one."""
    outer_loop: int = Field(default=1, ge=1)
    """Updates of the images per network."""
    inner_loop: int = Field(default=1, ge=1)
    """Epochs that the network is trained on the images between two updates."""
    lr_net: float = Field(default=0.01, gt=0)
    """Learning rate of the network (SGD without momentum)."""
    batch_train: int = Field(default=256, ge=1)
    """Synthetic images per batch of its training."""


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor], *, metric: Metric) -> Tensor:
    """Return the distance of two gradients, each a tensor per parameter.

    `layerwise` (DC, Eq 10 and its appendix): the sum over layers and output channels of 1 - cosine, where a
    convolution's gradient [O, I, h, w] has O rows of I*h*w; biases and normalisation layers do not count.
    Differentiable in `synthetic`.
    """
    if metric != "layerwise":
        a, b = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (real, synthetic))
        return (a - b).square().sum() if metric == "mse" else 1 - F.cosine_similarity(a, b, dim=0)
    total = synthetic[0].new_zeros(())
    for one, other in zip(real, synthetic, strict=True):
        if one.ndim > 1:
            a, b = one.flatten(1), other.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def loops(ipc: int) -> tuple[int, int]:
    """Return the published (outer, inner) loops; other ipc take those of the next lower one."""
    return _LOOPS[max(published for published in _LOOPS if published <= ipc)]


class GradientMatching(ImagesEngine):
    """Images learned so that their gradients match the real ones' while a network is trained on them."""

    def __init__(self, ctx: DistillContext, config: GradientConfig) -> None:
        super().__init__(ctx, config)
        self._config = config
        self._net, self._batches = self._branch.net, self._branch.batches
        self._mixes = not is_per_sample(self._net)

    def step(self) -> dict[str, Tensor]:
        """Draw a network, then take turns: update the images, train the network on them."""
        config = self._config
        epochs, lr, batch = config.inner_loop, config.lr_net, config.batch_train
        self._step += 1
        self._branch.renew(self._step)
        total = torch.zeros((), device=self._images.device)
        for outer in range(1, config.outer_loop + 1):
            generator = self._ctx.generator("step", self._step, outer)
            self._net.train()
            if self._mixes:
                self._fix_statistics(generator)
            total += self._update_images(generator)
            if outer < config.outer_loop:
                self._branch.train(self._images.detach(), self._labels, generator, epochs, lr, batch)
        return {"loss": total / (config.outer_loop * self._batches.num_classes)}

    def _update_images(self, generator: torch.Generator) -> Tensor:
        """Match class by class, and take one step of SGD; return the loss."""
        num_classes, ipc = self._batches.num_classes, self._ctx.ipc
        index, plan = self._branch.draw(generator)
        self._images.grad = torch.empty_like(self._images)
        total = torch.zeros((), device=self._images.device)
        for label, class_index in enumerate(index.view(num_classes, -1)):
            rows = slice(label * ipc, (label + 1) * ipc)
            class_images = self._images[rows].detach().requires_grad_(True)
            real = self._real_gradient(class_index, label, plan)
            augmented = self._branch.augmented(class_images, plan, torch.full((ipc,), label))
            synthetic = self._gradient(augmented, label, create_graph=True)
            distance = gradient_distance(real, synthetic, metric=self._config.metric)
            self._images.grad[rows] = torch.autograd.grad(distance, class_images)[0]
            total += distance.detach()
        self._optimizer.step()
        return total

    def _real_gradient(self, index: Tensor, label: int, plan: DsaPlan | None) -> list[Tensor]:
        """Return the mean gradient over real images of one class, chunk by chunk."""
        total: list[Tensor] = []
        for _, images in self._branch.chunks(index, plan, torch.full((len(index),), label)):
            share = len(images) / len(index)
            gradient = self._gradient(images, label, create_graph=False)
            if total:
                total = [old.add_(new, alpha=share) for old, new in zip(total, gradient, strict=True)]
            else:
                total = [share * new for new in gradient]
        return total

    def _gradient(self, images: Tensor, label: int, *, create_graph: bool) -> tuple[Tensor, ...]:
        """Return the gradient of the mean cross entropy of images of one class, a tensor per parameter."""
        labels = torch.full((len(images),), label, device=images.device)
        loss = F.cross_entropy(self._net(images), labels)
        return torch.autograd.grad(loss, list(self._net.parameters()), create_graph=create_graph)

    @torch.no_grad()
    def _fix_statistics(self, generator: torch.Generator) -> None:
        """Fix batch norm's statistics on real images: one synthetic image per class gives no usable ones."""
        batches = self._batches
        index = batches.draw(generator).view(batches.num_classes, -1)[:, :_STATISTICS_IMAGES]
        images = batches.take(index.flatten())
        self._net(images.contiguous(memory_format=torch.channels_last))
        for module in self._net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def gradient_method(config_class: type[GradientConfig], evaluate: dict[str, Any]) -> type[Distiller]:
    """Return a method that matches gradients, whose sets are scored by the settings `evaluate`."""

    def preset(name: str, target: Target) -> dict[str, Any]:
        outer, inner = loops(target.ipc)
        method = {"outer_loop": outer, "inner_loop": inner}
        return {"steps": 1000, "evaluate": evaluate, "method": method}

    return make_method(config_class, preset, GradientMatching)
