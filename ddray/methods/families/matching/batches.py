"""Batches of real images by class, the initial synthetic images, and chunks that fit a CPU's cache."""

from collections.abc import Iterator
from typing import Final, Literal

import torch
from torch import Tensor

from ddray.data import Split
from ddray.distillation.method import DistillContext
from ddray.errors import InputError
from ddray.methods.families.selection import kcenter_order, pool_features
from ddray.nets import Net
from ddray.seeding import derive_numpy

Init = Literal["random", "first", "kcenter", "noise"]

# A block's map of one chunk stays below this: larger ones leave the cache, and from 32 MiB on glibc maps
# fresh pages for each (unless ddray has told it to reuse memory). A DataDAM step (2,560 real images of 32 px)
# took 2.09 s at 8 MiB, 1.86 at 16, 1.96 at 32 on 2 cores.
_CHUNK_BYTES: Final = 16 * 2**20
_largest: dict[tuple[str, tuple[int, int, int]], int] = {}


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


def initial_images(ctx: DistillContext, init: Init, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return initial images [K * count, C, H, W] and class-sorted labels, on the device.

    Args:
        ctx: what to work on.
        init: random real images, the first of each class, k-center's choice, or Gaussian noise.
        count: images per class, some more than once if it has fewer; default: ipc, none more than once.

    Raises:
        InputError: a class has fewer than ipc images, and `count` is not set.
    """
    num_classes, num = ctx.dataset.num_classes, count or ctx.ipc
    labels = torch.arange(num_classes).repeat_interleave(num).to(ctx.device)
    if init == "noise":
        noise = torch.randn((len(labels), *ctx.dataset.image_shape), generator=ctx.generator("init"))
        return noise.to(ctx.device), labels
    features = pool_features(ctx) if init == "kcenter" else None
    rng = derive_numpy(ctx.seed, "distill", "random images")
    indices = []
    for label in range(num_classes):
        members = torch.nonzero(ctx.split.labels == label).flatten()
        if count is None and len(members) < num:
            raise InputError(
                f"ipc must be <= {len(members)} for {ctx.dataset.name} (images of class {label}), got {num}"
            )
        if features is not None:
            members = members[kcenter_order(features[members], min(num, len(members)))]
        elif init == "random":
            members = members[torch.from_numpy(rng.permutation(len(members)))]
        indices.append(members[torch.arange(num) % len(members)])
    return ctx.space.encode(ctx.split.images[torch.cat(indices)]).to(ctx.device), labels


def chunks(total: int, sample_bytes: int, device: torch.device) -> Iterator[slice]:
    """Yield slices over `total` samples whose largest maps (`sample_bytes` each) fit the cache or the GPU."""
    budget = _CHUNK_BYTES if device.type == "cpu" else 2**31
    size = max(1, min(total, budget // max(1, sample_bytes)))
    if size >= 8:
        size -= size % 8
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def largest_map_bytes(net: Net, ctx: DistillContext) -> int:
    """Return the bytes of one sample's largest map."""
    key = (net.arch, ctx.dataset.image_shape)
    if key not in _largest:
        _largest[key] = _measured(net, ctx)
    return _largest[key]


@torch.no_grad()
def _measured(net: Net, ctx: DistillContext) -> int:
    """Find the largest map on a blank image (in eval mode, which leaves no trace)."""
    was_training = net.training
    maps = net.eval().features(torch.zeros(1, *ctx.dataset.image_shape, device=ctx.device)).maps
    net.train(was_training)
    return max((m.numel() * m.element_size() for m in maps), default=1)
