from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddray.data import PixelSpace, fit_zca, normalized_space
from ddray.evaluation.teachers import Teachers, least_accuracy
from ddray.nets import build_net


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def teachers_of(nets: list[Any], space: PixelSpace) -> Teachers:
    return Teachers(
        nets, space, "+".join(["x"] * len(nets)), 0.9, [{"arch": "x", "accuracy": 0.9}] * len(nets)
    )


def test_several_teachers_probabilities_are_averaged() -> None:
    nets = [build_net("convnet2_w8", (3, 16, 16), 3, seed=seed).eval() for seed in (0, 1)]
    space = PixelSpace("normalized", (0.5,) * 3, (0.2,) * 3)
    images = torch.randn(4, 3, 16, 16, generator=seeded())

    actual = teachers_of(nets, space).probabilities(images, space, 2.0)

    expected = sum(torch.softmax(net(images) / 2, 1) for net in nets) / 2
    assert torch.allclose(actual, expected, atol=1e-6)
    logits = sum(net(images) for net in nets) / 2
    averaged = teachers_of(nets, space).set_up("eval", "logits").probabilities(images, space, 2.0)
    assert torch.allclose(averaged, torch.softmax(logits / 2, 1), atol=1e-6)
    assert not torch.allclose(averaged, actual, atol=1e-6)
    assert "each" in teachers_of(nets, space).describe()
    assert "each" not in teachers_of(nets[:1], space).describe()


def test_logits_are_averaged_or_scaled_to_one_norm_first() -> None:
    """G-VBSM's labels against numpy; on ImageNet each teacher's batch of logits has the mean norm."""
    nets = [build_net("convnet2_w8", (3, 16, 16), 3, seed=seed).eval() for seed in (0, 1, 2)]
    with torch.no_grad():
        nets[2].body.classifier.weight.mul_(50)
    space = PixelSpace("normalized", (0.5,) * 3, (0.2,) * 3)
    images = torch.randn(4, 3, 16, 16, generator=seeded())
    each = np.stack([net(images).detach().double().numpy() for net in nets])
    norms = np.sqrt((each**2).sum((1, 2)))

    plain = teachers_of(nets, space).set_up("eval", "logits")
    scaled = teachers_of(nets, space).set_up("eval", "scaled_logits")

    expected = (each * (norms.mean() / norms)[:, None, None]).mean(0)
    np.testing.assert_allclose(plain.logits(images, space).numpy(), each.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.logits(images, space).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, each.mean(0), rtol=0.1)
    softened = np.exp(expected / 20)
    softened /= softened.sum(1, keepdims=True)
    np.testing.assert_allclose(scaled.probabilities(images, space, 20.0).numpy(), softened, rtol=1e-5)


def test_a_teacher_sees_images_in_its_own_pixel_space(toy: Any) -> None:
    dataset = toy()
    net = build_net("convnet2_w8", (3, 16, 16), 3, seed=0).eval()
    teacher_space = normalized_space(dataset)
    raw = PixelSpace("raw", dataset.mean, dataset.std)
    whitened = fit_zca(dataset.train())
    images = dataset.train().images[:5]

    teachers = teachers_of([net], teacher_space)
    expected = teachers.probabilities(teacher_space.encode(images), teacher_space, 1.0)
    for space in (raw, whitened):
        actual = teachers.probabilities(space.encode(images), space, 1.0)
        assert torch.allclose(actual, expected, atol=1e-3)


def test_a_teacher_in_train_mode_labels_by_the_batchs_statistics(toy: Any) -> None:
    """As SRe2L's CIFAR code does, by hand; its averages move there too, unread, and stay here."""
    space = normalized_space(toy())
    conv, norm, head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
    net = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    norm.running_mean = torch.tensor([1.0, 2.0, -1.0, 0.0])
    net.requires_grad_(False).eval()
    before, theirs = copy.deepcopy(net.state_dict()), copy.deepcopy(net).train()
    teachers = teachers_of([net], space)
    trained = teachers.set_up("train", "probabilities")

    for seed in (0, 1):
        images = torch.randn(6, 3, 8, 8, generator=seeded(seed))
        maps = conv(images)
        mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
        maps = (maps - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
        maps = maps * norm.weight[:, None, None] + norm.bias[:, None, None]
        by_hand = F.softmax(head(F.relu(maps).mean((2, 3))) / 30, 1)

        labels = trained.probabilities(images, space, 30.0)
        torch.testing.assert_close(labels, by_hand)
        torch.testing.assert_close(labels, F.softmax(theirs(images) / 30, 1))
        assert not torch.allclose(labels, teachers.probabilities(images, space, 30.0), atol=1e-4)

    assert not torch.equal(theirs[1].running_mean, before["1.running_mean"])
    for state in (net.state_dict(), trained.nets[0].state_dict()):
        assert all(torch.equal(value, state[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("num_classes", "num_images", "expected"),
    [
        (1, 10, 0.0),
        (2, 100, 0.65),
        (2, 10_000, 0.515),
        (10, 10_000, 0.109),
        (200, 10_000, 0.0071),
        (2, 4, 0.9),
    ],
)
def test_a_teacher_must_do_better_than_luck(num_classes: int, num_images: int, expected: float) -> None:
    assert least_accuracy(num_classes, num_images) == pytest.approx(expected, abs=1e-4)
