"""Shared by the distribution-matching methods (DM, MMD-pixel, DataDAM): batches, initial images, one step.

A method supplies per-sample statistics of images [N, C, H, W] -> tuple of [N, D_l] and a loss on their
per-class means [K, D_l]; everything here is vectorised over classes. The real branch runs under no_grad in
chunks that fit the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.data import Split
from ddray.distillation.method import DistillContext
from ddray.errors import InputError
from ddray.nets import Net, build_net, is_per_sample, reinitialize
from ddray.seeding import derive_numpy, derive_seed
from ddray.training.dsa import dsa_for

Statistics = Callable[[Net, Tensor], tuple[Tensor, ...]]
MeansLoss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

# A block's map of one chunk stays below this: larger ones leave the cache, and from 32 MiB on glibc maps
# fresh pages for each (unless ddray has told it to reuse memory). A DataDAM step (2,560 real images of 32 px)
# took 2.09 s at 8 MiB, 1.86 at 16, 1.96 at 32 on 2 cores.
_CHUNK_BYTES: Final = 16 * 2**20
# Real 32x32x3 images after which compiling (about 20 s on 2 cores) has paid for itself fourfold.
_COMPILE_WORTH: Final = 500_000


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


class ClassBatches:
    """Draws real images class by class, without a loop over classes.

    Args:
        ctx: its split is moved to the device once, as uint8 (whitened images: once, as float32).
        batch_real: images per class; capped by the smallest class.
    """

    def __init__(self, ctx: DistillContext, batch_real: int) -> None:
        self._space = ctx.space.to(ctx.device)
        split = ctx.split
        self._encoded = ctx.space.kind == "zca"
        self._images = encode_all(split, ctx).to(ctx.device) if self._encoded else split.images.to(ctx.device)
        self.num_classes = ctx.dataset.num_classes
        counts = torch.bincount(split.labels, minlength=self.num_classes)
        self.per_class = min(batch_real, int(counts.min()))
        order = torch.argsort(split.labels, stable=True)
        column = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        self._members = torch.zeros(self.num_classes, int(counts.max()), dtype=torch.int64)
        self._members[split.labels[order], column] = order
        self._absent = torch.arange(int(counts.max())) >= counts[:, None]
        # The CPU copy selects DSA's ops without a sync, the device copy indexes the sums.
        self.labels_cpu = torch.arange(self.num_classes).repeat_interleave(self.per_class)
        self.labels = self.labels_cpu.to(ctx.device)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return image indices [K * per_class], class-sorted, without repetition within a class."""
        keys = torch.rand(self._members.shape, generator=generator).masked_fill_(self._absent, 2.0)
        columns = keys.topk(self.per_class, dim=1, largest=False, sorted=False).indices
        return self._members.gather(1, columns).flatten().to(self._images.device, non_blocking=True)

    def take(self, index: Tensor) -> Tensor:
        """Return the images of `index` [n] in their pixel space, float32 [n, C, H, W]."""
        images = self._images.index_select(0, index)
        return images if self._encoded else self._space.encode(images)


def encode_all(split: Split, ctx: DistillContext, chunk: int = 1024) -> Tensor:
    """Return all images of a split in the context's pixel space, float32 [N, C, H, W], made in chunks."""
    whole = torch.empty(split.images.shape, dtype=torch.float32)
    for start in range(0, len(split), chunk):
        whole[start : start + chunk] = ctx.space.encode(split.images[start : start + chunk])
    return whole


def initial_images(ctx: DistillContext, init: str) -> tuple[Tensor, Tensor]:
    """Return initial images [K * ipc, C, H, W] and class-sorted labels, on the device.

    Raises:
        InputError: a class has fewer than `ipc` images.
    """
    num_classes = ctx.dataset.num_classes
    labels = torch.arange(num_classes).repeat_interleave(ctx.ipc)
    if init == "noise":
        shape = (len(labels), *ctx.dataset.image_shape)
        return torch.randn(shape, generator=ctx.generator("init")).to(ctx.device), labels.to(ctx.device)
    if init == "kcenter":
        from ddray.methods.families.selection import kcenter_indices, pool_features

        index = kcenter_indices(pool_features(ctx), ctx.split.labels, num_classes, ctx.ipc)
    else:
        index = random_indices(ctx)
    return ctx.space.encode(ctx.split.images[index]).to(ctx.device), labels.to(ctx.device)


def random_indices(ctx: DistillContext) -> Tensor:
    """Return `ipc` random images per class, as indices [K * ipc], class-sorted.

    Raises:
        InputError: a class has fewer than `ipc` images.
    """
    indices = []
    rng = derive_numpy(ctx.seed, "distill", "random images")
    for label in range(ctx.dataset.num_classes):
        members = torch.nonzero(ctx.split.labels == label).flatten()
        if len(members) < ctx.ipc:
            raise InputError(
                f"ipc must be <= {len(members)} for {ctx.dataset.name} (images of class {label}), "
                f"got {ctx.ipc}"
            )
        indices.append(members[torch.from_numpy(rng.permutation(len(members))[: ctx.ipc])])
    return torch.cat(indices)


def chunks(total: int, sample_bytes: int, device: torch.device) -> Iterator[slice]:
    """Yield slices over `total` samples whose largest maps (`sample_bytes` each) fit the cache or the GPU."""
    budget = _CHUNK_BYTES if device.type == "cpu" else 2**31
    size = max(1, min(total, budget // max(1, sample_bytes)))
    if size >= 8:
        size -= size % 8
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def wants_compile(
    choice: str, *, num_steps: int, images_per_step: int, image_shape: tuple[int, int, int]
) -> bool:
    """Decide whether to compile the real branch.

    Args:
        choice: `on`, `off`, or `auto`: with a compiler on the PATH and a run long enough to repay it.
        num_steps: steps of the run.
        images_per_step: real images in each.
        image_shape: (C, H, W).

    Raises:
        InputError: `on` without a C++ compiler.
    """
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if choice == "on" and compiler is None:
        raise InputError(
            "compile=on needs a C++ compiler (g++ or clang++) on the PATH; install one or use compile=off"
        )
    if choice != "auto":
        return choice == "on"
    equivalent_images = num_steps * images_per_step * image_shape[1] * image_shape[2] / 1024
    return compiler is not None and equivalent_images >= _COMPILE_WORTH


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


def largest_map_bytes(net: Net, ctx: DistillContext) -> int:
    """Return the bytes of one sample's largest map."""
    key = (net.arch, ctx.dataset.image_shape)
    if key not in _largest:
        _largest[key] = _measured(net, ctx)
    return _largest[key]


_largest: dict[tuple[str, tuple[int, int, int]], int] = {}


@torch.no_grad()
def _measured(net: Net, ctx: DistillContext) -> int:
    """Find the largest map on a blank image (in eval mode, which leaves no trace)."""
    was_training = net.training
    maps = net.eval().features(torch.zeros(1, *ctx.dataset.image_shape, device=ctx.device)).maps
    net.train(was_training)
    return max((m.numel() * m.element_size() for m in maps), default=1)
