"""torchvision's convolutional networks (ResNet, MobileNetV2, ...) with stems for small images.

torchvision's networks halve an image twice before their first stage of blocks ends. From 128 px on they are
unchanged. Below, both halvings go: the stem becomes a 3x3 convolution of stride 1 and the max-pooling is
removed, as the field does for CIFAR; MobileNetV2 and EfficientNet-B0, which have no max-pooling, lose the
stride of the block that does its work. So every network here divides a small image by 8 and a large one by
32. Initialisation is torchvision's.

Default norm is batch norm; `_in` replaces each by an instance norm (one group per channel). MobileNetV2 and
EfficientNet-B0 keep their own dropout of .2 before the classifier, and EfficientNet-B0 its stochastic depth
of .2.

- `resnet10`: one BasicBlock per stage.
- `resnet18_ap`: the dataset-condensation code base's (DC, arXiv:2006.05929). Strided convolutions become
  stride 1 followed by AvgPool2d(2), in the residual branch after the activation; the last map is flattened
  (4x4 at 32 px; average-pooled to that where it is larger) instead of globally pooled.
- `densenet_cifar`: blocks of [6, 12, 24, 16] layers with growth 12, what DSDM's code runs as "DenseNet-121".
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from ddray.nets.features import Features, norm_layer
from ddray.nets.names import Arch

LARGE = 128
AP_SIZE = 4
DROPOUT = 0.2

_Shape = tuple[int, int, int]
_Init = Callable[[Tensor], Tensor]
_fan_out: _Init = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
_fan_in: _Init = nn.init.kaiming_normal_


class StagedNet(nn.Module):
    """Stages, a pooling to `last_size`, and a head; returns `Features` with one map per stage.

    The last map is flattened into the embedding, pooled to a side of `last_size` where it is larger.
    """

    def __init__(self, stages: list[nn.Module], head: nn.Module, last_size: int = 1) -> None:
        super().__init__()
        self.stages, self.head, self._last_size = nn.ModuleList(stages), head, last_size

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]."""
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        last = (min(x.shape[2], self._last_size), min(x.shape[3], self._last_size))
        embedding = F.adaptive_avg_pool2d(x, last).flatten(1)
        return Features(self.head(embedding), embedding, tuple(maps))


def build(arch: Arch, image_shape: tuple[int, int, int], num_classes: int) -> StagedNet:
    """Return the network behind a parsed name for images of `image_shape` (C, H, W)."""
    net = _BUILDERS[arch.base](image_shape, num_classes, min(image_shape[1:]) < LARGE)
    if arch.norm == "instance":
        _use_instance_norm(net)
    return net


def _stem(old: nn.Conv2d, shape: _Shape, small: bool, init: _Init | None) -> nn.Conv2d:
    """Return a first convolution for images of `shape`, 3x3 of stride 1 for small ones, else like the old.

    `init` is torchvision's initialisation of this family's convolutions, None for PyTorch's own.
    """
    kernel, stride, padding = (3, 1, 1) if small else (old.kernel_size[0], old.stride[0], old.padding[0])
    new = nn.Conv2d(shape[0], old.out_channels, kernel, stride, padding, bias=False)
    if init is not None:
        init(new.weight)
    return new


def _use_instance_norm(module: nn.Module) -> None:
    """Replace every batch norm below `module` by an instance norm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, norm_layer("instance", (child.num_features, 1, 1)))
        else:
            _use_instance_norm(child)


def _unstride(module: nn.Module) -> None:
    """Make every strided convolution below `module` keep the size of its map."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.stride = (1, 1)


def _resnet(
    block: type[nn.Module], layers: list[int], shape: _Shape, num_classes: int, small: bool
) -> StagedNet:
    """Return a ResNet; the maps are its four stages."""
    net = models.ResNet(block, layers, num_classes=num_classes)
    stem: list[nn.Module] = [_stem(net.conv1, shape, small, _fan_out), net.bn1, net.relu]
    if not small:
        stem.append(net.maxpool)
    return StagedNet([nn.Sequential(*stem, net.layer1), net.layer2, net.layer3, net.layer4], net.fc)


def _resnet18_ap(shape: _Shape, num_classes: int, small: bool) -> StagedNet:
    """Return DC's ResNet18_AP: average pooling instead of strided convolutions."""
    net = _resnet(BasicBlock, [2, 2, 2, 2], shape, num_classes, small)
    for stage in list(net.stages)[1:]:
        first: Any = next(iter(stage.children()))
        _unstride(first)
        first.conv2 = nn.Sequential(nn.AvgPool2d(2), first.conv2)
        conv, norm = first.downsample.children()
        first.downsample = nn.Sequential(conv, nn.AvgPool2d(2), norm)
    # The last map: three floored halvings of the image (large ones: of what the stem and its pooling leave).
    sides = [(side if small else math.ceil(math.ceil(side / 2) / 2)) // 8 for side in shape[1:]]
    num_pixels = math.prod(min(side, AP_SIZE) for side in sides)
    return StagedNet(list(net.stages), nn.Linear(512 * num_pixels, num_classes), AP_SIZE)


def _inverted(
    make: Callable[..., Any], cuts: tuple[int, ...], shape: _Shape, num_classes: int, small: bool
) -> StagedNet:
    """Return a MobileNetV2 or EfficientNet-B0, cut into stages at these blocks.

    The maps are the last of each size, linear but for the very last (ReLU6, SiLU).
    """
    net = make(num_classes=num_classes)
    net.features[0][0] = _stem(net.features[0][0], shape, small, _fan_out)
    if small:
        _unstride(net.features[2])
    # EfficientNet's own dropout works in place, which would overwrite the embedding that we return.
    head = nn.Sequential(nn.Dropout(DROPOUT), net.classifier[1])
    return StagedNet([net.features[begin:end] for begin, end in pairwise(cuts)], head)


def _shufflenet_v2(shape: _Shape, num_classes: int, small: bool) -> StagedNet:
    """Return a ShuffleNetV2 x1.0; the maps are the stem and its three stages, the last after conv5."""
    net = models.shufflenet_v2_x1_0(num_classes=num_classes)
    net.conv1[0] = _stem(net.conv1[0], shape, small, None)
    stage2: list[nn.Module] = [net.stage2] if small else [net.maxpool, net.stage2]
    stages = [net.conv1, nn.Sequential(*stage2), net.stage3, nn.Sequential(net.stage4, net.conv5)]
    return StagedNet(stages, net.fc)


def _densenet(growth: int, num_init_features: int, shape: _Shape, num_classes: int, small: bool) -> StagedNet:
    """Return a DenseNet-121; the maps are the activations that close its four blocks."""
    net = models.DenseNet(growth, (6, 12, 24, 16), num_init_features, num_classes=num_classes)
    parts = net.features
    parts.conv0 = _stem(parts.conv0, shape, small, _fan_in)
    begin: list[nn.Module] = [parts.conv0, parts.norm0, parts.relu0]
    if not small:
        begin.append(parts.pool0)
    stages: list[nn.Module] = []
    for index in (1, 2, 3):
        transition = parts.get_submodule(f"transition{index}")
        block = parts.get_submodule(f"denseblock{index}")
        stages.append(nn.Sequential(*begin, block, transition.norm, transition.relu))
        begin = [transition.conv, transition.pool]
    stages.append(nn.Sequential(*begin, parts.denseblock4, parts.norm5, nn.ReLU(inplace=True)))
    return StagedNet(stages, net.classifier)


_BUILDERS: dict[str, Callable[[_Shape, int, bool], StagedNet]] = {
    "resnet10": partial(_resnet, BasicBlock, [1, 1, 1, 1]),
    "resnet18": partial(_resnet, BasicBlock, [2, 2, 2, 2]),
    "resnet18_ap": _resnet18_ap,
    "resnet101": partial(_resnet, Bottleneck, [3, 4, 23, 3]),
    "mobilenet_v2": partial(_inverted, models.mobilenet_v2, (0, 4, 7, 14, 19)),
    "densenet121": partial(_densenet, 32, 64),
    "densenet_cifar": partial(_densenet, 12, 24),
    "efficientnet_b0": partial(_inverted, models.efficientnet_b0, (0, 3, 4, 6, 9)),
    "shufflenet_v2": _shufflenet_v2,
}
