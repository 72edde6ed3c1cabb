"""The blocks for training on a CPU, against torch's layers in double precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.nets import build_net, training_format
from ddray.nets.cpu_blocks import norm_block, training_pass
from ddray.nets.features import InstanceNorm
from ddray.seeding import derive

CPU = torch.device("cpu")
LAST = torch.channels_last


def net_of(arch: str, shape: tuple[int, int, int]) -> Any:
    """Return a network whose biases and scales differ from 0 and 1, some of the scales negative."""
    net, generator = build_net(arch, shape, 4, seed=0).train(), derive(1)
    for param in net.parameters():
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    net.body.norms[0].weight.data[:2] *= -1
    return net.to(memory_format=LAST)


def images_of(num: int, shape: tuple[int, int, int]) -> Tensor:
    """Return random images, two of them of hardly any contrast."""
    images = torch.randn(num, *shape, generator=derive(2))
    images[0], images[1] = 0.7 + 1e-2 * images[0], 1e-3 * images[1]
    return images.contiguous(memory_format=LAST)


def gradients(net: Any, images: Tensor, *, bf16: bool = False) -> list[Tensor]:
    """Return the logits and the gradient of every weight."""
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = net(images)
    F.cross_entropy(logits.float(), torch.arange(len(images)) % 4).backward()
    return [logits.detach(), *(param.grad.clone() for param in net.parameters())]


def relative(values: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error, relative to a tensor's largest value; what is 0 but for noise aside."""
    pairs = [pair for pair in zip(values, exact, strict=True) if pair[1].abs().max() > 1e-6]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("convnet3_w16", (3, 32, 32)),
        ("convnet2_w16", (1, 28, 28)),
        ("convnet2_w8", (3, 19, 23)),  # odd sides
        ("convnet1_w128", (3, 32, 32)),  # pieces of one image
        ("convnet2_w16", (8, 16, 16)),  # too many channels for the matrix product
    ],
)
def test_gradients_are_those_of_the_layers(arch: str, shape: tuple[int, int, int]) -> None:
    net, images = net_of(arch, shape), images_of(9, shape)
    exact = gradients(copy.deepcopy(net).double(), images.double())
    with training_pass():
        blocks, half = gradients(net, images), gradients(net, images, bf16=True)
    assert relative(blocks, exact) < 1e-4  # torch's layers in float32 are off by up to a percent here
    assert relative([half[0][2:]], [exact[0][2:]]) < 3e-2


def test_ordinary_images_give_what_torch_gives_to_the_fifth_digit() -> None:
    net, images = net_of("convnet3_w16", (3, 32, 32)), images_of(9, (3, 32, 32))[2:]
    layers = gradients(net, images)
    with training_pass():
        assert relative(gradients(net, images), layers) < 1e-5


def test_a_pass_without_gradients_in_bf16_is_as_exact() -> None:
    net, images = net_of("convnet2_w16", (3, 32, 32)).eval(), images_of(9, (3, 32, 32))
    with torch.no_grad():
        exact = copy.deepcopy(net).double().features(images.double())
        with torch.autocast("cpu", torch.bfloat16):
            half = net.features(images)
    assert half.maps[0].is_contiguous(memory_format=LAST)
    assert relative([half.maps[0].float()], [exact.maps[0]]) < 2e-2
    assert relative([half.logits[2:].float()], [exact.logits[2:]]) < 3e-2


def test_autocast_leaves_means_and_variances_in_float32() -> None:
    norm = InstanceNorm(8, 8)
    maps = (3 + torch.randn(6, 8, 16, 16, generator=derive(3))).bfloat16().contiguous(memory_format=LAST)
    exact = norm_block(norm, maps.float())
    with torch.autocast("cpu", torch.bfloat16):
        half = norm_block(norm, maps)
    torch.testing.assert_close(half.float(), exact, rtol=2**-8, atol=1e-4)


def test_the_norm_takes_out_a_bias_whose_gradient_is_zero() -> None:
    net = net_of("convnet1_w8", (3, 16, 16))
    with training_pass():
        gradients(net, images_of(4, (3, 16, 16)))
    assert net.body.convs[0].bias.grad.abs().max() == 0


def test_images_get_gradients_too() -> None:
    net, images = net_of("convnet2_w8", (3, 16, 16)), images_of(4, (3, 16, 16)).requires_grad_()
    (exact,) = torch.autograd.grad(net(images).square().sum(), images)
    with training_pass():
        (grad,) = torch.autograd.grad(net(images).square().sum(), images)
    torch.testing.assert_close(grad, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_contiguous_images_are_trained_on_alike_and_second_derivatives_take_the_layers() -> None:
    net = net_of("convnet2_w8", (3, 16, 16)).to(memory_format=torch.contiguous_format)
    images = images_of(6, (3, 16, 16)).contiguous()[2:]
    with training_pass():
        torch.testing.assert_close(net(images), net.features(images).logits, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(net(images).sum(), net.body.norms[0].weight, create_graph=True)
    assert grad.requires_grad


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("convnet2_w8", LAST),
        ("convnet2_w8_max", torch.contiguous_format),
        ("convnet2_w8_bn", LAST),
        ("convnet1_w8_nonorm_nopool", torch.contiguous_format),
    ],
)
def test_the_format_of_a_training_on_a_cpu(arch: str, expected: torch.memory_format) -> None:
    assert training_format(build_net(arch, (3, 16, 16), 4, seed=0), CPU) is expected
