"""Networks as functions of a flat vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddray.errors import InputError
from ddray.nets import build_net
from ddray.training.student import Student, flat_parameters

SHAPE = (1, 16, 16)


@pytest.mark.parametrize("arch", ["convnet2_w8", "convnet2_w8_ln_max", "resnet10_ap", "vit_tiny", "lenet"])
def test_the_logits_are_the_networks(arch: str) -> None:
    net = build_net(arch, SHAPE, 4, seed=0)
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    student = Student(build_net(arch, SHAPE, 4, seed=1))

    logits = student.logits(flat_parameters(net), images)

    assert student.num_params == sum(parameter.numel() for parameter in net.parameters())
    torch.testing.assert_close(logits, net(images), rtol=1e-4, atol=1e-5)


def test_a_vector_comes_back_and_is_a_copy() -> None:
    net = build_net("convnet2_w8", SHAPE, 4, seed=0)
    flat = flat_parameters(net)
    before, parts = flat.clone(), Student(net).parameters(flat)

    assert [*parts] == [name for name, _ in net.named_parameters()]
    assert all(torch.equal(parts[name], parameter) for name, parameter in net.named_parameters())
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert torch.equal(flat, before)


def test_a_network_of_one_parameter_is_copied_too() -> None:
    net = torch.nn.Linear(3, 2, bias=False)
    flat = flat_parameters(net)

    with torch.no_grad():
        net.weight.zero_()

    assert bool(flat.any())


def test_batch_norm_takes_the_batchs_statistics_and_keeps_none() -> None:
    net = build_net("convnet2_w8_bn", SHAPE, 4, seed=0)
    images = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    student, flat = Student(net), flat_parameters(net)
    expected = net.train()(images)

    first, second = student.logits(flat, images), student.logits(flat, images)

    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert all(int(buffer) == 0 for name, buffer in student._net.named_buffers() if "num_batches" in name)


def test_another_persons_network_with_dropout_is_refused() -> None:
    Student(nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="repeat its steps exactly, but Sequential drops at random"):
        Student(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2)))


def test_a_network_that_drops_at_random_is_refused() -> None:
    net = build_net("vgg11_tv", (3, 32, 32), 4, seed=0)

    with pytest.raises(InputError, match=r"repeat its steps exactly, but vgg11_tv drops at random"):
        Student(net)
