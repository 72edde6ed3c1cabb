"""The ConvNets, VGG-11 and AlexNet of the dataset-condensation code base (DC, arXiv:2006.05929; "VICO").

Each is a chain of conv (bias) -> norm -> activation -> 2x2 pooling, flattened into one linear layer; layers
keep PyTorch's default initialisation, and there is no dropout. A one-channel image gets two more pixels of
padding in the first convolution, whatever its size: the authors' code tests the channels, which turns 28 px
into 32.

A ConvNet-D is D blocks with conv3x3 (padding 1) and pooling. Blocks have one width, or (`_x2`, KRR-ST's
inner networks) each twice the channels of the one before. VGG-11 and AlexNet are the authors' for 32 px, with
ReLU, max-pooling and the authors' default norms: instance norm for VGG-11, none for AlexNet.

**Deviations**
- FRePo's inner networks (`_bnbefore`) normalise the input of every block but the first one, with running
  statistics that are nearly the last batch's.
- Other sizes of VGG-11 and AlexNet, whose originals fit 32 px only. Below, a pooling that would leave less
  than 2x2 before the next convolution is skipped (instance norm of one pixel is constant). Above, the last
  map is average-pooled to the size it has at 32 px (VGG-11 1x1, AlexNet 4x4), so that the classifier does not
  grow.
"""

from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from ddray.errors import InputError
from ddray.nets.cpu_blocks import (
    conv_norm,
    conv_norm_block,
    few_inputs,
    norm_block,
    takes_low_precision,
)
from ddray.nets.features import Features, Flatten, InstanceNorm, norm_layer
from ddray.nets.names import Arch

LEAKY_SLOPE = 0.01
# Per convolution: output channels, kernel size, the 2x2 pooling that follows ("none": none).
Plan = Sequence[tuple[int, int, str]]
_VGG11: Final = (
    *((64, 3, "max"), (128, 3, "max"), (256, 3, "none"), (256, 3, "max")),
    *((512, 3, "none"), (512, 3, "max"), (512, 3, "none"), (512, 3, "max")),
)
_ALEXNET: Final = (*((128, 5, "max"), (192, 5, "max"), (256, 3, "none"), (192, 3, "none"), (192, 3, "max")),)


class ChainNet(nn.Module):
    """A chain of convolutions that returns `Features`: one map per convolution, the last pooling flattened.

    `arch` has the activation and the norm. With a `last_size`, a larger last map is pooled to that side, and
    poolings that smaller images do not allow are skipped.

    Raises:
        InputError: the image is too small for the plan.
    """

    def __init__(
        self,
        plan: Plan,
        arch: Arch,
        image_shape: tuple[int, int, int],
        num_classes: int,
        last_size: int | None = None,
    ) -> None:
        super().__init__()
        self._activation, self._in_place = arch.activation, arch.norm != "layer"
        self._norms_inputs = arch.norm == "batch_before"
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.poolings: list[str] = []
        channels, height, width = image_shape
        for index, (out_channels, kernel, pooling) in enumerate(plan):
            extra = 2 if index == 0 and channels == 1 else 0
            before = (channels, height, width)
            self.convs.append(nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2 + extra))
            channels, height, width = out_channels, height + 2 * extra, width + 2 * extra
            normed = before if self._norms_inputs else (channels, height, width)
            is_input = self._norms_inputs and index == 0
            self.norms.append(nn.Identity() if is_input else norm_layer(arch.norm, normed))
            if last_size and index < len(plan) - 1 and min(height, width) < 4:
                pooling = "none"
            if pooling != "none":
                if min(height, width) < 2:
                    raise InputError(
                        f"{arch.name} halves the image {len(plan)} times, so its sides must be at least "
                        f"{2 ** len(plan)} px, got {image_shape[1]}x{image_shape[2]}; take a smaller depth"
                    )
                height, width = height // 2, width // 2
            self.poolings.append(pooling)
        self._last = (min(height, last_size or height), min(width, last_size or width))
        self._shrink = self._last != (height, width)
        self.flatten = nn.Flatten() if last_size else Flatten()
        self.classifier = nn.Linear(channels * self._last[0] * self._last[1], num_classes)

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]."""
        maps: list[Tensor] = []
        for conv, norm, pooling in zip(self.convs, self.norms, self.poolings, strict=True):
            maps.append(self._activate(conv(norm(x)) if self._norms_inputs else _normed(conv, norm, x)))
            x = _pooled(maps[-1], pooling)
        embedding = self._embedding(x)
        return Features(self.classifier(embedding), embedding, tuple(maps))

    @property
    def has_blocks(self) -> bool:
        """Whether `cpu_blocks` holds all its blocks: instance norm, ReLU, average pooling."""
        norms = all(isinstance(norm, InstanceNorm) for norm in self.norms)
        return norms and self._activation == "relu" and {*self.poolings} == {"avg"}

    def training_logits(self, x: Tensor) -> Tensor:
        """Return the logits of `x` [N, C, H, W], without the maps; for a `training_pass`, if `has_blocks`."""
        layers: Any = zip(self.convs, self.norms, strict=True)
        for conv, norm in layers:
            if norm.is_on_cpu(x) and few_inputs(conv, x):
                x = conv_norm_block(conv, norm, x)
                continue
            x = conv(x)
            x = norm_block(norm, x) if norm.takes_fast_path(x) else F.avg_pool2d(self._activate(norm(x)), 2)
        logits: Tensor = self.classifier(self._embedding(x))
        return logits

    def _embedding(self, x: Tensor) -> Tensor:
        if self._shrink:
            x = F.adaptive_avg_pool2d(x, self._last)
        embedding: Tensor = self.flatten(x)
        return embedding

    def _activate(self, x: Tensor) -> Tensor:
        """Apply the activation in place, which conv and norm allow; but not on a LayerNorm's view."""
        if self._activation == "sigmoid":
            return x.sigmoid_() if self._in_place else x.sigmoid()
        if self._activation == "leakyrelu":
            return F.leaky_relu(x, LEAKY_SLOPE, inplace=self._in_place)
        return F.relu(x, inplace=self._in_place)


def _normed(conv: Any, norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, InstanceNorm) and norm.is_on_cpu(x) and takes_low_precision(conv, x):
        return conv_norm(conv, norm, x)
    normed: Tensor = norm(conv(x))
    return normed


def _pooled(maps: Tensor, pooling: str) -> Tensor:
    """Return `maps` after 2x2 pooling: avg, max, or none."""
    if pooling == "none":
        return maps
    return F.avg_pool2d(maps, 2) if pooling == "avg" else F.max_pool2d(maps, 2)


def build(arch: Arch, image_shape: tuple[int, int, int], num_classes: int) -> ChainNet:
    """Return a ConvNet, `vgg11` or `alexnet` for images of `image_shape` (C, H, W)."""
    if not arch.is_convnet:
        plan, last_size = (_VGG11, 1) if arch.base == "vgg11" else (_ALEXNET, 4)
        return ChainNet(plan, arch, image_shape, num_classes, last_size)
    widths = [arch.width * 2**block if arch.doubling else arch.width for block in range(arch.depth)]
    return ChainNet([(width, 3, arch.pooling) for width in widths], arch, image_shape, num_classes)
