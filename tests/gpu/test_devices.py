"""What methods and protocols are built from, on every device there is: the numbers are those of the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import normalized_space
from ddray.methods import method_names
from ddray.methods.families.diffusion.groups import group_sample
from ddray.nets import build_net
from ddray.seeding import derive, forked_global
from ddray.testing import random_dataset
from ddray.training.dsa import dsa_for
from ddray.training.embedding import embed_images, score
from ddray.training.engine import Order, Rule, Step, run
from tests.gpu.runs import distilled, fit_briefly

CPU = torch.device("cpu")


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first.cpu(), second.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [4, 60])
def test_training(device: torch.device, steps: int) -> None:
    """A few steps eagerly; many by graphs on CUDA."""
    dataset = random_dataset((12, 12, 12))
    images, labels = normalized_space(dataset).encode(dataset.train().images), dataset.train().labels

    def loss(device: torch.device) -> Tensor:
        net = build_net("convnet2_w8", (3, 16, 16), 3, seed=0, device=device).train()
        inputs, targets = images.to(device), labels.to(device)
        order = Order(len(labels), 12).indices(derive(0, "order"), device)
        step = Step([net], Rule(F.cross_entropy, torch.optim.SGD), num_steps=steps)
        return run(step, ((inputs[rows], targets[rows]) for rows in order), lr=lambda step: 0.01)

    assert close(loss(device), loss(CPU))


def test_augmentation(device: torch.device) -> None:
    images, dsa = torch.rand(8, 3, 16, 16, generator=derive(0, "images")), dsa_for(True)

    def augmented(device: torch.device) -> Tensor:
        plan = dsa.draw(8, derive(0, "plan"), shared_op=False)
        return dsa.apply(images.to(device), plan)

    assert close(augmented(device), augmented(CPU))


def test_scoring(device: torch.device) -> None:
    dataset = random_dataset((12, 12, 12))
    split, encode = dataset.train(), normalized_space(dataset).encode

    def scored(device: torch.device) -> tuple[Tensor, float]:
        net = build_net("convnet2_w8", (3, 16, 16), 3, seed=0, device=device).eval()
        features = embed_images(net, split.images, encode, device)
        return features, score(net, split.images, split.labels, encode, device).accuracy

    (features, accuracy), (expected, expected_accuracy) = scored(device), scored(CPU)
    assert features.device == CPU
    assert close(features, expected)
    assert accuracy == pytest.approx(expected_accuracy, abs=1 / 36)


def test_global_draws_are_restored(device: torch.device) -> None:
    before = torch.get_rng_state()
    with forked_global(3, device):
        torch.rand(3, device=device)

    assert torch.equal(torch.get_rng_state(), before)


def test_group_sampling(device: torch.device) -> None:
    """Draws differ from device to device; the best of many groups is near the class's statistics on all."""
    mean, std = torch.full((6,), 2.0, device=device), torch.full((6,), 0.5, device=device)

    group, value = group_sample(mean, std, ipc=5, num_candidates=200, generator=derive(0, "group"))

    assert group.device.type == device.type
    assert close(group.mean(0), mean) or float((group.mean(0) - mean).abs().max()) < 0.5
    assert value >= 0


@pytest.mark.parametrize("method", method_names())
def test_a_method_runs(method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_briefly(monkeypatch)

    result = distilled(method, device, steps=2)

    assert torch.isfinite(result.losses).all()
    assert torch.isfinite(result.distilled.images).all()
