"""Networks of the authors' code: their initialisation by its statistics, their layers written anew."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from ddray.nets import Net, build_net, num_params


class Weights:
    """A network's convolutions, batch norms and linear layers, in the order in which they were registered."""

    def __init__(self, net: nn.Module) -> None:
        modules = list(net.modules())
        self._convs = iter([m for m in modules if isinstance(m, nn.Conv2d)])
        self._norms = iter([m for m in modules if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)])
        self._linears = iter([m for m in modules if isinstance(m, nn.Linear)])

    def conv(self, x: Tensor, stride: int = 1) -> Tensor:
        layer = next(self._convs)
        assert layer.bias is None
        return F.conv2d(x, layer.weight, stride=stride, padding=layer.weight.shape[2] // 2)

    def norm(self, x: Tensor) -> Tensor:
        """Normalise by the batch's statistics, or by each map's own (GroupNorm, a group per channel)."""
        layer = next(self._norms)
        axes = (0, 2, 3) if isinstance(layer, nn.BatchNorm2d) else (2, 3)
        centred = x - x.mean(axes, keepdim=True)
        scaled = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
        return scaled * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    def linear(self, x: Tensor) -> Tensor:
        layer = next(self._linears)
        return x @ layer.weight.T + layer.bias

    def used(self) -> bool:
        return not [*self._convs, *self._norms, *self._linears]


def randomised(arch: str, shape: tuple[int, int, int]) -> tuple[Net, Tensor]:
    """Return a float64 network whose norms have weights that tell them apart, and images."""
    generator = torch.Generator().manual_seed(1)
    net = build_net(arch, shape, 4, seed=0).double().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.weight.data = torch.rand(module.weight.shape, generator=generator).double() + 0.5
            module.bias.data = torch.randn(module.bias.shape, generator=generator).double()
    return net, torch.randn(2, *shape, generator=generator).double()


def naive_resnet(weights: Weights, x: Tensor, widths: tuple[int, ...], blocks: int, pooled: bool) -> Tensor:
    """BasicBlocks behind the stem; a stage that halves its maps does so by stride, or by average pooling."""
    for stage, width in enumerate(widths):
        for block in range(blocks):
            halves = stage > 0 and block == 0
            stride = 2 if halves and not pooled else 1
            inner = weights.norm(weights.conv(x, stride)).relu()
            inner = F.avg_pool2d(inner, 2) if halves and pooled else inner
            inner = weights.norm(weights.conv(inner))
            if halves:
                x = weights.conv(x, stride)
                x = weights.norm(F.avg_pool2d(x, 2) if pooled else x)
            x = (inner + x).relu()
            assert x.shape[1] == width
    return x


@pytest.mark.parametrize(
    ("arch", "side", "stem_pool", "blocks", "first", "pooled"),
    [
        ("resnet10_idc", 32, 1, 1, 32, False),
        ("resnet10_idc_in", 32, 1, 1, 32, False),
        ("resnet18_vico", 32, 1, 2, 64, False),
        ("resnet18_vico_bn", 16, 1, 2, 64, False),
        ("resnet10_ap", 48, 1, 1, 64, True),
        ("resnet10_ap_bn", 66, 2, 1, 64, True),
        ("resnet10_ap", 128, 2, 1, 64, True),
        ("resnet10_ap", 132, 4, 1, 64, True),  # a stem of 7x7
    ],
)
@torch.no_grad()
def test_resnets_are_the_authors_layer_by_layer(
    arch: str, side: int, stem_pool: int, blocks: int, first: int, pooled: bool
) -> None:
    net, x = randomised(arch, (3, side, side))
    weights = Weights(net)
    kernel = next(module.kernel_size for module in net.modules() if isinstance(module, nn.Conv2d))

    stem = weights.norm(weights.conv(x)).relu()
    stem = F.avg_pool2d(stem, stem_pool) if stem_pool > 1 else stem
    widths = (first, 2 * first, 4 * first, 8 * first)
    expected = weights.linear(naive_resnet(weights, stem, widths, blocks, pooled).mean((2, 3)))

    assert kernel == ((7, 7) if side > 128 else (3, 3))
    assert weights.used()
    torch.testing.assert_close(net(x), expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_idcs_densenet_layer_by_layer() -> None:
    net, x = randomised("densenet_idc", (3, 32, 32))
    weights = Weights(net)

    expected = weights.conv(x)
    for block, depth in enumerate((6, 12, 24, 16)):
        for _ in range(depth):
            inner = weights.conv(weights.norm(expected).relu())
            expected = torch.cat([expected, weights.conv(weights.norm(inner).relu())], 1)
        expected = weights.norm(expected).relu()
        if block < 3:
            expected = F.avg_pool2d(weights.conv(expected), 2)
    expected = weights.linear(F.avg_pool2d(expected, 4).flatten(1))

    assert weights.used()
    torch.testing.assert_close(net(x), expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_vgg11_tv_is_torchvisions_own() -> None:
    net = build_net("vgg11_tv", (3, 32, 32), 10, seed=0).eval()
    with torch.device("meta"):
        theirs = models.vgg11(num_classes=10).eval()
    theirs.load_state_dict(
        dict(zip(theirs.state_dict(), net.state_dict().values(), strict=True)), assign=True
    )
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    features = net.features(x)

    torch.testing.assert_close(features.logits, theirs(x))
    assert features.embedding.shape == (2, 4096)
    assert [m.shape[2] for m in features.maps] == [32, 16, 8, 8, 4, 4, 2, 2]
    last = max(index for index, layer in enumerate(theirs.features) if isinstance(layer, nn.ReLU))
    torch.testing.assert_close(features.maps[-1], theirs.features[: last + 1](x))


def test_vgg11_tv_has_torchvisions_size_for_imagenet() -> None:
    conv = sum(
        9 * a * b + b for a, b in ((3, 64), (64, 128), (128, 256), (256, 256), (256, 512), *[(512, 512)] * 3)
    )
    dense = sum(a * b + b for a, b in ((512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)))
    assert (
        num_params(build_net("vgg11_tv", (3, 224, 224), 1000, seed=0, device="meta"))
        == conv + dense
        == 132_863_336
    )


def convolutions(net: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of a network's convolutions that are large enough for statistics."""
    large = [m.weight.detach() for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000]
    assert large
    yield from large


@pytest.mark.parametrize(
    "arch", ["resnet18_vico", "resnet18_vico_bn", "resnet18_ap", "densenet_idc", "vgg11", "alexnet"]
)
def test_the_condensation_code_bases_networks_have_pytorchs_default(arch: str) -> None:
    """kaiming_uniform_(a=sqrt(5)): gain^2 = 2 / (1 + 5), so uniform within sqrt(3 gain^2 / fan_in)."""
    net = build_net(arch, (3, 32, 32), 10, seed=3)
    for weight in convolutions(net):
        bound = 1 / math.sqrt(weight[0].numel())
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    assert 0 < head.bias.abs().max() <= 1 / math.sqrt(head.in_features)


@pytest.mark.parametrize(
    "arch", ["resnet10", "resnet18", "resnet10_in", "resnet10_idc", "resnet10_ap", "vgg11_tv"]
)
def test_torchvisions_and_idcs_networks_are_drawn_by_fan_out(arch: str) -> None:
    """Normal with variance 2 / (outputs * kernel area), the stem too."""
    for weight in convolutions(build_net(arch, (3, 32, 32), 10, seed=3)):
        std = math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))
        assert weight.std() == pytest.approx(std, rel=0.05)
        assert weight.abs().max() > 3 * std, "a uniform distribution ends at 1.73"


def test_each_name_is_a_network_of_its_own() -> None:
    """What differs by its weights alone differs by name, and so by pool key."""
    ours, theirs = (
        next(convolutions(build_net(a, (3, 32, 32), 10, seed=0))) for a in ("resnet18", "resnet18_vico_bn")
    )
    assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs)
