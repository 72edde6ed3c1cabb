"""What every network returns from one pass, and the normalisation layers the families share."""

from operator import methodcaller
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddray.nets.names import GROUPS


class Features(NamedTuple):
    """One forward pass."""

    logits: Tensor  # [N, K]
    embedding: Tensor  # [N, D], what feeds the classifier
    maps: tuple[Tensor, ...]  # per block its post-activation, pre-pool map [N, C_l, H_l, W_l]


_SMALL_MAP: Final = 512  # pixels
_CHANNELS_LAST: Final = methodcaller("contiguous", memory_format=torch.channels_last)


class CpuLayer(nn.Module):
    """A layer with a fast path for channels_last maps on a CPU.

    Unless it is `plain`, as under vmap, where a memory format cannot be queried: PyTorch's own.
    """

    plain = False

    def is_on_cpu(self, maps: Tensor) -> bool:
        """Return whether `maps` are on a CPU, outside vmap and compilation."""
        return not self.plain and maps.device.type == "cpu" and not torch.compiler.is_compiling()

    def takes_fast_path(self, maps: Tensor) -> bool:
        """Return whether `maps` [N, C, H, W] are channels_last on a CPU, outside vmap and compilation."""
        return self.is_on_cpu(maps) and maps.is_contiguous(memory_format=torch.channels_last)


class InstanceNorm(nn.GroupNorm, CpuLayer):
    """A GroupNorm with one group per channel, fast for channels_last maps on a CPU.

    PyTorch's goes pixel by pixel there. Milliseconds for 2,560 images, 128 channels, 16x16: without gradients
    315, as matrix products 28 (from 32x32 on PyTorch's is faster); with gradients 1,146, after conversion to
    contiguous maps 321 (32x32: 1,456 and 1,238). A network that is trained as a whole is faster on contiguous
    maps (`training_format`).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised maps of `input` [N, C, H, W], in its memory format."""
        if not self.takes_fast_path(input):
            return super().forward(input)
        if torch.is_grad_enabled():
            return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)
        num_pixels = input.shape[2] * input.shape[3]
        if num_pixels > _SMALL_MAP:
            return super().forward(input)
        flat = input.permute(0, 2, 3, 1).reshape(len(input), num_pixels, -1)
        mean_of = flat.new_full((len(input), 1, num_pixels), 1 / num_pixels)
        centred = flat - torch.bmm(mean_of, flat)
        variance = torch.bmm(mean_of, centred * centred)
        centred *= self.weight * torch.rsqrt(variance + self.eps)
        centred += self.bias
        return centred.view(input.shape[0], *input.shape[2:], -1).permute(0, 3, 1, 2)


class LayerNorm(nn.LayerNorm, CpuLayer):
    """A LayerNorm over (C, H, W), fast for channels_last maps on a CPU: it goes over (H, W, C) there.

    PyTorch's copies the maps to the contiguous format and back. A training step of a ConvNet-3 of width 128
    on 256 images of 32 px took 1,280 ms with it, 850 without. The result may be a view: changing it in place
    would copy the maps once more in the backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised maps of `input` [N, C, H, W], in its memory format."""
        if not self.takes_fast_path(input):
            return super().forward(input)
        weight, bias = self.weight.permute(1, 2, 0), self.bias.permute(1, 2, 0)
        normed = F.layer_norm(input.permute(0, 2, 3, 1), list(weight.shape), weight, bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class Flatten(CpuLayer):
    """Flatten maps [N, C, H, W]; on a CPU their gradient keeps channels_last.

    A contiguous gradient sends the last pooling and all layers before it down their slow paths: a step of a
    ConvNet-1 of width 64 without norm takes 178 ms with it, 86 without.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Return `maps` as [N, C * H * W]."""
        if maps.requires_grad and self.takes_fast_path(maps):
            maps.register_hook(_CHANNELS_LAST)  # type: ignore[no-untyped-call]
        return maps.flatten(1)


def norm_layer(norm: str, shape: tuple[int, int, int]) -> nn.Module:
    """Return an affine norm, one of `NORMS` (group: of 4), for maps of `shape` (C, H, W).

    The field's "instance norm" is a GroupNorm with one group per channel (DC's networks.py), whose statistics
    are the sample's own in train() and eval() alike. Only layer norm depends on H and W.
    """
    channels = shape[0]
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "batch_before":  # its running statistics are nearly the last batch's
        return nn.BatchNorm2d(channels, momentum=0.9)
    if norm == "layer":
        return LayerNorm(list(shape))
    if norm == "instance":
        return InstanceNorm(channels, channels)
    if norm == "group":
        return nn.GroupNorm(GROUPS, channels)
    return nn.Identity()
