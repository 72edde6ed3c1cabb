"""The operations of differentiable Siamese augmentation on a batch, each with one parameter row per sample.

Our code, from the formulas of DSA (Zhao & Bilen 2021, arXiv:2102.08259) and DiffAugment (Zhao et al. 2020,
arXiv:2006.10738). Parameters arrive as uniform draws in [0, 1) and are scaled here, so that a plan does not
depend on the image size. `rows` has shape [N, 11], or [1, 11] where all samples share one row.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.config import Config
from ddray.system.transfer import to_device

# Columns of a parameter row.
BRIGHTNESS, SATURATION, CONTRAST, SHIFT_Y, SHIFT_X, CUT_Y, CUT_X, FLIP, SCALE_X, SCALE_Y, ROTATE = range(11)
NUM_COLUMNS: Final = 11
_PADDING: Final = 4  # pixels, of `crop_and_flip`
_LUMA: Final = (0.299, 0.587, 0.114)


class DsaParams(Config):
    """Strengths of the operations; the defaults are those of every paper of the family."""

    flip: float = 0.5
    """probability of mirroring"""
    scale: float = 1.2
    """each axis is scaled by a factor in [1/scale, scale]"""
    rotate: float = 15.0
    """largest angle, degrees"""
    crop: float = 0.125
    """largest shift, as a share of the side"""
    cutout: float = 0.5
    """side of the zeroed square, as a share of the side"""
    brightness: float = 1.0
    """width of the interval that brightness is shifted by"""
    saturation: float = 2.0
    """saturation is scaled by a factor in [0, saturation]"""
    contrast: float = 0.5
    """contrast is scaled by a factor in [contrast, contrast + 1]"""


def _column(rows: Tensor, column: int, images: Tensor) -> Tensor:
    """Return one parameter as [N, 1, 1, 1] in the images' dtype."""
    return rows[:, column].to(images.dtype).view(-1, 1, 1, 1)


def color(images: Tensor, rows: Tensor, params: DsaParams) -> Tensor:
    """Brightness, then saturation, then contrast; `images` [N, C, H, W]."""
    images = images + (_column(rows, BRIGHTNESS, images) - 0.5) * params.brightness
    mean = images.mean(dim=1, keepdim=True)
    images = (images - mean) * (_column(rows, SATURATION, images) * params.saturation) + mean
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (_column(rows, CONTRAST, images) + params.contrast) + mean


def _uniform_integer(u: Tensor, count: int) -> Tensor:
    """Turn draws in [0, 1) into integers in 0..count-1; the float product can round up to count itself."""
    return (u * count).long().clamp(max=count - 1)


def crop(images: Tensor, rows: Tensor, params: DsaParams) -> Tensor:
    """Shift by whole pixels, up to int(side * crop + 0.5) each way, filling with zeros."""
    height, width = (int(size * params.crop + 0.5) for size in images.shape[2:])
    return _shifted(images, rows, (height, width))


def _shifted(images: Tensor, rows: Tensor, reaches: tuple[int, int]) -> Tensor:
    """Shift down and right by whole pixels, up to `reaches` each way, filling with zeros."""
    shifted = images
    for dim, column, reach in zip((2, 3), (SHIFT_Y, SHIFT_X), reaches, strict=True):
        size = images.shape[dim]
        shift = _uniform_integer(rows[:, column], 2 * reach + 1) - reach
        source = torch.arange(size, device=images.device) + shift[:, None]  # [N, size]
        inside = (source >= 0) & (source < size)
        shape = [len(rows), 1, 1, 1]
        shape[dim] = size
        source = source.clamp(0, size - 1)
        if len(rows) == 1:
            shifted = shifted.index_select(dim, source[0])
        else:
            shifted = shifted.gather(dim, source.view(shape).expand(shifted.shape))
        shifted = shifted * inside.view(shape)
    return shifted


def cutout(images: Tensor, rows: Tensor, params: DsaParams) -> Tensor:
    """Zero a square of side int(side * cutout + 0.5) whose centre is uniform over the image."""
    covered = []
    for dim, column in ((2, CUT_Y), (3, CUT_X)):
        size = images.shape[dim]
        side = int(size * params.cutout + 0.5)
        # One more position for an even side: its centre lies between two pixels, and both borders count.
        centre = _uniform_integer(rows[:, column], size + 1 - side % 2)
        first = (centre - side // 2)[:, None]
        pixels = torch.arange(size, device=images.device)
        covered.append((pixels >= first) & (pixels < first + side))
    return images * ~(covered[0][:, None, :, None] & covered[1][:, None, None, :])


def flip(images: Tensor, rows: Tensor, params: DsaParams) -> Tensor:
    """Mirror left-right with probability `params.flip`."""
    return torch.where(_column(rows, FLIP, images) < params.flip, images.flip(3), images)


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample the images at `matrix` [N or 1, 2, 2] times the centred coordinates, zeros outside."""
    theta = F.pad(matrix, (0, 1)).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid.to(images.dtype), align_corners=True)


def scale(images: Tensor, rows: Tensor, params: DsaParams) -> Tensor:
    """Scale each axis by its own factor, uniform in [1/scale, scale]."""
    low, high = 1 / params.scale, params.scale
    factors = rows[:, SCALE_X : SCALE_Y + 1] * (high - low) + low
    return _affine(images, torch.diag_embed(factors))


def rotate(images: Tensor, rows: Tensor, params: DsaParams) -> Tensor:
    """Rotate by an angle uniform in [-rotate, rotate] degrees."""
    angle = (rows[:, ROTATE] - 0.5) * (2 * params.rotate / 180 * math.pi)
    cos, sin = angle.cos(), angle.sin()
    return _affine(images, torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1))


OPERATIONS: Final[dict[str, Callable[[Tensor, Tensor, DsaParams], Tensor]]] = {
    operation.__name__: operation for operation in (color, crop, cutout, flip, scale, rotate)
}


def luma(pixels: Tensor) -> Tensor:
    """Return the luma [N, 1, H, W] of colour pixels [N, 3, H, W] (ITU-R 601)."""
    return (pixels * _luma_weights(pixels.dtype, pixels.device)).sum(1, keepdim=True)


@lru_cache(maxsize=16)
def _luma_weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights [1, 3, 1, 1], copied to a device once: it waits for the copy."""
    return torch.tensor(_LUMA, dtype=dtype, device=device).view(1, 3, 1, 1)


def crop_and_flip(images: Tensor, generator: torch.Generator, *, can_flip: bool) -> Tensor:
    """Apply torchvision's RandomCrop(side, padding=4) and, if `can_flip`, a 50% flip, per sample.

    The padding is 4 pixels whatever the images' size, as in KRR-ST's code. Images are float [N, C, H, W] in a
    space where 0 is what the padding should be; the generator is on the CPU.
    """
    rows = to_device(torch.rand(len(images), NUM_COLUMNS, generator=generator), images.device)
    shifted = _shifted(images, rows, (_PADDING, _PADDING))
    return flip(shifted, rows, DsaParams()) if can_flip else shifted
