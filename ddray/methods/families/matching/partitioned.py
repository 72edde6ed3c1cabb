"""Shared by the methods that match features of partitioned images (DSDM, IDM, M3D).

Images are learned as pixels in [0, 1], clamped at the start of each step (IDC's code base), or in their
pixel space (the DC family's); networks see them expanded, and augmented by one draw per class for real and
synthetic images alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.partition import Partition, Resize, compose, expand
from ddray.config import Config
from ddray.distillation.method import DistillContext, Target
from ddray.methods.families.matching.batches import ClassBatches, chunks, largest_map_bytes
from ddray.methods.families.selection import kcenter_order, pool_features
from ddray.nets import Net, build_net, is_per_sample
from ddray.seeding import derive_numpy
from ddray.training.dsa import Dsa, DsaPlan, dsa_for
from ddray.training.recipe import idc_mixes

Init = Literal["random", "first", "kcenter", "noise"]
Embed = Callable[[Net, Tensor], Tensor]


class PartitionedConfig(Config):
    """Settings of every method that learns partitioned images."""

    lr_img: float = Field(default=0.1, gt=0)
    """Learning rate of the pixels (SGD)."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of the pixels' SGD."""
    batch_real: int = Field(default=256, ge=1)
    """Real images per class and step; never more than the smallest class has."""
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

    Args:
        ctx: what to work on.
        config: the shared settings.

    Attributes:
        partition: how each holds its mini-images.
        labels: int64 [K * ipc], class-sorted.
        parts: mini-images per class.
        pixels: what is learned: raw pixels (spectrograms: in their units), or those of the context's space.
    """

    def __init__(self, ctx: DistillContext, config: PartitionedConfig) -> None:
        self._ctx = ctx
        is_sound = ctx.split.images.is_floating_point()
        axes = ("time" if is_sound else "both") if config.axes == "auto" else config.axes
        self.partition = Partition(factor=config.factor, axes=axes)
        self.parts = ctx.ipc * self.partition.num_parts
        images = compose(_initial_images(ctx, config.init, self.parts), self.partition, config.resize)
        self._space = ctx.space.to(ctx.device)
        self._raw = config.unit_pixels and ctx.space.kind != "zca"
        pixels = ctx.space.decode(images) if self._raw else images
        self.pixels = pixels.to(ctx.device).contiguous().requires_grad_(True)
        self._low = float(ctx.split.images.min()) if is_sound else 0.0
        self._high = math.inf if is_sound else 1.0
        self.labels = torch.arange(ctx.dataset.num_classes).repeat_interleave(ctx.ipc)
        self._optimizer = torch.optim.SGD([self.pixels], lr=config.lr_img, momentum=config.momentum)

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the pixels to their range; IDC clamps spectrograms from below only."""
        if self._raw:
            self.pixels.clamp_(self._low, self._high)

    def stored(self) -> Tensor:
        """Return the stored images in the context's pixel space; differentiable."""
        return self._space.encode(self.pixels) if self._raw else self.pixels

    def expanded(self) -> Tensor:
        """Return the mini-images [K * parts, C, H, W] that networks see; differentiable."""
        return expand(self.stored(), self.partition)

    def update(self, loss: Tensor) -> None:
        """Take one step of SGD."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def snapshot(self) -> DistilledSet:
        """Return the current images as a set."""
        return self._ctx.make_set(self.stored(), self.labels, self.partition)

    def state_dict(self) -> dict[str, Any]:
        """Return pixels and momentum."""
        velocity = self._optimizer.state.get(self.pixels, {}).get("momentum_buffer")
        state: dict[str, Any] = {"pixels": self.pixels.detach().cpu().clone()}
        return state if velocity is None else {**state, "velocity": velocity.detach().cpu().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state."""
        self.pixels.copy_(state["pixels"])
        if "velocity" in state:
            velocity = state["velocity"].to(self.pixels.device, copy=True)
            self._optimizer.state[self.pixels]["momentum_buffer"] = velocity


def _initial_images(ctx: DistillContext, init: Init, count: int) -> Tensor:
    """Return `count` initial images per class [K * count, C, H, W] in the context's pixel space, on the CPU.

    Classes with fewer images use some of them more than once.
    """
    num_classes, labels = ctx.dataset.num_classes, ctx.split.labels
    if init == "noise":
        shape = (num_classes * count, *ctx.dataset.image_shape)
        return torch.randn(shape, generator=ctx.generator("init"))
    rng = derive_numpy(ctx.seed, "distill", "random images")
    features = pool_features(ctx) if init == "kcenter" else None
    indices = []
    for label in range(num_classes):
        members = torch.nonzero(labels == label).flatten()
        if features is not None:
            members = members[kcenter_order(features[members], min(count, len(members)))]
        elif init == "random":
            members = members[torch.from_numpy(rng.permutation(len(members)))]
        indices.append(members[torch.arange(count) % len(members)])
    return ctx.space.encode(ctx.split.images[torch.cat(indices)])


@dataclass(frozen=True)
class Draw:
    """The images and the augmentation of one step.

    Attributes:
        index: real images [K * n], class-sorted.
        plan: augmentation parameters, a set per class; None: no augmentation.
        syn_index: mini-images [K * m], class-sorted; None: all.
    """

    index: Tensor
    plan: DsaPlan | None
    syn_index: Tensor | None


class FeaturePairs:
    """Batches of real and synthetic images under one augmentation, and the features of the real ones.

    Args:
        ctx: what to work on.
        config: the shared settings.
        learned: the synthetic images.
        embed: features [N, D] of images under a network.

    Attributes:
        net: the network that computes all features; its weights are swapped in place.
    """

    def __init__(
        self, ctx: DistillContext, config: PartitionedConfig, learned: LearnedImages, embed: Embed
    ) -> None:
        self._learned = learned
        self._batch_syn = config.batch_syn
        self.batches = ClassBatches(ctx, config.batch_real)
        self.num_classes = ctx.dataset.num_classes
        self._dsa = siamese(ctx.dataset.can_flip, config.augment, config.strategy)
        net = build_net(ctx.arch, ctx.dataset.image_shape, self.num_classes, seed=0, device=ctx.device)
        self.net = net.to(memory_format=torch.channels_last)
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)
        self._sample_bytes = largest_map_bytes(self.net, ctx)
        self._embed_real = torch.compile(embed, dynamic=False) if ctx.compile else embed
        self._labels_syn = torch.arange(self.num_classes).repeat_interleave(learned.parts)

    def draw(self, generator: torch.Generator) -> Draw:
        """Draw real images, augmentation and, where there are more than `batch_syn`, mini-images."""
        index = self.batches.draw(generator)
        plan = self._dsa.draw(self.num_classes, generator, shared_op=False) if self._dsa else None
        syn_index = None
        if self._learned.parts > self._batch_syn:
            keys = torch.rand(self.num_classes, self._learned.parts, generator=generator)
            first = torch.arange(self.num_classes)[:, None] * self._learned.parts
            syn_index = (keys.argsort(1)[:, : self._batch_syn] + first).flatten()
        return Draw(index, plan, syn_index)

    @torch.no_grad()
    def real(self, draw: Draw) -> Tensor:
        """Return the features [K, n, D] of the real images, taken chunk by chunk where samples do not mix."""
        whole: Tensor | None = None
        total = len(draw.index)
        per_sample = is_per_sample(self.net) or not self.net.training
        slices = chunks(total, self._sample_bytes, draw.index.device) if per_sample else [slice(0, total)]
        for rows in slices:
            images = self._augmented(
                self.batches.take(draw.index[rows]), draw.plan, self.batches.labels_cpu[rows]
            )
            values = self._embed_real(self.net, images)
            if whole is None:
                whole = values.new_empty(total, values.shape[1])
            whole[rows] = values
        if whole is None:
            raise RuntimeError("a batch of real images is never empty")
        return by_class(whole, self.num_classes)

    def synthetic(self, draw: Draw) -> Tensor:
        """Return the draw's mini-images [K * m, C, H, W] as the network sees them; differentiable."""
        images, labels = self._learned.expanded(), self._labels_syn
        if draw.syn_index is not None:
            images, labels = images[draw.syn_index.to(images.device)], labels[draw.syn_index]
        return self._augmented(images, draw.plan, labels)

    def _augmented(self, images: Tensor, plan: DsaPlan | None, labels: Tensor) -> Tensor:
        if plan is not None and self._dsa is not None:
            images = self._dsa.apply(images, plan, labels)
        return images.contiguous(memory_format=torch.channels_last)


def siamese(can_flip: bool, variant: Literal["dsa", "dsa_idc", "none"], strategy: str | None) -> Dsa | None:
    """Return the augmentation of a matching method; None if no operation is left.

    Flips are dropped where a mirrored image changes its class.

    Raises:
        InputError: the strategy names an unknown operation.
    """
    if variant == "none":
        return None
    if strategy is None:
        return dsa_for(can_flip, variant)
    names = [name for name in strategy.split("_") if can_flip or name != "flip"]
    return Dsa("_".join(names), variant=variant) if names else None


def embedding(net: Net, images: Tensor) -> Tensor:
    """Return the embedding [N, D] of images [N, C, H, W]: the last layer before the classifier."""
    return net.features(images).embedding


def nearby(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Move tensors to a GPU if they take at most half of its free memory; else return them as they are."""
    if device.type != "cuda":
        return tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    fits = 2 * size <= torch.cuda.mem_get_info(device)[0]
    return [tensor.to(device) for tensor in tensors] if fits else tensors


def by_class(values: Tensor, num_classes: int) -> Tensor:
    """Return class-sorted rows [K * n, D], equally many per class, as [K, n, D]."""
    return values.view(num_classes, -1, values.shape[1])


def idc_evaluation(target: Target) -> dict[str, Any]:
    """Return the evaluation settings of the IDC family (DSDM's code).

    Digits and house numbers are not mirrored, spectrograms not augmented.

    Args:
        target: what is distilled; a factor of None counts as 2.
    """
    settings = {"epochs": 1500, "batch": 64, "schedule": "multistep"}
    if target.is_audio:
        return {**settings, "augment": "none", "cutmix": 0.0}
    flip = "" if target.dataset in ("mnist", "svhn", "digits") else "flip_"
    cutmix = 0.5 if idc_mixes(target.dataset, target.factor or 2) else 0.0
    return {**settings, "augment": "dsa_idc", "strategy": f"color_crop_{flip}scale_rotate", "cutmix": cutmix}
