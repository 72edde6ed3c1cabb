"""LeNet and AlexCifarNet against DD's layers, and their initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddray.nets import Net, build_net, num_params, reinitialize


def images(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arch", "shape", "count"),
    [
        ("lenet", (1, 28, 28), 61_706),
        ("lenet", (3, 32, 32), 62_006),
        ("alexcifar", (3, 32, 32), 1_756_426),
    ],
)
def test_parameter_counts(arch: str, shape: tuple[int, int, int], count: int) -> None:
    assert num_params(build_net(arch, shape, 10, seed=0)) == count


def weights(net: Net) -> list[Tensor]:
    return list(net.parameters())


@pytest.mark.parametrize(
    ("shape", "padding", "inputs"),
    [((1, 28, 28), 2, 400), ((3, 32, 32), 0, 400), ((1, 16, 16), 2, 64)],
)
def test_lenet_layer_by_layer(shape: tuple[int, int, int], padding: int, inputs: int) -> None:
    """The first convolution is padded by the images' size, not by their channels."""
    net = build_net("lenet", shape, 10, seed=0)
    w1, b1, w2, b2, *linears = weights(net)
    x = F.max_pool2d(F.relu(F.conv2d(images(*shape), w1, b1, padding=padding)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, w2, b2)), 2).flatten(1)
    assert x.shape[1] == inputs
    x = F.relu(F.linear(x, *linears[:2]))
    embedding = F.relu(F.linear(x, *linears[2:4]))

    features = net.features(images(*shape))

    torch.testing.assert_close(features.embedding, embedding)
    torch.testing.assert_close(features.logits, F.linear(embedding, *linears[4:]))
    assert [part.shape[0] for part in (w1, w2, linears[0], linears[2])] == [6, 16, 120, 84]


def test_alexcifar_layer_by_layer() -> None:
    net = build_net("alexcifar", (3, 32, 32), 10, seed=0)
    w1, b1, w2, b2, *linears = weights(net)

    def normed(maps: Tensor) -> Tensor:
        """Divide by (1 + .001 / 9 times the mean of the squares of 4 channels)^.75: two before, one after."""
        squares = F.pad(maps.square(), (0, 0, 0, 0, 2, 1))
        total = sum(squares[:, shift : shift + maps.shape[1]] for shift in range(4))
        return maps / (1 + 0.001 / 9 * total / 4) ** 0.75

    def pooled(maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, 3, stride=2, padding=1)

    x = normed(pooled(F.relu(F.conv2d(images(3, 32, 32), w1, b1, padding=2))))
    x = pooled(normed(F.relu(F.conv2d(x, w2, b2, padding=2)))).flatten(1)
    x = F.relu(F.linear(x, *linears[:2]))
    x = F.relu(F.linear(x, *linears[2:4]))

    torch.testing.assert_close(net(images(3, 32, 32)), F.linear(x, *linears[4:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["lenet", "alexcifar"])
def test_weights_are_xaviers_normal_and_biases_zero(arch: str) -> None:
    net = build_net(arch, (3, 32, 32), 10, seed=0)
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]

    for layer in layers:
        assert layer.bias is not None
        weight, bias = layer.weight.detach(), layer.bias
        assert not bool(bias.any())
        receptive = math.prod(weight.shape[2:])
        deviation = math.sqrt(2 / (receptive * (weight.shape[0] + weight.shape[1])))
        tolerance = 5 / math.sqrt(2 * weight.numel())
        assert float(weight.std()) == pytest.approx(deviation, rel=tolerance)
        assert abs(float(weight.mean())) < 5 * deviation / math.sqrt(weight.numel())


def test_fresh_weights_in_place_are_those_of_a_new_network() -> None:
    net = build_net("lenet", (1, 16, 16), 10, seed=0)
    expected = build_net("lenet", (1, 16, 16), 10, seed=5)

    reinitialize(net, 5)

    assert all(torch.equal(*pair) for pair in zip(net.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("arch", ["lenet", "alexcifar"])
def test_they_can_be_differentiated_twice(arch: str) -> None:
    net = build_net(arch, (1, 16, 16), 3, seed=0).double()
    inputs = images(1, 16, 16).double().requires_grad_(True)
    direction = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def size(batch: Tensor) -> Tensor:
        """The squared norm of the loss's gradient in the weights."""
        loss = F.cross_entropy(net(batch), torch.tensor([0, 2]))
        slopes = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        return torch.stack([slope.square().sum() for slope in slopes]).sum()

    (slope,) = torch.autograd.grad(size(inputs), inputs)
    ends = [size(inputs.detach() + sign * 1e-6 * direction).item() for sign in (1, -1)]
    assert float((slope * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
