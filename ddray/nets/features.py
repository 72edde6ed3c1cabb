"""What every network returns from one pass, and the normalisation layers the families share."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from ddray.nets.names import GROUPS


class Features(NamedTuple):
    """One forward pass.

    Attributes:
        logits: [N, K].
        embedding: [N, D], what feeds the classifier.
        maps: per block its post-activation, pre-pool map [N, C_l, H_l, W_l].
    """

    logits: Tensor
    embedding: Tensor
    maps: tuple[Tensor, ...]


_SMALL_MAP: Final = 512  # pixels


class InstanceNorm(nn.GroupNorm):
    """A GroupNorm with one group per channel, fast for channels_last maps on a CPU.

    PyTorch's own goes place by place there. In milliseconds for 2,560 images, 128 channels: 16x16 without
    gradients 315, as matrix products 28 (from 32x32 on its own is faster); with gradients 1,146, of maps
    brought to the other format 321 (32x32: 1,456 and 1,238).

    Attributes:
        plain: take PyTorch's own way: what is vmapped has no memory format to ask for.
    """

    plain = False

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised maps of `input` [N, C, H, W], in its memory format."""
        if (
            self.plain
            or input.device.type != "cpu"
            or torch.compiler.is_compiling()
            or not input.is_contiguous(memory_format=torch.channels_last)
        ):
            return super().forward(input)
        if torch.is_grad_enabled():
            return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)
        places = input.shape[2] * input.shape[3]
        if places > _SMALL_MAP:
            return super().forward(input)
        flat = input.permute(0, 2, 3, 1).reshape(len(input), places, -1)
        mean_of = flat.new_full((len(input), 1, places), 1 / places)
        centred = flat - torch.bmm(mean_of, flat)
        variance = torch.bmm(mean_of, centred * centred)
        centred *= self.weight * torch.rsqrt(variance + self.eps)
        centred += self.bias
        return centred.view(input.shape[0], *input.shape[2:], -1).permute(0, 3, 1, 2)


def norm_layer(norm: str, shape: tuple[int, int, int]) -> nn.Module:
    """Return an affine normalisation layer for maps of `shape` (C, H, W).

    The field's "instance norm" is a GroupNorm with one group per channel (DC's networks.py), whose statistics
    are the sample's own in train() and eval() alike.

    Args:
        norm: none, batch, layer, instance or group (4 groups).
        shape: (C, H, W) of the maps; only layer norm depends on H and W.
    """
    channels = shape[0]
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return nn.LayerNorm(list(shape))
    if norm == "instance":
        return InstanceNorm(channels, channels)
    if norm == "group":
        return nn.GroupNorm(GROUPS, channels)
    return nn.Identity()
