"""Gradient matching (DC and DSA): the distance of two gradients, and the loops around it."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.distillation.method import DistillContext, Distiller, Target
from ddray.errors import one_line
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import (
    CHUNK_SHARE,
    ImagesConfig,
    ImagesEngine,
    chunks,
    step_graphs,
)
from ddray.methods.families.matching.groups import class_groups, image_bytes, rows_of
from ddray.nets import Net, is_per_sample
from ddray.nets.build import ExternalNet
from ddray.nets.features import CpuLayer
from ddray.training.dsa import DsaPlan

log = logging.getLogger(__name__)
Metric = Literal["layerwise", "mse", "cosine"]
_LOOPS: Final = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
_GRADIENTS: Final = 6  # as large as the weights, of each class: real, synthetic, their products and gradients
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
    """Return the distances [G] of the gradients of G classes, each [G, ...] per parameter.

    `layerwise` (DC, Eq 10 and its appendix): the sum over layers and output channels of 1 - cosine, where a
    convolution's gradient [O, I, h, w] has O rows of I*h*w; biases and normalisation layers do not count.
    Differentiable in `synthetic`.
    """
    if metric != "layerwise":
        a, b = (torch.cat([part.flatten(1) for part in gradient], 1) for gradient in (real, synthetic))
        return (a - b).square().sum(1) if metric == "mse" else 1 - F.cosine_similarity(a, b, dim=1)
    total = synthetic[0].new_zeros(len(synthetic[0]))
    for one, other in zip(real, synthetic, strict=True):
        if one.ndim > 2:
            a, b = one.flatten(2), other.flatten(2)
            total = total + (1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2) + 1e-6)).sum(1)
    return total


class _LayerNorm(nn.LayerNorm):
    """A layer norm of plain operations.

    Under vmap the gradient of PyTorch's has a wrong gradient itself: mean and deviation pass as constants
    (torch 2.15; functorch's issue 534).
    """

    def forward(self, input: Tensor) -> Tensor:
        axes = list(range(-len(self.normalized_shape), 0))
        centred = input - input.mean(axes, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(axes, keepdim=True) + self.eps)
        return centred * scale * self.weight + self.bias


class ClassGradients:
    """Gradients of a network's mean cross entropy on the images of each class, of several classes at once.

    One class is differentiated as it is, several by `torch.func.vmap` over them.

    Args:
        net: the network, none of whose layers mixes samples when it is called.
    """

    def __init__(self, net: Net) -> None:
        self._net = net
        self._template = copy.deepcopy(net).to("meta")
        for module in self._template.modules():
            if isinstance(module, CpuLayer):
                module.plain = True
            if isinstance(module, nn.LayerNorm):
                module.__class__ = _LayerNorm
            elif isinstance(module, _BatchNorm):
                module.eval()

    def __call__(self, images: Tensor, labels: Tensor, *, create_graph: bool = False) -> tuple[Tensor, ...]:
        """Return the gradients, [G, ...] for each parameter.

        Args:
            images: [G * n, C, H, W], n of each class.
            labels: the classes, int64 [G], on the images' device.
            create_graph: whether the gradients can be differentiated in the images.
        """
        with sdpa_kernel(SDPBackend.MATH):  # attention's other kernels have no second derivative
            return self._of_classes(images, labels, create_graph)

    def _of_classes(self, images: Tensor, labels: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        if len(labels) == 1:
            loss = F.cross_entropy(self._net(images), labels.expand(len(images)))
            gradients = torch.autograd.grad(loss, list(self._net.parameters()), create_graph=create_graph)
            return tuple(gradient[None] for gradient in gradients)
        params = {name: param.detach() for name, param in self._net.named_parameters()}
        buffers = dict(self._net.named_buffers())

        def loss_of(params: dict[str, Tensor], images: Tensor, label: Tensor) -> Tensor:
            logits = torch.func.functional_call(self._template, (params, buffers), (images,))
            return F.cross_entropy(logits, label.expand(len(images)))

        gradients_of = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0), randomness="different")
        by_class = torch.unflatten(images, 0, (len(labels), -1))
        with torch.set_grad_enabled(create_graph):
            return tuple(gradients_of(params, by_class, labels).values())

    def takes_several(self, images: Tensor, labels: Tensor) -> bool:
        """Return whether the network can be differentiated under vmap; try it, and warn if it can't.

        `images` and `labels` are those of a call.
        """
        images = images.detach().requires_grad_(True)
        try:
            gradients = self(images, labels, create_graph=True)
            torch.autograd.grad(torch.stack([part.square().sum() for part in gradients]).sum(), images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("classes are matched one by one (%s)", one_line(error, 200))
            return False
        return True


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
        self._gradients = ClassGradients(self._net)
        self._classes = torch.arange(self._batches.num_classes, device=ctx.device)
        self._groups, self._sample_bytes = self._divided()
        self._graphs, self._real_graphs = (step_graphs(ctx) for _ in range(2))

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
        """Match group after group of classes, and take one step of SGD; return the sum of their distances."""
        num_classes, ipc = self._batches.num_classes, self._ctx.ipc
        index, plan = self._branch.draw(generator)
        self._images.grad = torch.empty_like(self._images)
        total = torch.zeros((), device=self._images.device)
        for classes in self._groups:
            rows = rows_of(classes, ipc)
            images = self._images[rows].detach().requires_grad_(True)
            real = self._real_gradients(index.view(num_classes, -1)[classes], classes, plan)
            augmented = self._augmented(images, classes, plan)
            distance, outer = self._graphs(self._match, (augmented.detach(), self._classes[classes], *real))
            self._images.grad[rows] = torch.autograd.grad(augmented, images, outer)[0]
            total += distance
        self._optimizer.step()
        return total

    def _real_gradients(self, index: Tensor, classes: slice, plan: DsaPlan | None) -> list[Tensor]:
        """Return the mean gradients over real images `index` [G, n] of each class, chunk by chunk."""
        total: list[Tensor] = []
        group_bytes = len(index) * self._sample_bytes
        for columns in chunks(index.shape[1], group_bytes, self._classes.device, self._branch.budget):
            part = index[:, columns]
            share = part.shape[1] / index.shape[1]
            images = self._batches.take(part.flatten())
            images = self._augmented(images, classes, plan)
            gradients = self._real_graphs(self._gradients, (images, self._classes[classes]))
            if total:
                total = [old.add_(new, alpha=share) for old, new in zip(total, gradients, strict=True)]
            else:
                total = [share * new for new in gradients]
        return total

    def _augmented(self, images: Tensor, classes: slice, plan: DsaPlan | None) -> Tensor:
        """Return images [G * n, C, H, W] of classes under their parameters."""
        labels = torch.arange(classes.start, classes.stop)
        return self._branch.augmented(images, plan, labels.repeat_interleave(len(images) // len(labels)))

    def _match(self, images: Tensor, labels: Tensor, *real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the classes' distances on augmented images [G * ipc, ...], and its gradient."""
        images = images.detach().requires_grad_(True)
        synthetic = self._gradients(images, labels, create_graph=True)
        distance = gradient_distance(real, synthetic, metric=self._config.metric).sum()
        return distance.detach(), torch.autograd.grad(distance, images)[0]

    def _divided(self) -> tuple[list[slice], int]:
        """Return the groups of classes that are matched at once, and bytes for the chunks of real images.

        On a CPU a class is a group: its maps stay in the cache.
        """
        branch, num_classes, ipc = self._branch, self._batches.num_classes, self._ctx.ipc
        one_by_one = [slice(label, label + 1) for label in range(num_classes)]
        if self._images.device.type == "cpu" or isinstance(self._net, ExternalNet):
            return one_by_one, branch.sample_bytes
        label, params = self._classes[:1], list(self._net.parameters())
        blank = torch.zeros_like(self._images[:ipc]).contiguous(memory_format=torch.channels_last)

        def measured(forward: Callable[[Tensor], Any]) -> int:
            return image_bytes(forward, blank, branch.sample_bytes, params)

        self._net.eval()
        image = measured(lambda images: self._gradients(images, label, create_graph=True))
        real_image = measured(lambda images: F.cross_entropy(self._net(images), label.expand(ipc)))
        self._net.train()
        weights = sum(param.numel() * param.element_size() for param in params)
        groups = class_groups(num_classes, ipc * image + _GRADIENTS * weights, branch.budget)
        pair = torch.zeros(2, *self._net.image_shape, device=blank.device)
        if len(groups) < num_classes and not self._gradients.takes_several(pair, self._classes[:2]):
            groups = one_by_one
        return groups, max(branch.sample_bytes, real_image // CHUNK_SHARE)

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


_COUPLING: Final = "its inner network is trained on the images of all classes"


def gradient_method(config_class: type[GradientConfig], evaluate: dict[str, Any]) -> type[Distiller]:
    """Return a method that matches gradients, whose sets are scored by the settings `evaluate`."""

    def preset(name: str, target: Target) -> dict[str, Any]:
        outer, inner = loops(target.ipc)
        method = {"outer_loop": outer, "inner_loop": inner}
        return {"steps": 1000, "evaluate": evaluate, "method": method}

    return make_method(config_class, preset, GradientMatching, coupling=_COUPLING)
