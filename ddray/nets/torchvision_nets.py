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

_Init = Callable[[Tensor], Tensor]
_fan_out: _Init = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
_fan_in: _Init = nn.init.kaiming_normal_


class StagedNet(nn.Module):
    """Stages, a pooling to `last_size`, and a head; returns `Features` with one map per stage.

    Args:
        stages: modules from [N, C, H, W] to the last map, applied in turn.
        head: what maps the embedding to logits.
        last_size: side of the map that is flattened into the embedding, where the map is larger.
    """

    def __init__(self, stages: list[nn.Module], head: nn.Module, last_size: int = 1) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head
        self._last_size = last_size

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
    small = min(image_shape[1:]) < LARGE
    if arch.base == "resnet18_ap":
        net = _resnet18_ap(image_shape, num_classes, small)
    else:
        net = _BUILDERS[arch.base](image_shape[0], num_classes, small)
    if arch.norm == "instance":
        _use_instance_norm(net)
    return net


def _stem(old: nn.Conv2d, channels: int, small: bool, init: _Init | None) -> nn.Conv2d:
    """Return a first convolution for `channels`, 3x3 of stride 1 for small images.

    Args:
        old: torchvision's.
        channels: C of the images.
        small: whether the images are below 128 px.
        init: torchvision's initialisation of this family's convolutions, None for PyTorch's own.
    """
    kernel, stride, padding = (3, 1, 1) if small else (old.kernel_size[0], old.stride[0], old.padding[0])
    new = nn.Conv2d(channels, old.out_channels, kernel, stride, padding, bias=False)
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
    block: type[nn.Module], layers: list[int], channels: int, num_classes: int, small: bool
) -> StagedNet:
    """Return a ResNet; the maps are its four stages."""
    net = models.ResNet(block, layers, num_classes=num_classes)
    stem: list[nn.Module] = [_stem(net.conv1, channels, small, _fan_out), net.bn1, net.relu]
    if not small:
        stem.append(net.maxpool)
    return StagedNet([nn.Sequential(*stem, net.layer1), net.layer2, net.layer3, net.layer4], net.fc)


def _resnet18_ap(image_shape: tuple[int, int, int], num_classes: int, small: bool) -> StagedNet:
    """Return DC's ResNet18_AP: average pooling instead of strided convolutions."""
    net = _resnet(BasicBlock, [2, 2, 2, 2], image_shape[0], num_classes, small)
    for stage in list(net.stages)[1:]:
        first: Any = next(iter(stage.children()))
        _unstride(first)
        first.conv2 = nn.Sequential(nn.AvgPool2d(2), first.conv2)
        conv, norm = first.downsample.children()
        first.downsample = nn.Sequential(conv, nn.AvgPool2d(2), norm)
    # The last map: three floored halvings of the image (large ones: of what the stem and its pooling leave).
    sides = [(side if small else math.ceil(math.ceil(side / 2) / 2)) // 8 for side in image_shape[1:]]
    num_pixels = math.prod(min(side, AP_SIZE) for side in sides)
    return StagedNet(list(net.stages), nn.Linear(512 * num_pixels, num_classes), AP_SIZE)


def _mobilenet_v2(channels: int, num_classes: int, small: bool) -> StagedNet:
    """Return a MobileNetV2; the maps are the last of each size, linear but for the last (ReLU6)."""
    net = models.mobilenet_v2(num_classes=num_classes)
    net.features[0][0] = _stem(net.features[0][0], channels, small, _fan_out)
    if small:
        _unstride(net.features[2])
    stages: list[nn.Module] = [net.features[i:j] for i, j in ((0, 4), (4, 7), (7, 14), (14, 19))]
    return StagedNet(stages, net.classifier)


def _efficientnet_b0(channels: int, num_classes: int, small: bool) -> StagedNet:
    """Return an EfficientNet-B0; the maps are the last of each size, linear but for the last (SiLU)."""
    net = models.efficientnet_b0(num_classes=num_classes)
    net.features[0][0] = _stem(net.features[0][0], channels, small, _fan_out)
    if small:
        _unstride(net.features[2])
    stages: list[nn.Module] = [net.features[i:j] for i, j in ((0, 3), (3, 4), (4, 6), (6, 9))]
    # torchvision's dropout works in place, which would overwrite the embedding that we return.
    return StagedNet(stages, nn.Sequential(nn.Dropout(DROPOUT), net.classifier[1]))


def _shufflenet_v2(channels: int, num_classes: int, small: bool) -> StagedNet:
    """Return a ShuffleNetV2 x1.0; the maps are the stem and its three stages, the last after conv5."""
    net = models.shufflenet_v2_x1_0(num_classes=num_classes)
    net.conv1[0] = _stem(net.conv1[0], channels, small, None)
    stage2: list[nn.Module] = [net.stage2] if small else [net.maxpool, net.stage2]
    stages = [net.conv1, nn.Sequential(*stage2), net.stage3, nn.Sequential(net.stage4, net.conv5)]
    return StagedNet(stages, net.fc)


def _densenet(growth: int, num_init_features: int, channels: int, num_classes: int, small: bool) -> StagedNet:
    """Return a DenseNet-121; the maps are the activations that close its four blocks."""
    net = models.DenseNet(growth, (6, 12, 24, 16), num_init_features, num_classes=num_classes)
    parts = net.features
    parts.conv0 = _stem(parts.conv0, channels, small, _fan_in)
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


_BUILDERS: dict[str, Callable[[int, int, bool], StagedNet]] = {
    "resnet10": partial(_resnet, BasicBlock, [1, 1, 1, 1]),
    "resnet18": partial(_resnet, BasicBlock, [2, 2, 2, 2]),
    "resnet101": partial(_resnet, Bottleneck, [3, 4, 23, 3]),
    "mobilenet_v2": _mobilenet_v2,
    "densenet121": partial(_densenet, 32, 64),
    "densenet_cifar": partial(_densenet, 12, 24),
    "efficientnet_b0": _efficientnet_b0,
    "shufflenet_v2": _shufflenet_v2,
}
