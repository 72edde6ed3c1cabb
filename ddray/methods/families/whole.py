"""What a shard of classes computes as the unsharded run does, for bits that depend on the rest of a batch."""

import torch
from torch import Tensor

from ddray.data import PixelSpace
from ddray.data.pixels import ENCODE_CHUNK
from ddray.distillation.method import DistillContext


def encode_rows(
    space: PixelSpace, images: Tensor, rows: Tensor, total: int, chunk: int = ENCODE_CHUNK
) -> Tensor:
    """Return images in a pixel space, float32 [n, C, H, W], to the bits of all `total` in chunks.

    Whitening is a matrix product, which takes a single image in another way than several.

    Args:
        space: the pixel space.
        images: those of a shard, or all.
        rows: which of all images they are, int64 [n], ascending.
        total: how many images the unsharded run encodes.
        chunk: how many at a time.
    """
    if len(images) == total or space.kind != "zca":
        return space.encode(images)
    ends_alone = total % chunk == 1 and int(rows[-1]) == total - 1
    last = len(images) - int(ends_alone)
    encoded = [_several(space, part) for part in torch.split(images[:last], chunk) if len(part)]
    return torch.cat([*encoded, *([space.encode(images[last:])] if ends_alone else [])])


def _several(space: PixelSpace, images: Tensor) -> Tensor:
    if len(images) > 1:
        return space.encode(images)
    return space.encode(torch.cat([images, images]))[:1]


def encode_set(ctx: DistillContext, images: Tensor, sizes: Tensor) -> Tensor:
    """Return a set's class-sorted images in the context's pixel space: `encode_rows` of the whole set.

    `sizes` are the images of every class in it, int64 [K].
    """
    first = int(sizes[: ctx.classes.start].sum())
    rows = torch.arange(first, first + len(images))
    return encode_rows(ctx.space, images, rows, int(sizes.sum()))
