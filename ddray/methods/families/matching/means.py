"""Shared by the distribution-matching methods (DM, MMD-pixel, DataDAM): batches, initial images, one step.

A method supplies per-sample statistics of images [N, C, H, W] -> tuple of [N, D_l] and a loss on their
per-class means [K, D_l]; everything here is vectorised over classes. The real branch runs under no_grad in
chunks that fit the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import Config
from ddray.distillation.method import DistillContext, Distiller, Target
from ddray.methods.families.matching.batches import ClassBatches, chunks, initial_images, largest_map_bytes
from ddray.nets import Net, build_net, is_per_sample, reinitialize
from ddray.seeding import derive_seed
from ddray.training.dsa import dsa_for

Statistics = Callable[[Net, Tensor], tuple[Tensor, ...]]
MeansLoss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class MatchingConfig(Config):
    """Settings of every method that learns images by matching means."""

    lr_img: float = Field(default=1.0, gt=0)
    """Learning rate of the images (SGD)."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the images' SGD."""
    batch_real: int = Field(default=256, ge=1)
    """Real images per class and step; never more than the smallest class has."""
    init: Literal["random", "kcenter", "noise"] = "random"
    """Initial images: random real ones, k-center's choice, or Gaussian noise."""
    augment: Literal["dsa", "dsa_idc", "none"] = "dsa"
    """Siamese augmentation: the same parameters for real and synthetic images, a fresh draw per class."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast of the networks' forward pass; for GPUs (some CPUs take twice as long)."""


def in_precision(statistics: Statistics, precision: str, device: torch.device) -> Statistics:
    """Return `statistics` with the forward pass in `precision` and the results in float32."""
    if precision == "fp32":
        return statistics

    def cast(net: Net, images: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            results = statistics(net, images)
        return tuple(values.float() for values in results)

    return cast


class MeanMatching:
    """Images learned so that class means of their statistics match the real ones; a fresh network per step.

    Args:
        ctx: what to work on.
        config: the shared settings.
        statistics: per-sample statistics of images under a network.
        loss: from real and synthetic class means [K, D_l] to a scalar.
    """

    def __init__(
        self, ctx: DistillContext, config: MatchingConfig, statistics: Statistics, loss: MeansLoss
    ) -> None:
        self._ctx = ctx
        self._loss = loss
        self.batches = ClassBatches(ctx, config.batch_real)
        images, self.labels = initial_images(ctx, config.init)
        self._labels_cpu = self.labels.cpu()
        self.images = images.contiguous().requires_grad_(True)
        self._optimizer = torch.optim.SGD([self.images], lr=config.lr_img, momentum=config.momentum)
        self._dsa = None if config.augment == "none" else dsa_for(ctx.dataset.can_flip, config.augment)
        net = build_net(ctx.arch, ctx.dataset.image_shape, ctx.dataset.num_classes, seed=0, device=ctx.device)
        self.net = net.to(memory_format=torch.channels_last).train()
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)
        self._chunked = is_per_sample(self.net)
        self._sample_bytes = largest_map_bytes(self.net, ctx)
        self._statistics = statistics = in_precision(statistics, config.precision, ctx.device)
        self._real_statistics = torch.compile(statistics, dynamic=False) if ctx.compile else statistics
        self._step = 0

    def step(self) -> dict[str, Tensor]:
        """Draw a network and a batch, match, update the images."""
        self._step += 1
        generator = self._ctx.generator("step", self._step)
        reinitialize(self.net, derive_seed(self._ctx.seed, "distill", "net", self._step))
        index = self.batches.draw(generator)
        plan = self._dsa.draw(self.batches.num_classes, generator, shared_op=False) if self._dsa else None
        real = self._real_means(index, plan)
        synthetic = (
            self.images
            if plan is None or self._dsa is None
            else self._dsa.apply(self.images, plan, self._labels_cpu)
        )
        statistics = self._statistics(self.net, synthetic.contiguous(memory_format=torch.channels_last))
        loss = self._loss(real, [self._means(values) for values in statistics])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def _real_means(self, index: Tensor, plan: Any) -> list[Tensor]:
        """Return the class means [K, D_l] of the real batch, its statistics summed chunk by chunk.

        Batch norm mixes samples: networks with it see all classes in one batch (as in other DM code).
        """
        batches = self.batches
        sums: list[Tensor] = []
        slices = (
            chunks(len(index), self._sample_bytes, index.device) if self._chunked else [slice(0, len(index))]
        )
        for rows in slices:
            images = batches.take(index[rows])
            if plan is not None and self._dsa is not None:
                images = self._dsa.apply(images, plan, batches.labels_cpu[rows])
            statistics = self._real_statistics(self.net, images.contiguous(memory_format=torch.channels_last))
            if not sums:
                sums = [values.new_zeros(batches.num_classes, values.shape[1]) for values in statistics]
            for total, values in zip(sums, statistics, strict=True):
                total.index_add_(0, batches.labels[rows], values)
        return [total.div_(batches.per_class) for total in sums]

    def _means(self, values: Tensor) -> Tensor:
        """Return class means [K, D] of class-sorted statistics [K * ipc, D]."""
        return values.view(self.batches.num_classes, self._ctx.ipc, -1).mean(1)

    def state_dict(self) -> dict[str, Any]:
        """Return images, momentum and the step count; draws need no state, they depend on the step alone."""
        momentum = self._optimizer.state.get(self.images, {}).get("momentum_buffer")
        state: dict[str, Any] = {"step": self._step, "images": self.images.detach().cpu().clone()}
        return state if momentum is None else {**state, "momentum_buffer": momentum.detach().cpu().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state."""
        self._step = int(state["step"])
        self.images.copy_(state["images"])
        if "momentum_buffer" in state:
            momentum = state["momentum_buffer"].to(self.images.device, copy=True)
            self._optimizer.state[self.images]["momentum_buffer"] = momentum


def squared_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Return the sum over classes of ||mean real_c - mean syn_c||^2, for one statistic's means [K, D]."""
    return (real[0] - synthetic[0]).square().sum()


def means_method(config_class: type[MatchingConfig], statistics: Statistics) -> type[Distiller]:
    """Return a method that minimises `squared_distance` of class means of `statistics`.

    Args:
        config_class: its settings.
        statistics: per-sample statistic of images under a network, as a tuple of one [N, D].
    """

    class Means:
        config_type: ClassVar[type[Config]] = config_class

        def __init__(self, config: MatchingConfig, num_steps: int) -> None:
            self._config = config
            self.num_steps = num_steps

        @staticmethod
        def preset(name: str, target: Target) -> dict[str, Any]:
            """Return DM's settings, the same in paper and code."""
            return {"steps": 20_000, "evaluate": {"epochs": 1000, "augment": "dsa"}}

        def setup(self, ctx: DistillContext) -> None:
            """Make the initial images and the matcher."""
            self._ctx = ctx
            self._matcher = MeanMatching(ctx, self._config, statistics, squared_distance)

        def step(self) -> dict[str, Tensor]:
            """Match one batch under one fresh network."""
            return self._matcher.step()

        def snapshot(self) -> DistilledSet:
            """Return the current images as a set."""
            return self._ctx.make_set(self._matcher.images, self._matcher.labels)

        def state_dict(self) -> dict[str, Any]:
            """Return images, momentum and step."""
            return self._matcher.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Continue from a state."""
            self._matcher.load_state_dict(state)

    return Means
