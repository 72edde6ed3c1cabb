"""Colour jitter of batches: brightness, contrast and saturation, each image with factors of its own.

torchvision's `ColorJitter`, whose formulas these are, draws for one image at a time; here the order of the
three is drawn once per batch.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import torch
from torch import Tensor

from ddray.data import PixelSpace
from ddray.system.transfer import to_device
from ddray.training.crops import random_resized_crop
from ddray.training.operations import luma

_JITTER: Final = 0.4
_MIN_SCALE: Final = 0.5


def color_jitter(pixels: Tensor, factors: Tensor, order: Sequence[int]) -> Tensor:
    """Return pixels [N, C, H, W] in [0, 1] blended with black, their mean grey and their grey, in an `order`.

    Args:
        pixels: images; grey ones of one channel have no saturation.
        factors: [3, N], shares of the image as it is, for brightness (0), contrast (1) and saturation (2).
        order: these numbers in the order in which they are applied.
    """
    for which in order:
        grey = luma(pixels) if pixels.shape[1] == 3 else pixels.mean(1, keepdim=True)
        partner = (torch.zeros_like(grey), grey.mean((1, 2, 3), keepdim=True), grey)[which]
        share = factors[which].to(pixels.dtype).view(-1, 1, 1, 1)
        pixels = (share * pixels + (1 - share) * partner).clamp(0, 1)
    return pixels


def crop_jitter(space: PixelSpace, *, flip: bool) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return the augmentation of recipe `minimax` for batches [N, C, H, W] in `space`.

    Resized crops of at least half of the area, mirrored half of the time if `flip`, then the jitter with
    factors in [.6, 1.4].
    """
    placed = cache(space.to)

    def apply(batch: Tensor, generator: torch.Generator) -> Tensor:
        crops = random_resized_crop(batch, generator, scale=(_MIN_SCALE, 1.0), flip=flip)
        factors = 1 + _JITTER * (2 * torch.rand(3, len(batch), generator=generator) - 1)
        order = torch.randperm(3, generator=generator).tolist()
        on_device = placed(batch.device)
        pixels = on_device.decode(crops).clamp(0, 1)
        jittered = color_jitter(pixels, to_device(factors, batch.device), order)
        return on_device.encode(jittered).contiguous(memory_format=torch.channels_last)

    return apply
