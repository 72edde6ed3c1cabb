"""VGG-11 and AlexNet as the dataset-condensation code base (DC, arXiv:2006.05929; "VICO") has them for 32 px.

Both are plain chains of conv -> norm -> ReLU with 2x2 max-pooling and one linear layer; layers keep
PyTorch's default initialisation, and there is no dropout. Default norms are the authors': instance norm for
VGG-11, none for AlexNet. As in their code a one-channel image gets two more pixels of padding in the first
convolution.

**Deviations**
- Other sizes. The authors' networks fit 32 px only. Below, a pooling that would leave less than 2x2 before
  the next convolution is skipped (instance norm of one pixel is constant). Above, the last map is
  average-pooled to the size it has at 32 px (VGG-11 1x1, AlexNet 4x4), so that the classifier does not grow.
"""

from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from ddray.nets.features import Features, norm_layer
from ddray.nets.names import Arch

# Per convolution: output channels, kernel size, whether a 2x2 max-pooling follows.
VGG11: Final = (
    (64, 3, True),
    (128, 3, True),
    (256, 3, False),
    (256, 3, True),
    (512, 3, False),
    (512, 3, True),
    (512, 3, False),
    (512, 3, True),
)
ALEXNET: Final = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))


class PlainNet(nn.Module):
    """A chain of conv -> norm -> ReLU (-> max-pooling) that returns `Features`.

    Args:
        plan: per convolution (output channels, kernel size, whether a pooling follows).
        norm: none, batch or instance.
        image_shape: (C, H, W) of the images.
        num_classes: K.
        last_size: side of the map that is flattened into the embedding, where the map is larger.
    """

    def __init__(
        self,
        plan: tuple[tuple[int, int, bool], ...],
        norm: str,
        image_shape: tuple[int, int, int],
        num_classes: int,
        last_size: int,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        self._pools: list[bool] = []
        channels, height, width = image_shape
        for index, (out_channels, kernel, pool) in enumerate(plan):
            extra = 2 if index == 0 and channels == 1 else 0
            self.convs.append(nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2 + extra))
            channels, height, width = out_channels, height + 2 * extra, width + 2 * extra
            self.norms.append(norm_layer(norm, (channels, height, width)))
            pool = pool and (index == len(plan) - 1 or min(height, width) >= 4)
            self._pools.append(pool)
            if pool:
                height, width = height // 2, width // 2
        self._last = (min(height, last_size), min(width, last_size))
        self._shrink = self._last != (height, width)
        self.classifier = nn.Linear(channels * self._last[0] * self._last[1], num_classes)

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]; one map per convolution."""
        maps: list[Tensor] = []
        for conv, norm, pool in zip(self.convs, self.norms, self._pools, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
            maps.append(x)
            if pool:
                x = F.max_pool2d(x, 2)
        if self._shrink:
            x = F.adaptive_avg_pool2d(x, self._last)
        embedding = x.flatten(1)
        return Features(self.classifier(embedding), embedding, tuple(maps))


def build(arch: Arch, image_shape: tuple[int, int, int], num_classes: int) -> PlainNet:
    """Return `vgg11` or `alexnet` for images of `image_shape` (C, H, W)."""
    plan, last_size = (VGG11, 1) if arch.base == "vgg11" else (ALEXNET, 4)
    return PlainNet(plan, arch.norm, image_shape, num_classes, last_size)
