"""torchvision's convolutional networks with stems for small images, and their relatives in the authors' code.

torchvision's networks halve an image twice before their first stage of blocks ends. From 128 px on they are
unchanged. Below, both halvings go: the stem becomes a 3x3 convolution of stride 1 and the max-pooling is
removed, as the field does for CIFAR; MobileNetV2 and EfficientNet-B0, which have no max-pooling, lose the
stride of the block that does its work. So every network here divides a small image by 8 and a large one by
32. Initialisation is torchvision's (a ResNet's convolutions: normal, variance 2 / fan_out), as in RDED's and
D3HR's code, except where a name below says otherwise.

Default norm is batch norm, but instance norm for `resnet18_vico` and `resnet10_ap`; `_in` replaces each by an
instance norm (one group per channel). MobileNetV2 and EfficientNet-B0 keep their own dropout of .2 before the
classifier, and EfficientNet-B0 its stochastic depth of .2.

- `resnet10`: one BasicBlock per stage.
- `resnet18_vico`: the dataset-condensation code base's ResNet18 (DC, arXiv:2006.05929, "VICO"), `_bn` its
  ResNet18BN: torchvision's layers with PyTorch's default initialisation (uniform within 1 / sqrt(fan_in)).
  `resnet18_in` is its older name.
- `resnet18_vico_ap` (older name `resnet18_ap`): that code's ResNet18BN_AP, `_in` its ResNet18_AP; PyTorch's
  default initialisation. Strided convolutions become stride 1 followed by AvgPool2d(2), in the residual
  branch after the activation; the last map is flattened (4x4 at 32 px; average-pooled to that where it is
  larger) instead of globally pooled.
- `resnet10_idc`: IDC's ResNet-10 for CIFAR (arXiv:2205.14959), which DSDM's Table 3 evaluates on: one
  BasicBlock per stage of 32, 64, 128 and 256 channels; 1,228,970 parameters.
- `densenet_idc`: IDC's `densenet_cifar`, which DSDM's Table 3 calls DenseNet-121: blocks of [6, 12, 24, 16]
  layers with growth 12, no norm after the stem, PyTorch's default initialisation; 1,000,618 parameters.
- `densenet_cifar`: the same on torchvision's DenseNet: a norm and a ReLU after the stem, its initialisation.
- `resnet10_ap`: IDC's ResNetAP-10 of width 64 (Minimax's and D3HR's Table 5): average pooling instead of
  strides as in `resnet18_vico_ap`, global pooling at the end. The stem keeps the image up to 64 px, pools it
  by 2 up to 128 px, and above is a 7x7 convolution of stride 1 pooled by 4.
- `vgg11_tv`: torchvision's VGG-11 (RDED's, D3HR's Table 2): no norm, a 7x7 last map, two hidden layers of
  4,096 units with dropout .5; 132,863,336 parameters for 1,000 classes. The embedding is the second hidden
  layer's activation; the maps are those of the 8 convolutions.

**Deviations** (authors' code | ours)

- RDED's and D3HR's small ResNets: the new first convolution keeps PyTorch's default initialisation | it gets
  torchvision's, as every other convolution.
- D3HR's Table 5 does not print ResNetAP-10's norm, and its code lacks the network | instance norm, the
  default of IDC's and Minimax's commands.
- `resnet18_vico`, `resnet10_idc` and `densenet_idc` exist for 32 px only | other sizes are pooled globally,
  and from 128 px on the stem is torchvision's.
- `vgg11_tv` below 32 px: an error | a pooling that would leave less than 2x2 is skipped, as in `vgg11`.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from ddray.nets.features import Features, norm_layer
from ddray.nets.names import Arch

LARGE = 128
AP_SIZE = 4
# Up to these sides `resnet10_ap` keeps the image in its stem, or halves it.
AP_SMALL, AP_LARGE = 64, 128
DROPOUT = 0.2

_Shape = tuple[int, int, int]
_Init = Callable[[Tensor], Tensor]
_fan_out: _Init = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
_fan_in: _Init = nn.init.kaiming_normal_


class StagedNet(nn.Module):
    """Stages, a pooling to `last_size`, and a head; returns `Features` with one map per stage.

    The last map is flattened into the embedding, pooled to a side of `last_size` where it is larger; or it
    becomes the embedding by a `neck` of layers.
    """

    def __init__(
        self, stages: list[nn.Module], head: nn.Module, last_size: int = 1, neck: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stages, self.neck, self.head = nn.ModuleList(stages), neck, head
        self._last_size = last_size

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]."""
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        embedding = self._pooled(x) if self.neck is None else self.neck(x)
        return Features(self.head(embedding), embedding, tuple(maps))

    def _pooled(self, x: Tensor) -> Tensor:
        last = (min(x.shape[2], self._last_size), min(x.shape[3], self._last_size))
        return F.adaptive_avg_pool2d(x, last).flatten(1)


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


def _pytorch_init(net: StagedNet) -> StagedNet:
    """Draw PyTorch's default weights for convolutions and linear layers, as code that sets none has them."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return net


def _resnet(
    block: type[nn.Module], layers: list[int], shape: _Shape, num_classes: int, small: bool
) -> StagedNet:
    """Return a ResNet; the maps are its four stages."""
    net = models.ResNet(block, layers, num_classes=num_classes)
    stem: list[nn.Module] = [_stem(net.conv1, shape, small, _fan_out), net.bn1, net.relu]
    if not small:
        stem.append(net.maxpool)
    return StagedNet([nn.Sequential(*stem, net.layer1), net.layer2, net.layer3, net.layer4], net.fc)


def _resnet18_vico(shape: _Shape, num_classes: int, small: bool) -> StagedNet:
    """Return DC's ResNet18."""
    return _pytorch_init(_resnet(BasicBlock, [2, 2, 2, 2], shape, num_classes, small))


def _pool_for_stride(net: StagedNet) -> None:
    """Replace the strided convolutions of a ResNet of BasicBlocks by average pooling."""
    for stage in list(net.stages)[1:]:
        first: Any = next(iter(stage.children()))
        _unstride(first)
        first.conv2 = nn.Sequential(nn.AvgPool2d(2), first.conv2)
        conv, norm = first.downsample.children()
        first.downsample = nn.Sequential(conv, nn.AvgPool2d(2), norm)


def _resnet18_ap(shape: _Shape, num_classes: int, small: bool) -> StagedNet:
    """Return DC's ResNet18BN_AP: average pooling instead of strided convolutions."""
    net = _resnet18_vico(shape, num_classes, small)
    _pool_for_stride(net)
    # The last map: three floored halvings of the image (large ones: of what the stem and its pooling leave).
    sides = [(side if small else math.ceil(math.ceil(side / 2) / 2)) // 8 for side in shape[1:]]
    num_pixels = math.prod(min(side, AP_SIZE) for side in sides)
    return StagedNet(list(net.stages), nn.Linear(512 * num_pixels, num_classes), AP_SIZE)


def _resnet10_ap(shape: _Shape, num_classes: int, _small: bool) -> StagedNet:
    """Return IDC's ResNetAP-10, whose stem depends on the image size in its own way."""
    net, side = _resnet(BasicBlock, [1, 1, 1, 1], shape, num_classes, small=True), min(shape[1:])
    _pool_for_stride(net)
    first = cast(nn.Sequential, net.stages[0])
    if side > AP_LARGE:
        first[0] = stem = nn.Conv2d(shape[0], 64, 7, padding=3, bias=False)
        _fan_out(stem.weight)
    if side > AP_SMALL:
        first.insert(3, nn.AvgPool2d(4 if side > AP_LARGE else 2))  # behind convolution, norm and ReLU
    return net


def _resnet10_idc(shape: _Shape, num_classes: int, small: bool) -> StagedNet:
    """Return IDC's ResNet-10 for CIFAR."""

    def block(inner: int, outer: int) -> BasicBlock:
        shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, 2, bias=False), nn.BatchNorm2d(outer))
        return BasicBlock(inner, outer, *((1, None) if inner == outer else (2, shortcut)))

    stem: list[nn.Module] = [_stem(nn.Conv2d(3, 32, 7, 2, 3), shape, small, None), nn.BatchNorm2d(32)]
    stem += [nn.ReLU(inplace=True), *([] if small else [nn.MaxPool2d(3, 2, 1)])]
    stages = [nn.Sequential(*stem, block(32, 32)), *(block(width, 2 * width) for width in (32, 64, 128))]
    net = StagedNet(stages, nn.Linear(256, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            _fan_out(module.weight)
    return net


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


def _densenet_idc(shape: _Shape, num_classes: int, small: bool) -> StagedNet:
    """Return IDC's `densenet_cifar`: torchvision's, but for norm and ReLU behind the first convolution."""
    net = _densenet(12, 24, shape, num_classes, small)
    first, _norm, _relu, *rest = net.stages[0].children()
    net.stages[0] = nn.Sequential(first, *rest)
    return _pytorch_init(net)


def _vgg11_tv(shape: _Shape, num_classes: int, _small: bool) -> StagedNet:
    """Return torchvision's VGG-11; the maps are those of its convolutions, before any pooling."""
    net = models.vgg11(num_classes=num_classes)
    if shape[0] != net.features[0].in_channels:
        net.features[0] = nn.Conv2d(shape[0], 64, 3, padding=1)
        _fan_out(net.features[0].weight)
        nn.init.zeros_(net.features[0].bias)
    *layers, last_pooling = net.features
    stages: list[nn.Module] = []
    begin: list[nn.Module] = []
    side = min(shape[1:])
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            if side < 4:
                continue
            side //= 2
        begin.append(layer)
        if isinstance(layer, nn.ReLU):
            stages.append(nn.Sequential(*begin))
            begin = []
    *hidden, dropout, last = net.classifier
    neck = nn.Sequential(last_pooling, net.avgpool, nn.Flatten(), *hidden)
    return StagedNet(stages, nn.Sequential(dropout, last), neck=neck)


_BUILDERS: dict[str, Callable[[_Shape, int, bool], StagedNet]] = {
    "resnet10": partial(_resnet, BasicBlock, [1, 1, 1, 1]),
    "resnet18": partial(_resnet, BasicBlock, [2, 2, 2, 2]),
    "resnet18_vico": _resnet18_vico,
    "resnet18_vico_ap": _resnet18_ap,
    "resnet10_idc": _resnet10_idc,
    "resnet10_ap": _resnet10_ap,
    "resnet101": partial(_resnet, Bottleneck, [3, 4, 23, 3]),
    "mobilenet_v2": partial(_inverted, models.mobilenet_v2, (0, 4, 7, 14, 19)),
    "densenet121": partial(_densenet, 32, 64),
    "densenet_cifar": partial(_densenet, 12, 24),
    "densenet_idc": _densenet_idc,
    "vgg11_tv": _vgg11_tv,
    "efficientnet_b0": partial(_inverted, models.efficientnet_b0, (0, 3, 4, 6, 9)),
    "shufflenet_v2": _shufflenet_v2,
}
