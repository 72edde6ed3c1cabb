"""Recovery: images whose statistics, in every batch norm layer of a trained network, are the running ones.

What SRe2L (Yin et al., NeurIPS 2023, arXiv:2306.13092) and the methods built on it share: the squeezed
network, the distances of a batch's statistics, the views of a batch, and the curriculum of crops of CDA (Yin
& Shen, TMLR 2024, arXiv:2311.18838), by the formulas of its code.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Final, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddray.config import added
from ddray.data import normalized_space
from ddray.distillation.method import DistillContext, MethodConfig
from ddray.errors import InputError
from ddray.methods.families.matching.initial import smallest_value
from ddray.nets import Net
from ddray.nets.names import parse_arch
from ddray.pool.spec import PoolSpec, teacher_spec
from ddray.training.crops import draw_boxes, resized_crops
from ddray.training.recipe import TeacherRecipe

Crop = Literal["none", "fixed", "step", "linear", "cosine"]
MIN_AREA: Final = 0.08
"""The smallest share of an image's area that a random resized crop takes."""
BETAS: Final = (0.5, 0.9)
"""Adam's, of the pixels."""


class RecoveryConfig(MethodConfig):
    """Settings of the methods that recover images; defaults are those for small images."""

    protocol: ClassVar = "soft"
    quick: ClassVar = {"teacher_arch": "convnet2_w8_bn", "teacher_epochs": 1}

    teacher_arch: str = "resnet18"
    """The squeezed network; it needs batch norm."""
    teacher_epochs: int = Field(default=50, ge=1)
    """Epochs of its training on the real images."""
    lr: float = Field(default=0.1, gt=0)
    """Learning rate of the pixels (Adam .5, .9; cosine)."""
    bn_weight: float = Field(default=0.05, ge=0)
    """Weight of the distance between batch and running statistics."""
    first_bn_factor: float = Field(default=10.0, ge=0)
    """Factor on the first layer's distance."""
    jitter: int = Field(default=4, ge=0)
    """Largest roll of a batch along each axis, in pixels."""
    jitter_both_ways: bool = added(False)
    """Roll by -jitter..jitter instead of 0..jitter."""
    crop: Crop = added("none")
    """Before the roll, a random resized crop and a flip (where a mirror keeps the class) of the batch.
    `fixed`: of 8% to 100% of the area; `step`, `linear`, `cosine`: of m(t) to 100%, where m falls from 1 to
    8% (CDA's curriculum)."""
    milestone: float = added(1.0, ge=0, le=1)
    """Share of the steps over which m falls, or after which it falls at once (`step`)."""
    r_var: float = added(1.0, ge=0)
    """Weight of the distance of the variances beside that of the means."""
    squeeze: Literal["dsa", "crop_flip"] = added("dsa")
    """How the network is trained. `dsa`: SGD .05, batches of 64, DSA; `crop_flip`: SGD .1, batches of 128,
    crops of the image padded by 4 pixels and flips, the authors' for CIFAR."""

    @model_validator(mode="after")
    def _milestone_is_of_a_curriculum(self) -> Self:
        if self.milestone != 1 and self.crop in ("none", "fixed"):
            raise ValueError(
                f"milestone must be left out with crop={self.crop}, got {self.milestone:g}; it is for crop="
                "step, linear and cosine"
            )
        return self


class BatchStatistics:
    """Distances between a batch's statistics and the running ones, per batch norm layer of a forward pass.

    Args:
        net: its batch norms are watched.
        r_var: weight of the variances' distance in `distances`.

    Attributes:
        norms: ||mean - running mean|| and ||variance - running variance|| of each layer, for each batch.
    """

    def __init__(self, net: nn.Module, r_var: float = 1.0) -> None:
        self._layers = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        self._num_batches, self._r_var = 1, r_var
        self.norms: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def distances(self) -> list[Tensor]:
        """Scalars, one per layer: the means' distance plus `r_var` times the variances', over the batches."""
        weight = self._r_var
        return [(mean + (var if weight == 1 else weight * var)).mean() for mean, var in self.norms]

    @contextmanager
    def watch(self, num_batches: int = 1) -> Iterator[None]:
        """Collect the norms of the forward pass made inside, in layer order.

        What goes through the network is `num_batches` batches of one size.
        """
        self.norms, self._num_batches = [], num_batches
        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.enter_context(layer.register_forward_pre_hook(self._note))
            yield

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Eq 7 of SRe2L: the norms over the layer's channels, by the biased variance."""
        first = int(self._num_batches > 1)  # the axis of a batch's images
        maps: Tensor = torch.unflatten(inputs[0], 0, (self._num_batches, -1)) if first else inputs[0]
        axes = [first, *range(first + 2, maps.ndim)]
        mean, variance = maps.mean(axes), maps.var(axes, unbiased=False)
        of_mean, of_variance = mean - layer.running_mean, variance - layer.running_var  # type: ignore[operator]
        self.norms.append((of_mean.norm(dim=-1), of_variance.norm(dim=-1)))


def recover_loss(
    logits: Tensor, labels: Tensor, distances: list[Tensor], *, weight: float, first: float
) -> Tensor:
    """Return the cross entropy plus the weighted distances, the first one times `first` (SRe2L, Eq 6, 8)."""
    total = first * distances[0] + sum(distances[1:], torch.zeros((), device=logits.device))
    return F.cross_entropy(logits, labels) + weight * total


def smallest_area(crop: Crop, progress: float, milestone: float) -> float | None:
    """Return the smallest share of the area that crops take after `progress` (0..1) of the steps.

    None: no crop. CDA: 1 until the milestone (`step`), or a fall until then, linear or as half a cosine; from
    there on 8%.
    """
    if crop == "none":
        return None
    if crop == "fixed" or progress >= milestone:
        return MIN_AREA
    fall = progress / milestone
    if crop == "cosine":
        return MIN_AREA + (1 - MIN_AREA) * (1 + math.cos(math.pi * fall)) / 2
    return 1 - (1 - MIN_AREA) * fall if crop == "linear" else 1.0


def batch_view(
    images: Tensor,
    generator: torch.Generator,
    *,
    min_area: float | None,
    rolls: tuple[int, int],
    flip: bool = True,
) -> Tensor:
    """Return a batch [N, C, H, W] as the network sees it; one draw of everything serves all of its images.

    Args:
        images: the batch.
        generator: on the CPU; makes every draw.
        min_area: begin with a random resized crop of this share of the area or more; None: without.
        rolls: smallest and largest roll along each axis, in pixels.
        flip: mirror half of the crops.
    """
    if min_area is not None:
        size = (images.shape[2], images.shape[3])
        box = draw_boxes(1, size, generator, scale=(min_area, 1.0))
        mirrored = (torch.rand(1, generator=generator) < 0.5) & flip
        images = resized_crops(images, box.expand(len(images), -1), mirrored.expand(len(images)))
    shifts = torch.randint(rolls[0], rolls[1] + 1, (2,), generator=generator).tolist()
    return torch.roll(images, shifts=shifts, dims=(2, 3))


def check_batch_norm(arch: str, method: str) -> None:
    """Refuse a network that is known to have no batch norm (InputError)."""
    parsed = parse_arch(arch)
    if not parsed.is_external and "batch" not in parsed.norm:
        raise InputError(f"teacher_arch must have batch norm for {method}, {arch} has none; add _bn")


def squeezed_spec(ctx: DistillContext, config: RecoveryConfig) -> PoolSpec:
    """Return the spec of the network that images are recovered from."""
    check_batch_norm(config.teacher_arch, ctx.method)
    recipe = TeacherRecipe(epochs=config.teacher_epochs)
    if config.squeeze == "crop_flip":
        recipe = TeacherRecipe(epochs=config.teacher_epochs, lr=0.1, batch=128, augment="crop_flip")
    return teacher_spec(ctx.dataset, ctx.split_name, config.teacher_arch, recipe, device=ctx.device)


def pixel_range(ctx: DistillContext) -> tuple[Tensor, Tensor]:
    """Return black and white [1, C, H, W] in the normalised space, on the device; images stay between.

    Spectrograms, in their own units, are bounded from below alone, by the smallest real value.
    """
    space, blank = normalized_space(ctx.dataset), torch.zeros(1, *ctx.dataset.image_shape)
    low, high = (smallest_value(ctx), math.inf) if ctx.split.images.is_floating_point() else (0.0, 1.0)
    return space.encode(blank + low).to(ctx.device), space.encode(blank + high).to(ctx.device)


class Recovery:
    """The squeezed network, and the loss and gradient of batches under it.

    Attributes:
        net: from the pool, in eval mode, without gradients of its weights.
        statistics: of its batch norms.

    Raises:
        InputError: the network has no batch norm, or the pixels are whitened.
    """

    def __init__(self, ctx: DistillContext, config: RecoveryConfig) -> None:
        if ctx.space.kind != "normalized":
            raise InputError(f"{ctx.method} needs pixel_space=normalized, got {ctx.space.kind}")
        self._ctx, self._config = ctx, config
        net = cast(Net, ctx.pool.get([squeezed_spec(ctx, config)])[0].module()).requires_grad_(False)
        self.net = net.to(ctx.device).to(memory_format=torch.channels_last)
        self.statistics = BatchStatistics(self.net, config.r_var)
        if not len(self.statistics):
            raise InputError(f"teacher_arch must have batch norm for {ctx.method}, got {config.teacher_arch}")

    def view(self, batch: Tensor, generator: torch.Generator, progress: float) -> Tensor:
        """Return a batch [K, C, H, W] as the network sees it after `progress` (0..1) of its steps."""
        config = self._config
        rolls = (-config.jitter if config.jitter_both_ways else 0, config.jitter)
        min_area = smallest_area(config.crop, progress, config.milestone)
        flip = self._ctx.dataset.can_flip
        view = batch_view(batch, generator, min_area=min_area, rolls=rolls, flip=flip)
        return view.contiguous(memory_format=torch.channels_last)

    def gradient(self, views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of batches [B * K, C, H, W], and its gradient.

        A batch has an image of every class. Nothing is changed or waited for, so that a CUDA graph may be
        captured of it.
        """
        views = views.detach().requires_grad_(True)
        num_batches = len(views) // self._ctx.dataset.num_classes
        with self.statistics.watch(num_batches):
            logits = self.net(views)
        loss = num_batches * recover_loss(
            logits,
            labels,
            self.statistics.distances,
            weight=self._config.bn_weight,
            first=self._config.first_bn_factor,
        )
        return loss.detach(), torch.autograd.grad(loss, views)[0]
