"""The two networks of DD's code (Wang et al. 2018): LeNet, and the small AlexNet that it calls AlexCifarNet.

Weights are drawn by Xavier's normal distribution (gain 1) and biases are 0, as DD draws its networks anew.
`alexcifar` is not `alexnet`, which is DC's, of five convolutions.

**Deviations**
- Other sizes than 28 and 32 px: LeNet's first convolution is padded (by 2) below 32 px, as at 28; the first
  linear layers take what the maps leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from ddray.nets.features import Features
from ddray.nets.names import Arch

_LENET: Final = (120, 84)
_ALEXCIFAR: Final = (384, 192)


class ClassicNet(nn.Module):
    """Convolutions, each with ReLU and what follows it, then linear layers with ReLU, then the classifier.

    The maps of its `Features` are those after ReLU, the embedding is what the classifier takes.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[nn.Conv2d, nn.Module]],
        num_inputs: int,
        widths: Sequence[int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv for conv, _ in blocks)
        self.followers = nn.ModuleList(follower for _, follower in blocks)
        sizes = [num_inputs, *widths]
        self.linears = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]."""
        maps: list[Tensor] = []
        for conv, follower in zip(self.convs, self.followers, strict=True):
            maps.append(F.relu(conv(x)))
            x = follower(maps[-1])
        embedding = x.flatten(1)
        for linear in self.linears:
            embedding = F.relu(linear(embedding))
        return Features(self.classifier(embedding), embedding, tuple(maps))


def build(arch: Arch, image_shape: tuple[int, int, int], num_classes: int) -> ClassicNet:
    """Return `lenet` or `alexcifar` for images of `image_shape` (C, H, W)."""
    channels, *sides = image_shape
    if arch.base == "alexcifar":
        return _alexcifar(channels, sides, num_classes)
    padding = 2 if min(sides) < 32 else 0
    first = nn.Conv2d(channels, 6, 5, padding=padding)
    blocks = [(first, nn.MaxPool2d(2)), (nn.Conv2d(6, 16, 5), nn.MaxPool2d(2))]
    height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in sides)
    return ClassicNet(blocks, 16 * height * width, _LENET, num_classes)


def _alexcifar(channels: int, sides: Sequence[int], num_classes: int) -> ClassicNet:
    first, second = nn.Conv2d(channels, 64, 5, padding=2), nn.Conv2d(64, 64, 5, padding=2)
    norms = [nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1) for _ in range(2)]
    pools = [nn.MaxPool2d(3, stride=2, padding=1) for _ in range(2)]
    blocks = [(first, nn.Sequential(pools[0], norms[0])), (second, nn.Sequential(norms[1], pools[1]))]
    height, width = (-(-side // 4) for side in sides)
    return ClassicNet(blocks, 64 * height * width, _ALEXCIFAR, num_classes)
