"""The synthetic images that learning begins with."""

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.errors import InputError
from ddray.methods.families.selection import feature_specs, kcenter_order, pool_features
from ddray.pool.spec import PoolSpec
from ddray.seeding import derive_numpy

Init = Literal["random", "first", "kcenter", "noise"]
_COPY_NOISE: Final = 0.1  # of the images' standard deviation
_NOISE_CHUNK: Final = 2**20  # values, a multiple of 16: torch draws normal values in blocks of 16


def initial_images(
    ctx: DistillContext, init: Init, count: int | None = None, *, repeat: bool = True
) -> tuple[Tensor, Tensor]:
    """Return initial images [K * count, C, H, W] and class-sorted labels, on the device.

    Args:
        ctx: what to work on.
        init: random real images, the first of each class, k-center's choice, or Gaussian noise.
        count: images per class; default: ipc.
        repeat: a class with fewer real images starts with copies of them; in a class of fewer than ipc images
            under a little noise, so that they can part. False: it gives all it has.

    Raises:
        InputError: `ctx` is a shard's, and a class needs such noise, which depends on all images.
    """
    num = count or ctx.ipc
    if init == "noise":
        labels = torch.arange(ctx.classes.start, ctx.classes.stop).repeat_interleave(num)
        return _noise(ctx, num).to(ctx.device), labels.to(ctx.device)
    index, is_copy = _choose(ctx, init, num, repeat)
    images = parted_copies(ctx, ctx.space.encode(ctx.split.images[index]), is_copy)
    return images.to(ctx.device), ctx.split.labels[index].to(ctx.device)


def parted_copies(ctx: DistillContext, images: Tensor, is_copy: Tensor) -> Tensor:
    """Return initial images [N, C, H, W], changed in place: copies, bool [N], get a little noise."""
    if bool(is_copy.any()):
        noise = torch.randn((int(is_copy.sum()), *images.shape[1:]), generator=ctx.generator("init copies"))
        images[is_copy] += _COPY_NOISE * images.std() * noise
    return images


def smallest_value(ctx: DistillContext) -> float:
    """Return the smallest value of all real images, of other shards' too."""
    if ctx.shard is not None and ctx.shard.minimum is not None:
        return ctx.shard.minimum
    return float(ctx.split.images.min())


def initial_specs(ctx: DistillContext, init: Init) -> list[PoolSpec]:
    """Return the pool entries that `initial_images` will use."""
    return feature_specs(ctx) if init == "kcenter" else []


def check_copies(counts: Sequence[int], ipc: int, init: Init, option: str = "--shards") -> None:
    """Reject shards (InputError names their `option`) that start with copies of real images under noise."""
    if init != "noise" and min(counts) < ipc:
        raise InputError(
            f"{option} needs {ipc} or more images of every class with init={init}, got {min(counts)} of one: "
            f"it begins with copies under noise that depends on all classes; leave {option} out"
        )


def _choose(ctx: DistillContext, init: Init, num: int, repeat: bool) -> tuple[Tensor, Tensor]:
    """Return indices of real images, and which of them need the noise of copies."""
    counts = ctx.counts.tolist()
    if ctx.shard is not None and repeat:
        check_copies(counts, ctx.ipc, init)
    features = pool_features(ctx) if init == "kcenter" else None
    rng = derive_numpy(ctx.seed, "distill", "random images")
    indices, copies = [], []
    for label, size in enumerate(counts):
        order = torch.from_numpy(rng.permutation(size)) if features is None and init == "random" else None
        if label not in ctx.classes:
            continue
        members = torch.nonzero(ctx.split.labels == label).flatten()
        if features is not None:
            members = members[kcenter_order(features[members], min(num, len(members)))]
        elif order is not None:
            members = members[order]
        positions = torch.arange(num if repeat else min(num, len(members)))
        indices.append(members[positions % len(members)])
        copies.append((positions >= len(members)) & (len(members) < ctx.ipc))
    return torch.cat(indices), torch.cat(copies)


def _noise(ctx: DistillContext, num: int) -> Tensor:
    """Return Gaussian noise [K * num, C, H, W] of the context's classes; a shard never holds all of it."""
    generator, shape, num_classes = ctx.generator("init"), ctx.dataset.image_shape, len(ctx.classes)
    if ctx.shard is None:
        return torch.randn((num_classes * num, *shape), generator=generator)
    each = num * shape[0] * shape[1] * shape[2]
    first, last, total = ctx.classes.start * each, ctx.classes.stop * each, len(ctx.counts) * each
    noise, start = torch.empty(last - first), 0
    while start < last:
        # The last block of all is drawn again if it is not whole: it needs 16 values of its own.
        size = _NOISE_CHUNK if total - start >= _NOISE_CHUNK + 16 else total - start
        drawn = torch.randn(size, generator=generator)
        low, high = max(first, start), min(last, start + size)
        if low < high:
            noise[low - first : high - first] = drawn[low - start : high - start]
        start += size
    return noise.view(num_classes * num, *shape)
