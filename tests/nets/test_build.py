"""Properties of every architecture: shapes, determinism, re-initialisation, chunks and memory formats."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from ddray.errors import InputError
from ddray.nets import Net, arch_names, build_net, is_per_sample, num_params, reinitialize

HUGE = {"resnet101", "densenet121", "vgg11_tv"}
MODERATE = [arch for arch in arch_names() if arch not in HUGE]
SHAPES = [(1, 16, 16), (3, 16, 16), (1, 28, 28), (3, 32, 32), (1, 32, 32), (1, 64, 64), (3, 64, 64)]
# One of each kind of layer, small enough to be run often.
VARIED = ["convnet3_w16", "convnet3_w16_bn", "vgg11", "alexnet", "shufflenet_v2", "deit_tiny", "resnet10_in"]


def images(shape: tuple[int, int, int], num: int = 2) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(0))


def state(net: Net) -> list[Tensor]:
    tensors = list(chain(net.parameters(), net.buffers()))
    assert tensors
    return tensors


def same_bytes(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def fits(arch: str, shape: tuple[int, int, int]) -> bool:
    return not (arch in ("convnet5", "convnet6") and shape[1] < 2 ** int(arch[-1]))


CASES = [
    *((arch, shape) for arch in MODERATE for shape in SHAPES if fits(arch, shape)),
    *((arch, shape) for arch in sorted(HUGE - {"vgg11_tv"}) for shape in ((1, 16, 16), (3, 32, 32))),
    ("vgg11_tv", (1, 16, 16)),
    *(
        (arch, (1, 128, 128))
        for arch in ("convnet5", "resnet18_vico_ap", "resnet10_ap", "mobilenet_v2", "densenet_cifar", "vgg11")
    ),
    ("resnet18_vico_ap", (1, 130, 140)),
    ("vit_tiny", (3, 128, 128)),
]


@pytest.mark.parametrize(("arch", "shape"), CASES)
@torch.no_grad()
def test_shapes_and_finite_values(arch: str, shape: tuple[int, int, int]) -> None:
    net = build_net(arch, shape, 7, seed=0).eval()
    assert (net.arch, net.image_shape, net.num_classes) == (arch, shape, 7)
    logits, embedding, maps = net.features(images(shape))
    assert logits.shape == (2, 7)
    assert embedding.ndim == 2
    assert maps
    assert all(m.ndim == 4 and min(m.shape[2:]) >= 2 for m in maps)
    assert all(t.isfinite().all() for t in (logits, embedding, *maps))
    assert torch.equal(net(images(shape)), logits)
    assert torch.equal(net.embed(images(shape)), embedding)
    # The images decide the embedding: no layer has collapsed to a constant.
    assert (embedding[0] - embedding[1]).norm() > 1e-3 * embedding.norm()


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("resnet18", 11_173_962),  # the usual CIFAR ResNet-18
        ("vgg11", 9_231_114),  # DC's networks.py
        ("alexnet", 1_872_202),  # DC's networks.py
        ("lenet", 62_006),  # DD's
        ("alexcifar", 1_756_426),  # DD's AlexCifarNet
        (
            "resnet18_vico_ap",
            11_173_962 + 512 * 15 * 10,
        ),  # DC: a 4x4 map instead of its mean feeds the classifier
        ("densenet_cifar", 1_000_618 + 48),  # kuangliu's, and torchvision's norm after the stem
        ("densenet_idc", 1_000_618),  # IDC's densenet_cifar
        ("resnet10_idc", 1_228_970),  # IDC's ResNet of depth 10 for CIFAR
        ("resnet10_ap", 4_903_242),  # torchvision's ResNet of one block per stage: pooling has no weights
        ("resnet18_vico", 11_173_962),
    ],
)
def test_parameter_counts(arch: str, count: int) -> None:
    assert num_params(build_net(arch, (3, 32, 32), 10, seed=0)) == count


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("mobilenet_v2", "mobilenet_v2"),
        ("densenet121", "densenet121"),
        ("efficientnet_b0", "efficientnet_b0"),
    ],
)
def test_small_stems_leave_the_rest_of_torchvision_alone(arch: str, name: str) -> None:
    from torchvision import models

    theirs = models.get_model(name, num_classes=10)
    ours = build_net(arch, (3, 32, 32), 10, seed=0)
    convs = [m for m in theirs.modules() if isinstance(m, nn.Conv2d)]
    stem = convs[0].out_channels * 3
    kernel = convs[0].kernel_size[0] ** 2
    assert num_params(ours) == num_params(theirs) - stem * (kernel - 9)


@torch.no_grad()
def test_large_images_run_torchvisions_own_network() -> None:
    """From 128 px on the network is torchvision's: the same weights give the same logits."""
    from torchvision import models

    for arch, name in (("resnet18", "resnet18"), ("efficientnet_b0", "efficientnet_b0"), *_SAME):
        theirs = models.get_model(name, num_classes=5).eval()
        ours = build_net(arch, (3, 128, 128), 5, seed=0).eval()
        for old, new in zip(_by_use(theirs), _by_use(ours), strict=True):
            new.copy_(old)
        x = images((3, 128, 128))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


_SAME = (
    ("shufflenet_v2", "shufflenet_v2_x1_0"),
    ("mobilenet_v2", "mobilenet_v2"),
    ("densenet121", "densenet121"),
)


def _by_use(net: nn.Module) -> list[Tensor]:
    """Return every parameter in the order in which a forward pass meets its layer."""
    met: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, _inputs, _output: met.extend(module.parameters()))
        for module in net.modules()
        if not list(module.children()) and list(module.parameters(recurse=False))
    ]
    assert hooks
    net(torch.zeros(2, 3, 128, 128))
    for hook in hooks:
        hook.remove()
    return met


@pytest.mark.parametrize("arch", VARIED)
def test_same_seed_same_bytes_and_the_global_generator_is_left_alone(arch: str) -> None:
    before = torch.random.get_rng_state()
    first = build_net(arch, (3, 32, 32), 10, seed=5)
    torch.rand(3)
    between = torch.random.get_rng_state()
    second = build_net(arch, (3, 32, 32), 10, seed=5)
    assert torch.equal(between, torch.random.get_rng_state())
    torch.random.set_rng_state(before)
    assert same_bytes(state(first), state(second))
    assert not same_bytes(state(first), state(build_net(arch, (3, 32, 32), 10, seed=6)))


@pytest.mark.parametrize("arch", VARIED)
def test_reinitialize_equals_a_new_net_in_the_same_memory(arch: str) -> None:
    net = build_net(arch, (3, 32, 32), 10, seed=1).to(memory_format=torch.channels_last)
    net(images((3, 32, 32)))  # moves running statistics
    tensors = state(net)
    locations = [(id(t), t.data_ptr(), t.stride()) for t in tensors]
    before = torch.random.get_rng_state()
    reinitialize(net, 9)
    assert torch.equal(before, torch.random.get_rng_state())
    assert locations == [(id(t), t.data_ptr(), t.stride()) for t in state(net)]
    assert same_bytes(tensors, state(build_net(arch, (3, 32, 32), 10, seed=9)))


def test_reinitialize_works_through_torch_compile() -> None:
    net = build_net("convnet2_w8", (3, 16, 16), 10, seed=1)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = images((3, 16, 16))
    compiled(x)
    reinitialize(compiled, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), build_net("convnet2_w8", (3, 16, 16), 10, seed=2)(x))


def test_features_compile_without_a_graph_break() -> None:
    net = build_net("convnet2_w8", (3, 16, 16), 10, seed=1)
    features = torch.compile(net.features, backend="eager", fullgraph=True)(images((3, 16, 16)))
    torch.testing.assert_close(features.embedding, net.embed(images((3, 16, 16))))
    assert len(features.maps) == 2


@pytest.mark.parametrize(
    "arch", [*MODERATE[:5], *MODERATE[6:], "convnet3_bn", "vgg11_bn", "resnet10_in", "shufflenet_v2_in"]
)
def test_only_batch_norm_mixes_samples(arch: str) -> None:
    net = build_net(arch, (3, 32, 32), 10, seed=0)
    for module in net.modules():
        if "Dropout" in type(module).__name__ or "StochasticDepth" in type(module).__name__:
            module.p = 0.0
    x = images((3, 32, 32), 4)
    with torch.no_grad():
        whole = net.embed(x)
        chunks = torch.cat([net.embed(part) for part in x.split(2)])
    mixes = not torch.allclose(whole, chunks, atol=1e-4)
    assert is_per_sample(net) is not mixes


@pytest.mark.parametrize("arch", VARIED)
def test_channels_last_gives_the_same_values(arch: str) -> None:
    net = build_net(arch, (3, 32, 32), 10, seed=0)
    x = images((3, 32, 32), 4)
    tolerance = 1e-5
    if not arch.startswith("convnet"):
        # Deep nets with 2x2 instance norms amplify float32's rounding: the layouts must agree in float64.
        net, x, tolerance = net.double(), x.double(), 1e-9
    with torch.no_grad():
        plain = net.features(x)
        fast = net.to(memory_format=torch.channels_last).features(
            x.contiguous(memory_format=torch.channels_last)
        )
    for left, right in zip((plain[0], plain[1], *plain[2]), (fast[0], fast[1], *fast[2]), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("arch", [*(a for a in MODERATE if not a.startswith("convnet")), "resnet10_in"])
def test_returned_tensors_are_not_overwritten_by_later_layers(arch: str) -> None:
    """torchvision works in place a lot, dropout included; and every parameter gets a gradient."""
    net = build_net(arch, (3, 32, 32), 10, seed=0).train()
    when_computed: list[Tensor] = []
    for stage in getattr(net.body, "stages", ()):
        stage.register_forward_hook(lambda _module, _inputs, output: when_computed.append(output.clone()))
    features = net.features(images((3, 32, 32), 4))
    if when_computed:
        assert same_bytes(when_computed, list(features.maps))
        last = when_computed[-1]
        expected = last.flatten(1) if arch == "resnet18_vico_ap" else last.mean((2, 3))
        torch.testing.assert_close(features.embedding, expected)
    (features.logits.sum() + features.embedding.sum() + sum(m.sum() for m in features.maps)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_deit_averages_tokens_and_heads() -> None:
    net = build_net("deit_tiny", (3, 16, 16), 4, seed=0)
    heads = net.body.heads
    assert len(heads) == 2
    with torch.no_grad():
        for head in heads:
            nn.init.eye_(head.weight)
        features = net.features(images((3, 16, 16)))
    # With equal heads the mean of the heads is the head of the mean.
    torch.testing.assert_close(features.logits, features.embedding[:, :4])


@pytest.mark.parametrize(
    ("arch", "shape", "num_classes", "rule"),
    [
        ("resnet18", (3, 8, 8), 10, "at least 16 px"),
        ("vit_tiny", (3, 30, 30), 10, "divisible by 4"),
        ("vit_tiny", (3, 32, 16), 10, "square"),
        ("convnet3", (3, 0, 32), 10, "image_shape must be"),
        ("convnet3", (3, 32, 32), 0, "num_classes must be at least 1"),
        ("convnet33", (3, 32, 32), 10, "did you mean 'convnet3'"),
    ],
)
def test_bad_input(arch: str, shape: tuple[int, int, int], num_classes: int, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        build_net(arch, shape, num_classes, seed=0)


@pytest.mark.parametrize("arch", ["convnet3", *MODERATE[6:]])
def test_every_tensor_is_made_on_the_asked_device(arch: str) -> None:
    assert {t.device.type for t in state(build_net(arch, (3, 32, 32), 10, seed=0, device="meta"))} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_weights_are_drawn_on_the_device_and_repeat() -> None:
    before = torch.cuda.get_rng_state()
    net = build_net("convnet3", (3, 32, 32), 10, seed=1, device="cuda")
    reinitialize(net, 2)
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert {t.device.type for t in state(net)} == {"cuda"}
    assert same_bytes(state(net), state(build_net("convnet3", (3, 32, 32), 10, seed=2, device="cuda")))


def test_importing_the_package_leaves_torchvision_alone() -> None:
    code = "import sys, ddray.nets; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
