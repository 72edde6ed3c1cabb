"""The ConvNet family against a naive forward pass in float64, and its published size."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.errors import InputError
from ddray.nets import build_net, convnet_name, num_params, training_format
from ddray.nets.features import Flatten, norm_layer
from ddray.nets.names import ACTIVATIONS, NORMS, POOLINGS


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Correlate by summing nine shifted products."""
    n, c, h, w = x.shape
    padded = x.new_zeros(n, c, h + 2 * padding, w + 2 * padding)
    padded[:, :, padding : padding + h, padding : padding + w] = x
    height, width = h + 2 * padding - 2, w + 2 * padding - 2
    out = bias.view(1, -1, 1, 1).expand(n, -1, height, width).clone()
    for i, j in product(range(3), range(3)):
        out += torch.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return out


def naive_norm(x: Tensor, norm: str, state: dict[str, Tensor], prefix: str) -> Tensor:
    """Standardise over the axes that define each norm, then apply its affine map."""
    if norm == "none":
        return x
    n, c, h, w = x.shape
    grouped, axes = {
        "batch": (x, (0, 2, 3)),
        "batch_before": (x, (0, 2, 3)),
        "layer": (x, (1, 2, 3)),
        "instance": (x, (2, 3)),
        "group": (x.reshape(n, 4, c // 4, h, w), (2, 3, 4)),
    }[norm]
    centred = grouped - grouped.mean(axes, keepdim=True)
    scaled = (centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()).reshape(n, c, h, w)
    shape = (1, c, h, w) if norm == "layer" else (1, c, 1, 1)
    return scaled * state[f"{prefix}.weight"].view(shape) + state[f"{prefix}.bias"].view(shape)


def naive_activation(x: Tensor, activation: str) -> Tensor:
    if activation == "sigmoid":
        return 1 / (1 + (-x).exp())
    return torch.where(x > 0, x, x * (0.01 if activation == "leakyrelu" else 0.0))


def naive_pool(x: Tensor, pooling: str) -> Tensor:
    if pooling == "none":
        return x
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    corners = torch.stack([x[:, :, i:h:2, j:w:2] for i, j in product((0, 1), (0, 1))])
    return corners.amax(0) if pooling == "max" else corners.mean(0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("activation", "pooling"), list(product(ACTIVATIONS, POOLINGS)))
def test_forward_equals_the_naive_one(norm: str, activation: str, pooling: str) -> None:
    for channels, depth in ((1, 2), (3, 3)):
        net = build_net(
            convnet_name(depth, 8, activation, norm, pooling), (channels, 9, 12), 5, seed=1
        ).double()
        generator = torch.Generator().manual_seed(2)
        for parameter in net.parameters():  # affine maps away from the identity
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        x = torch.randn(4, channels, 9, 12, generator=generator, dtype=torch.float64)
        state = dict(net.body.state_dict())
        expected, maps = x, []
        for block in range(depth):
            padding = 3 if block == 0 and channels == 1 else 1
            weight, bias = state[f"convs.{block}.weight"], state[f"convs.{block}.bias"]
            if norm == "batch_before":  # of a block's input
                normed = naive_norm(expected, norm, state, f"norms.{block}") if block else expected
                expected = naive_conv(normed, weight, bias, padding)
            else:
                expected = naive_conv(expected, weight, bias, padding)
                expected = naive_norm(expected, norm, state, f"norms.{block}")
            expected = naive_activation(expected, activation)
            maps.append(expected)
            expected = naive_pool(expected, pooling)
        embedding = expected.flatten(1)
        logits = embedding @ state["classifier.weight"].T + state["classifier.bias"]
        features = net.features(x)
        assert len(features.maps) == depth
        for actual_map, expected_map in zip(features.maps, maps, strict=True):
            torch.testing.assert_close(actual_map, expected_map, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(features.embedding, embedding, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(features.logits, logits, rtol=1e-9, atol=1e-9)


def test_convnet3_has_the_published_size() -> None:
    net = build_net("convnet3", (3, 32, 32), 10, seed=0)
    assert num_params(net) == 320_010
    assert net.embed(torch.zeros(2, 3, 32, 32)).shape == (2, 2048)


def test_doubling_gives_the_inner_networks_of_krr_st() -> None:
    net = build_net("convnet3_x2_bn", (3, 32, 32), 512, seed=0)
    widths = [tuple(conv.weight.shape[:2]) for conv in net.body.convs]
    assert widths == [(128, 3), (256, 128), (512, 256)]
    assert net.embed(torch.zeros(2, 3, 32, 32)).shape == (2, 8192)


def test_one_channel_images_are_padded_by_3_whatever_their_size() -> None:
    for size, side in ((28, 32), (64, 68)):
        net = build_net("convnet3_w4", (1, size, size), 10, seed=0)
        assert net.features(torch.zeros(1, 1, size, size)).maps[0].shape == (1, 4, side, side)


def test_gradients_reach_the_image_twice() -> None:
    """Activations are in place: the derivatives that gradient matching needs must survive that."""
    for activation, norm in product(ACTIVATIONS, ("instance", "batch", "none")):
        net = build_net(convnet_name(2, 4, activation, norm, "avg"), (3, 8, 8), 3, seed=0).double()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def outputs(image: Tensor, net: torch.nn.Module = net) -> Tensor:
            return net(image).square().sum()

        x.requires_grad_()
        assert torch.autograd.gradcheck(outputs, (x,))
        assert torch.autograd.gradgradcheck(outputs, (x,))


@pytest.mark.parametrize(("arch", "shape"), [("convnet5", (3, 16, 16)), ("convnet4", (3, 8, 8))])
def test_too_small_an_image_is_refused(arch: str, shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"sides must be at least .* smaller depth"):
        build_net(arch, shape, 10, seed=0)
    build_net(f"{arch}_w4_nopool", shape, 10, seed=0)


@pytest.mark.parametrize("side", [1, 8, 16, 22, 23, 32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("grad", [False, True])
def test_instance_norm_is_a_group_norm_per_channel(
    side: int, memory_format: torch.memory_format, grad: bool
) -> None:
    layer = norm_layer("instance", (6, side, side))
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    x = (3 + 2 * torch.randn(4, 6, side, side)).contiguous(memory_format=memory_format)
    before = x.clone()

    with torch.set_grad_enabled(grad):
        actual = layer(x)

    expected = F.group_norm(x.double(), 6, layer.weight.double(), layer.bias.double())
    # For a single pixel PyTorch scales float32's own rounding by 1 / sqrt(eps) = 316.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3 if side == 1 else 1e-5)
    assert torch.equal(x, before)
    assert actual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layer_norm_is_over_channels_and_places(memory_format: torch.memory_format) -> None:
    layer = norm_layer("layer", (6, 8, 5))
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    x = (3 + 2 * torch.randn(4, 6, 8, 5)).contiguous(memory_format=memory_format).requires_grad_()
    tensors = [x, *layer.parameters()]
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]

    actual = layer(x)
    expected = F.layer_norm(doubles[0], [6, 8, 5], doubles[1], doubles[2])

    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert actual.is_contiguous(memory_format=memory_format)
    weights = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * weights).sum(), tensors)
    for grad, expected_grad in zip(
        grads, torch.autograd.grad((expected * weights).sum(), doubles), strict=True
    ):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5)


def test_gradients_of_flattened_maps_keep_channels_last() -> None:
    seen = []
    maps = torch.randn(4, 6, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    pooled = F.avg_pool2d(maps, 2)

    flat = Flatten()(pooled)
    pooled.register_hook(seen.append)
    (flat * torch.arange(96.0)).sum().backward()

    (grad,) = seen
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(grad, torch.arange(96.0).view(6, 4, 4).expand(4, -1, -1, -1))
    assert torch.equal(maps.grad, F.interpolate(grad, scale_factor=2) / 4)


def test_the_format_to_train_in_is_that_of_the_slowest_layer() -> None:
    def best_format(arch: str, device: str = "cpu") -> torch.memory_format:
        return training_format(build_net(arch, (3, 32, 32), 10, seed=0), torch.device(device))

    contiguous = {"convnet3_max", "vgg11", "convnet1_bn_nopool", "convnet2_nonorm_nopool"}
    fast = {"convnet3", "convnet3_bn", "convnet1_ln", "convnet3_gn_max", "convnet3_nonorm_nopool", "resnet18"}
    assert {arch for arch in contiguous | fast if best_format(arch) == torch.contiguous_format} == contiguous


@pytest.mark.parametrize(
    ("arch", "fused", "bf16", "contiguous"),
    [
        ("convnet3", False, False, True),
        ("convnet3_ln", False, False, True),
        ("convnet3_gn", False, True, False),
        ("convnet3_bn", False, False, False),
        ("convnet3_bn", True, True, True),
    ],
)
def test_the_format_to_train_in_on_a_gpu(arch: str, fused: bool, bf16: bool, contiguous: bool) -> None:
    net = build_net(arch, (3, 32, 32), 10, seed=0)
    form = training_format(net, torch.device("cuda"), fused=fused, bf16=bf16)
    assert (form == torch.contiguous_format) is contiguous
