"""Shared by the methods that match features of partitioned images (DSDM, IDM, M3D).

Images are learned as pixels in [0, 1], clamped at the start of each step (IDC's code base), or in their
pixel space (the DC family's); networks see them expanded, and augmented by one draw per class for real and
synthetic images alike.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.partition import Partition, Resize, compose, expand
from ddray.distillation.method import DistillContext, MethodConfig, Target
from ddray.distillation.shards import Part
from ddray.methods.families.matching.batches import RealBranch, step_graphs
from ddray.methods.families.matching.groups import rows_of
from ddray.methods.families.matching.initial import Init, initial_images, smallest_value
from ddray.methods.families.state import images_state, load_images_state
from ddray.nets import Net
from ddray.system.transfer import to_device
from ddray.training.compiled import compiled
from ddray.training.dsa import DsaPlan
from ddray.training.recipe import idc_mixes


class PartitionedConfig(MethodConfig):
    """Settings of every method that learns partitioned images."""

    quick: ClassVar = {"batch_real": 8}
    compiles: ClassVar = True

    lr_img: float = Field(default=0.1, gt=0)
    """Learning rate of the pixels (SGD)."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of the pixels' SGD."""
    batch_real: int = Field(default=256, ge=1)
    """Real images per class and step; never more than the smallest class of at least ipc images has."""
    batch_syn: int = Field(default=256, ge=1)
    """Mini-images per class and step; where there are more, a fresh draw each step."""
    factor: int = Field(default=2, ge=1, le=3)
    """Parts that a stored image is cut into along each axis; 1: not cut."""
    axes: Literal["auto", "both", "time"] = "auto"
    """Axes that are cut; `auto`: time alone for spectrograms, both for pictures."""
    init: Init = "random"
    """Initial mini-images: random real ones, the first of each class, k-center's choice, or noise."""
    resize: Resize = "bilinear"
    """How initial images are scaled down to their part."""
    augment: Literal["dsa", "dsa_idc", "none"] = "none"
    """Siamese augmentation: the same parameters for real and synthetic images, a fresh draw per class."""
    strategy: str | None = None
    """Operations of the augmentation, joined by "_"; default: all of them."""
    unit_pixels: bool = True
    """Learn pixels in [0, 1], clamped at each step; off: in the pixel space of the run, never clamped."""


class LearnedImages:
    """Stored images [K * ipc, C, H, W] that are learned as pixels, with their optimiser.

    Attributes:
        partition: how each holds its mini-images.
        labels: int64 [K * ipc], class-sorted.
        parts: mini-images per class.
        pixels: what is learned: raw pixels (spectrograms: in their units), or those of the context's space.
    """

    def __init__(self, ctx: DistillContext, config: PartitionedConfig) -> None:
        is_sound = ctx.split.images.is_floating_point()
        self.partition = partition_of(ctx, config)
        self.parts = ctx.ipc * self.partition.num_parts
        first, _ = initial_images(ctx, config.init, self.parts)
        images = compose(first.cpu(), self.partition, config.resize)
        self._space = ctx.space.to(ctx.device)
        self._raw = config.unit_pixels and ctx.space.kind != "zca"
        pixels = ctx.space.decode(images) if self._raw else images
        self.pixels = pixels.to(ctx.device).contiguous().requires_grad_(True)
        self._low = smallest_value(ctx) if is_sound else 0.0
        self._high = math.inf if is_sound else 1.0
        self.labels = torch.arange(ctx.classes.start, ctx.classes.stop).repeat_interleave(ctx.ipc)
        self.optimizer = torch.optim.SGD([self.pixels], lr=config.lr_img, momentum=config.momentum)

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the pixels to their range; IDC clamps spectrograms from below only."""
        if self._raw:
            self.pixels.clamp_(self._low, self._high)

    def encoded(self, pixels: Tensor) -> Tensor:
        """Return learned pixels, some or all, as images in the context's pixel space; differentiable."""
        return self._space.encode(pixels) if self._raw else pixels

    def update(self, gradient: Tensor) -> None:
        """Take a step along a gradient, which has the shape of the pixels."""
        self.pixels.grad = gradient
        self.optimizer.step()


def partition_of(ctx: DistillContext, config: PartitionedConfig) -> Partition:
    """Return how a stored image of the context's dataset holds its mini-images."""
    is_sound = ctx.split.images.is_floating_point()
    axes = ("time" if is_sound else "both") if config.axes == "auto" else config.axes
    return Partition(factor=config.factor, axes=axes)


@dataclass(frozen=True)
class StepDraw:
    """The images and the augmentation of one step."""

    index: Tensor
    """Real images [K * n], class-sorted."""
    plan: DsaPlan | None
    """Augmentation parameters, a set for every class; None: no augmentation."""
    syn_index: Tensor | None
    """Mini-images [K * m], class-sorted; None: all."""


class FeaturePairs:
    """Batches of real images and of the `learned` ones under one augmentation, and features of the real ones.

    `net` computes all features; its weights are swapped in place. `classes` are a range of classes, of which
    a shard takes its own. Attribute `per_class` counts the mini-images of a class in a step.
    """

    def __init__(self, ctx: DistillContext, config: PartitionedConfig, learned: LearnedImages) -> None:
        self._learned = learned
        self._batch_syn = config.batch_syn
        self.per_class = min(learned.parts, config.batch_syn)
        self._branch = RealBranch(ctx, config.batch_real, config.augment, config.strategy)
        self.batches, self.net = self._branch.batches, self._branch.net.requires_grad_(False)
        self.renew, self.padded = self._branch.renew, self._branch.padded
        self.sees_too = self._branch.sees_too
        self.num_classes, self._all_classes = len(ctx.classes), ctx.dataset.num_classes
        self._classes = slice(ctx.classes.start, ctx.classes.stop)
        self._embed_real = compiled(embedding, on=ctx.compile)
        self._real_graphs = step_graphs(ctx)
        labels = torch.arange(ctx.classes.start, ctx.classes.stop)
        self._labels_syn = labels.repeat_interleave(learned.parts)

    def groups(self, forward: Callable[[Tensor], Any]) -> list[slice]:
        """Return ranges of classes that fit the memory budget in the network's mode (train or eval)."""
        return self._branch.groups(forward, self.per_class)

    def part(self, classes: slice, per_class: int = 1) -> Part:
        """Return which of a group's classes, or of `per_class` samples of each, are the context's."""
        return self._branch.part(classes, per_class)

    def draw(self, generator: torch.Generator) -> StepDraw:
        """Draw real images, augmentation and, where there are more than `batch_syn`, mini-images."""
        index, plan = self._branch.draw(generator)
        syn_index = None
        if self._learned.parts > self._batch_syn:
            keys = torch.rand(self._all_classes, self._learned.parts, generator=generator)[self._classes]
            first = torch.arange(self.num_classes)[:, None] * self._learned.parts
            syn_index = (keys.argsort(1)[:, : self._batch_syn] + first).flatten()
        return StepDraw(index, plan, syn_index)

    @torch.no_grad()
    def real(self, draw: StepDraw, classes: slice) -> Tensor:
        """Return the features [G, n, D] of the real images, taken chunk by chunk where samples do not mix."""
        here, num, whole = self.part(classes).here, self.batches.per_class, torch.empty(0)
        num_classes = here.stop - here.start
        for part, images in self._branch.passes(draw.index, draw.plan, classes):
            values = part.without_blanks(self._real_graphs(partial(self._embed_real, self.net), (images,)))
            if not len(whole):  # concatenating a list would take the memory twice
                whole = values.new_empty(num * num_classes, values.shape[1])
            whole[part.here] = values
        return by_class(whole, num_classes)

    def synthetic(self, draw: StepDraw, pixels: Tensor, classes: slice) -> Tensor:
        """Return the draw's mini-images [G * m, C, H, W] as the network sees them.

        Differentiable with respect to `pixels`, those of the classes' learned images [G * ipc, C, H, W].
        """
        learned, here = self._learned, self.part(classes).here
        images = expand(learned.encoded(pixels), learned.partition)
        labels = self._labels_syn[rows_of(here, learned.parts)]
        if draw.syn_index is not None:
            index = draw.syn_index[rows_of(here, self._batch_syn)] - here.start * learned.parts
            images, labels = images[to_device(index, images.device)], labels[index]
        return self._branch.augmented(images, draw.plan, labels, classes)


def embedding(net: Net, images: Tensor) -> Tensor:
    """Return the embedding [N, D] of images [N, C, H, W]: the last layer before the classifier."""
    return net.features(images).embedding


class PartitionedEngine(ABC):
    """A method that learns partitioned images: a subclass adds its `step`, which counts in `_step`.

    It gives its `_loss` too, a sum over classes. On CUDA what runs under the network are CUDA graphs, as far
    as the step's augmentation.
    """

    def __init__(self, ctx: DistillContext, config: PartitionedConfig) -> None:
        self._ctx, self._step = ctx, 0
        self._learned = LearnedImages(ctx, config)
        self._pairs = FeaturePairs(ctx, config, self._learned)
        self._graphs = step_graphs(ctx)
        self._part = Part(slice(0), slice(0))

    @cached_property
    def _groups(self) -> list[slice]:
        return self._pairs.groups(self._forward)

    def _forward(self, images: Tensor) -> Any:
        """Compute what a step does of mini-images [N, C, H, W]: for the memory that it takes."""
        return embedding(self._pairs.net, images)

    @abstractmethod
    def _loss(self, images: Tensor, real: Tensor, *others: Tensor) -> Tensor:
        """Return the loss of some classes' mini-images [G * m, C, H, W] and real features [G, n, D].

        A function of its arguments and the network's weights alone; `others` are what `_match` gets. In a
        shard there may be blanks among the images: see `_embedded`.
        """

    def _embedded(self, images: Tensor, num_classes: int) -> Tensor:
        """Return the embeddings [G, m, D] of some classes' mini-images, without those of blanks."""
        return by_class(self._part.without_blanks(embedding(self._pairs.net, images)), num_classes)

    def _real(self, draw: StepDraw, classes: slice) -> Tensor:
        """Return the features [G, n, D] of the classes' real images."""
        return self._pairs.real(draw, classes)

    def _match(self, draw: StepDraw, others: Callable[[slice], Sequence[Tensor]] = lambda _: ()) -> Tensor:
        """Take a step of the pixels along the gradient of the loss, group by group; return the loss.

        `others` gives what else `_loss` takes for a range of the context's classes, counted from the first.
        """
        learned, pairs = self._learned, self._pairs
        gradient = torch.empty_like(learned.pixels)
        total = torch.zeros((), device=gradient.device)
        for classes in self._groups:
            here = pairs.part(classes).here
            rows = rows_of(here, self._ctx.ipc)
            real = self._real(draw, classes)
            pixels = learned.pixels.detach()[rows].requires_grad_(True)
            images = pairs.synthetic(draw, pixels, classes)
            self._part = part = pairs.part(classes, pairs.per_class)
            args = (pairs.padded(images.detach(), part), real, *others(here))
            compute = self._loss_and_gradient
            loss, outer = compute(*args) if part.is_padded else self._graphs(compute, args)
            (gradient[rows],) = torch.autograd.grad(images, pixels, part.without_blanks(outer))
            total += loss
        learned.update(gradient)
        return total

    def _loss_and_gradient(self, images: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        images = images.detach().requires_grad_(True)
        loss = self._loss(images, *args)
        return loss.detach(), torch.autograd.grad(loss, images)[0]

    def snapshot(self) -> DistilledSet:
        learned = self._learned
        return self._ctx.make_set(learned.encoded(learned.pixels), learned.labels, learned.partition)

    def state_dict(self) -> dict[str, Any]:
        """Return pixels, momentum and step; draws depend on the step alone."""
        learned = self._learned
        return {"step": self._step, **images_state(learned.pixels, learned.optimizer, name="pixels")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        load_images_state(self._learned.pixels, self._learned.optimizer, state, name="pixels")


def by_class(values: Tensor, num_classes: int) -> Tensor:
    """Return class-sorted rows [K * n, D], equally many per class, as [K, n, D]."""
    return values.view(num_classes, -1, values.shape[1])


def idc_evaluation(target: Target) -> dict[str, Any]:
    """Return the evaluation settings of the IDC family (DSDM's code); a factor of None counts as 2.

    Images whose class a mirror changes (digits, house numbers) are not mirrored, spectrograms not augmented.
    """
    settings = {"epochs": 1500, "batch": 64, "schedule": "multistep"}
    if target.is_audio:
        return {**settings, "augment": "none", "cutmix": 0.0}
    flip = "flip_" if target.can_flip else ""
    cutmix = 0.5 if idc_mixes(target.dataset, target.factor or 2) else 0.0
    return {**settings, "augment": "dsa_idc", "strategy": f"color_crop_{flip}scale_rotate", "cutmix": cutmix}
