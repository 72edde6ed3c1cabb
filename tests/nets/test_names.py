"""Architecture names: grammar, canonical form, did-you-mean."""

from __future__ import annotations

from itertools import product

import pytest

from ddray.errors import InputError
from ddray.nets import arch_names, check_arch, convnet_name, default_arch, with_norm
from ddray.nets.names import ACTIVATIONS, NORMS, POOLINGS, parse_arch


def test_the_720_convnets_have_distinct_names_that_parse_back() -> None:
    norms = [norm for norm in NORMS if norm != "batch_before"]  # FRePo's
    grid = list(product((1, 2, 3, 4), (32, 64, 128, 256), ACTIVATIONS, norms, POOLINGS))
    names = [convnet_name(*settings) for settings in grid]
    assert len(grid) == len(set(names)) == 720
    for name, settings in zip(names, grid, strict=True):
        arch = parse_arch(name)
        assert (arch.depth, arch.width, arch.activation, arch.norm, arch.pooling) == settings
        assert check_arch(name) == name


def test_base_names_are_canonical_and_complete() -> None:
    names = arch_names()
    assert {"convnet1", "convnet6", "resnet18_vico_ap", "densenet_cifar", "deit_tiny"} <= set(names)
    assert [check_arch(name) for name in names] == names


@pytest.mark.parametrize(
    ("arch", "canonical"),
    [
        ("convnet3_w128_relu_in_avg", "convnet3"),
        ("convnet3_max_bn_sigmoid_w64", "convnet3_w64_sigmoid_bn_max"),
        ("convnet4_nonorm", "convnet4_nonorm"),
        ("convnet3_bn_x2_w128", "convnet3_x2_bn"),
        ("convnet4_x2_w64_bn", "convnet4_w64_x2_bn"),
        ("resnet18_bn", "resnet18"),
        ("resnet18_ap_in", "resnet18_vico_ap_in"),
        ("resnet18_vico_in", "resnet18_vico"),
        ("resnet18_in", "resnet18_vico"),
        ("resnet18_vico_bn", "resnet18_vico_bn"),
        ("resnet10_ap_in", "resnet10_ap"),
        ("resnet10_idc_bn", "resnet10_idc"),
        ("vgg11_in", "vgg11"),
        ("alexnet_nonorm", "alexnet"),
        ("densenet_cifar_in", "densenet_cifar_in"),
    ],
)
def test_canonical_name_omits_defaults_whatever_the_order(arch: str, canonical: str) -> None:
    assert check_arch(arch) == canonical


@pytest.mark.parametrize(
    ("bad", "hint"),
    [
        ("convnet7", "did you mean 'convnet"),
        ("resnet_18", "did you mean 'resnet18'"),
        ("ConvNet3", "did you mean 'convnet3'"),
        ("convnet3_batch", "_bn"),
        ("convnet3_sigmod", "did you mean 'convnet3_sigmoid'"),
        ("convnet3_bn_in", "one norm"),
        ("convnet3_bn_bn", "one norm"),
        ("convnet3_w0", "_w<width>"),
        ("convnet3_", "_w<width>"),
        ("convnet3_w30_gn", "multiple of 4"),
        ("convnet3_x2_x2", "one doubling"),
        ("convnet3_x3", "did you mean 'convnet3_x2'"),
        ("resnet18_x2", "_bn, _in"),
        ("resnet18_max", "_bn, _in"),
        ("resnet18_ln", "_bn, _in"),
        ("vit_tiny_bn", "not taken"),
        ("vgg11_tv_bn", "not taken"),
        ("", "must be one of"),
    ],
)
def test_bad_names_state_rule_and_nearest(bad: str, hint: str) -> None:
    with pytest.raises(InputError, match=r"must|not taken") as caught:
        check_arch(bad)
    assert hint in str(caught.value)
    assert repr(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_with_norm_swaps_only_the_norm() -> None:
    assert with_norm("convnet3", "batch") == "convnet3_bn"
    assert with_norm("convnet3_w64_bn_max", "instance") == "convnet3_w64_max"
    assert with_norm("resnet10", "instance") == "resnet10_in"
    assert with_norm("resnet10_in", "batch") == "resnet10"
    assert with_norm("resnet18", "instance") == "resnet18_vico"
    for arch, norm in (("resnet18", "layer"), ("vit_tiny", "batch"), ("convnet3", "btach")):
        with pytest.raises(InputError, match="norm of"):
            with_norm(arch, norm)


def test_convnet_name_refuses_values_outside_the_grid() -> None:
    for settings in ((7, 128, "relu", "none", "avg"), (3, 0, "relu", "none", "avg")):
        with pytest.raises(InputError):
            convnet_name(*settings)
    with pytest.raises(InputError, match="did you mean 'relu'"):
        convnet_name(3, 128, "rellu", "none", "avg")


def test_default_arch_follows_the_size() -> None:
    sizes = {16: "convnet3", 28: "convnet3", 32: "convnet3", 64: "convnet4", 128: "convnet5"}
    assert {size: default_arch((3, size, size)) for size in sizes} == sizes
