"""Random crops of batches, one box per image, on the images' own device.

The boxes of resized crops are drawn as torchvision's `RandomResizedCrop` draws them; all crops of a batch are
then sampled by one bilinear grid, flips included.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.system.transfer import to_device

_ATTEMPTS = 10


def draw_boxes(
    num: int,
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Return `num` boxes (top, left, height, width) in pixels, int64 [num, 4], of images of `size` (H, W).

    `scale` is the smallest and largest share of the image's area, `ratio` likewise of width / height; the
    generator is on the CPU.
    """
    height, width = size
    draws = torch.rand(num, _ATTEMPTS, 2, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * draws[..., 1]).exp()
    rows, columns = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (rows >= 1) & (rows <= height) & (columns >= 1) & (columns <= width)
    # The first of ten attempts that fits; if none does, the largest centred box of an allowed ratio.
    first = fits.int().argmax(1, keepdim=True)
    rows, columns = rows.gather(1, first)[:, 0], columns.gather(1, first)[:, 0]
    none = ~fits.any(1)
    rows = torch.where(none, min(height, round(width / ratio[0])), rows)
    columns = torch.where(none, min(width, round(height * ratio[1])), columns)
    position = torch.rand(num, 2, generator=generator, dtype=torch.float64)
    position = torch.where(none[:, None], 0.5, position)
    top = (position[:, 0] * (height - rows + 1)).floor().clamp(max=height - rows)
    left = (position[:, 1] * (width - columns + 1)).floor().clamp(max=width - columns)
    return torch.stack([top, left, rows, columns], 1).long()


def resized_crops(images: Tensor, boxes: Tensor, flips: Tensor | None = None) -> Tensor:
    """Return each image's box at the size of the whole image (bilinear), mirrored where `flips` says so.

    Shapes: images [N, C, H, W], boxes [N, 4] of `draw_boxes`, flips bool [N], the result [N, C, H, W].
    """
    height, width = images.shape[2:]
    top, left, rows, columns = boxes.to(images.dtype).unbind(1)
    theta = torch.zeros(len(boxes), 2, 3, dtype=images.dtype, device=boxes.device)
    sign = 1 if flips is None else 1 - 2 * flips.to(theta)
    theta[:, 0, 0], theta[:, 0, 2] = sign * columns / width, (2 * left + columns) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = rows / height, (2 * top + rows) / height - 1
    grid = F.affine_grid(to_device(theta, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def batched_crops(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the box of each of N images [N, C, H, W], resized to `size` (h, w), bilinear and anti-aliased.

    As `F.interpolate(..., antialias=True)` of each part, which takes parts of one size alone: an output pixel
    is the mean of the input pixels around it, weighted by a triangle as wide as a pixel of the coarser side
    on each of its halves. Boxes of `draw_boxes` [N, 4] are on the CPU.
    """
    for axis, out in ((2, size[0]), (3, size[1])):
        index, weights = _taps(boxes[:, axis - 2], boxes[:, axis], out)
        index = to_device(index.clamp(max=images.shape[axis] - 1), images.device)
        weights = to_device(weights.to(images.dtype), images.device)
        shape = [*images.shape[:axis], out, *images.shape[axis + 1 :]]
        view = [len(images), 1, *(out if dim == axis else 1 for dim in (2, 3))]
        resized = images.new_zeros(shape)
        for positions, shares in zip(index.unbind(2), weights.unbind(2), strict=True):
            resized += images.gather(axis, positions.view(view).expand(shape)) * shares.view(view)
        images = resized
    return images


def _taps(start: Tensor, length: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """Return the input pixels of each output pixel along an axis, int64 [N, out, T], and their weights."""
    scale = (length.double() / out)[:, None]
    support = scale.clamp(min=1)
    centre = scale * (torch.arange(out) + 0.5)
    first = (centre - support + 0.5).long().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).long(), length[:, None])
    pixels = first[..., None] + torch.arange(int((last - first).max()))
    weights = (1 - ((pixels + 0.5 - centre[..., None]) / support[..., None]).abs()).clamp(min=0)
    weights *= pixels < last[..., None]
    return start[:, None, None] + pixels, weights / weights.sum(2, keepdim=True)


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> Tensor:
    """Return a crop of each image [N, C, H, W], resized back to H x W; half are mirrored if `flip`."""
    boxes = draw_boxes(len(images), (images.shape[2], images.shape[3]), generator, scale=scale, ratio=ratio)
    flips = torch.rand(len(images), generator=generator) < 0.5 if flip else None
    return resized_crops(images, boxes, flips)


def padded_crop(
    images: Tensor, generator: torch.Generator, *, padding: int, fill: Tensor, flip: bool = False
) -> Tensor:
    """Return a window of H x W of each image [N, C, H, W] with `padding` pixels of `fill` around it.

    torchvision's `RandomCrop(size, padding)`: all (2 padding + 1)^2 places are equally likely. `fill` is
    broadcast to [N, C, 1, 1] and on the images' device; half of the windows are mirrored if `flip`.
    """
    num, channels, height, width = images.shape
    places = torch.randint(2 * padding + 1, (2, num), generator=generator)
    columns = torch.arange(width).expand(num, width)
    if flip:
        flips = torch.rand(num, generator=generator) < 0.5
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    rows = to_device(places[0][:, None] + torch.arange(height), images.device)
    columns = to_device(places[1][:, None] + columns, images.device)
    padded = fill + images.new_zeros(num, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    index = torch.arange(num, device=images.device)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
