"""FRePo: its loss against autograd in float64, counters of a pool of two, running statistics, copies."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.distillation.method import Target
from ddray.methods.frepo import (
    frepo_loss,
    inner_loss,
    label_loss,
    preset,
    regression_bytes,
    score_epochs,
)
from ddray.nets import build_net


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(planned: Any, toy: Any, *, steps: int = 4, **method: Any) -> Any:
    settings = {"pool_size": 2, "inner_steps_max": 2, "batch_real": 8, **method}
    _, ctx, distiller = planned(
        "frepo", toy(), ipc=2, steps=steps, arch="convnet2_w8_nonorm", method=settings
    )
    distiller.setup(ctx)
    return ctx, distiller


@pytest.mark.parametrize(("num", "dim"), [(6, 20), (9, 4)])
def test_loss_and_gradients_are_those_of_autograd(num: int, dim: int) -> None:
    features, targets = drawn(num, dim, seed=0).requires_grad_(), drawn(num, 3, seed=1).requires_grad_()
    real, outputs = drawn(11, dim, seed=2), drawn(11, 3, seed=3)
    gram = features @ features.T
    inverse = torch.linalg.inv(gram + 1e-3 * gram.diagonal().mean() * torch.eye(num).double())
    residual = real @ features.T @ inverse @ targets - outputs
    first, second = targets.sort(dim=1, descending=True).values[:, :2].unbind(1)
    expected = residual.square().sum() / 22 - torch.minimum(first - second, torch.tensor(1 / 3)).mean()
    chunks = zip(real.split(4), outputs.split(4), strict=True)

    result = frepo_loss(features.detach(), targets.detach(), chunks, ridge=1e-3)

    in_features, in_targets = torch.autograd.grad(expected, (features, targets))
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.features, in_features, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.targets, in_targets, rtol=1e-6, atol=1e-8)


PEAK = """
import torch
from ddray.methods.frepo import frepo_loss
from ddray.system.memory import peak_bytes, reset_peak
draw = torch.Generator().manual_seed(0)
features, targets = torch.randn(1500, 64, generator=draw), torch.randn(1500, 10, generator=draw)
real = [(torch.randn(8, 64).double(), torch.randn(8, 10).double())]
frepo_loss(features, targets, real, ridge=1e-3)  # the first call also allocates BLAS's own buffers
cpu = torch.device("cpu")
reset_peak(cpu)
before = peak_bytes(cpu)
frepo_loss(features, targets, real, ridge=1e-3)
print(peak_bytes(cpu) - before)
"""


def test_the_peak_of_the_regression_is_known_beforehand() -> None:
    """In its own process, where malloc returns every freed tensor: what ran before does not count."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", PEAK], env=env, capture_output=True, text=True, check=True)
    used = int(result.stdout)
    assert 0.9 * used < regression_bytes(1500, 64, 10) < 1.3 * used


def test_losses_by_hand() -> None:
    targets = torch.tensor([[0.9, -0.1, 0.2], [0.1, 0.3, 0.0]])
    assert float(label_loss(targets)) == pytest.approx(-(1 / 3 + 0.2) / 2)
    assert float(inner_loss(torch.zeros(2, 3), targets)) == pytest.approx((0.86 + 0.1) / 4)


def test_counters_begin_spread_and_a_network_is_replaced_once_its_is_above(planned: Any, toy: Any) -> None:
    """A pool of two with Z = 4: counters 0 and 2; 4 -> 5 is trained, 5 -> 0 is a fresh network."""
    _, distiller = started(planned, toy, inner_steps_max=4)
    pool = distiller._engine.inner
    draw = distiller._engine._draw()
    before = [param.clone() for slot in pool._slots for param in slot.net.parameters()]
    pool.fill(draw)
    assert [slot.trained for slot in pool._slots] == [0, 2]
    after = [param for slot in pool._slots for param in slot.net.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    seen, fresh = [], []
    for step in range(1, 8):
        pool.advance(1, draw, step)
        if step == 4:
            expected = build_net("convnet2_w8_bnbefore", (3, 16, 16), 3, seed=pool._seed(1, 4))
            weights = pool._slots[1].net.state_dict()
            assert all(torch.equal(weights[name], value) for name, value in expected.state_dict().items())
        seen.append(pool._slots[1].trained)
        fresh.append(not pool._slots[1].optimizer.state)
    assert seen == [3, 4, 5, 0, 1, 2, 3]
    assert fresh == [False, False, False, True, False, False, False]


def test_an_inner_step_is_adam_on_the_summed_squares(planned: Any, toy: Any) -> None:
    _, distiller = started(planned, toy, lr_inner=0.01)
    engine = distiller._engine
    engine.inner.fill(engine._draw())
    net = engine.inner.net(0).train()
    images, targets = engine._draw()(torch.Generator())
    before = [param.detach().clone() for param in net.parameters()]
    net.requires_grad_(True)
    gradients = torch.autograd.grad(
        (net(images) - targets).square().sum() / 2 / len(images), list(net.parameters())
    )
    net.requires_grad_(False)
    engine.inner.advance(0, engine._draw(), 1)
    for old, gradient, new in zip(before, gradients, net.parameters(), strict=True):
        large = gradient.abs() > 1e-5
        moved = (old - new.detach())[large]
        torch.testing.assert_close(moved, 0.01 * gradient[large].sign(), rtol=1e-2, atol=1e-5)


def test_inner_networks_normalise_by_running_statistics_of_nearly_the_last_batch(
    planned: Any, toy: Any
) -> None:
    _, distiller = started(planned, toy)
    engine = distiller._engine
    net = engine.inner.net(0)
    assert net.arch == "convnet2_w8_bnbefore"
    norm = net.body.norms[1]
    engine.inner.fill(engine._draw())
    engine.inner.advance(0, engine._draw(), 1)
    net = engine.inner.net(0)
    assert not net.training
    fresh = engine.inner._new(0, 3)
    images, _ = engine._draw()(torch.Generator())
    pooled = torch.nn.functional.avg_pool2d(fresh.body.convs[0](images).relu(), 2)
    torch.testing.assert_close(norm.running_mean, 0.9 * pooled.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_images_and_labels_are_learned_and_stored(planned: Any, toy: Any) -> None:
    _, distiller = started(planned, toy)
    first = distiller.snapshot()
    assert first.soft_labels is not None
    one_hot = torch.eye(3)[first.labels]
    torch.testing.assert_close(first.soft_labels, (one_hot - 1 / 3) / math.sqrt(0.3))
    for _ in range(3):
        distiller.step()
    last = distiller.snapshot()
    assert last.meta.label_kind == "values"
    assert not torch.equal(last.images, first.images)
    assert not torch.equal(last.soft_labels, first.soft_labels)
    assert distiller.representations is None


def test_mirrored_copies_join_the_kernel_and_not_the_inner_steps(planned: Any, toy: Any) -> None:
    _, distiller = started(planned, toy, mirror=True)
    images, targets = distiller._engine._synthesise(distiller._engine.parameters, slice(None))
    assert len(images) == 12
    assert torch.equal(images[6:], images[:6].flip(3))
    assert torch.equal(targets[6:], targets[:6])
    inner_images, inner_targets = distiller._engine._draw()(torch.Generator())
    assert torch.equal(inner_images, images[:6])
    assert torch.equal(inner_targets, targets[:6])
    _, few = started(planned, toy, mirror=True, inner_batch=4)
    assert len(few._engine._draw()(torch.Generator())[0]) == 4, "a batch counts images, not copies"
    distiller.step()
    _, alone = started(planned, lambda: toy(can_flip=False), mirror=True)
    assert len(alone._engine._synthesise(alone._engine.parameters, slice(None))[0]) == 6


def test_the_rate_falls_by_a_cosine_to_a_tenth(planned: Any, toy: Any) -> None:
    _, distiller = started(planned, toy, steps=4, lr_outer=0.01)
    factor = distiller._engine._rules.factor
    assert [factor(step) for step in (0, 2, 4)] == pytest.approx([1, 0.55, 0.1])


def test_presets_mirror_and_train_as_the_authors() -> None:
    def settings(name: str, ipc: int, classes: int = 10) -> dict[str, Any]:
        return preset("paper", Target(name, (3, 32, 32), classes, ipc))

    mirrored = {("cifar10", 1): 10, ("cifar10", 50): 10, ("cifar100", 1): 100, ("tiny_imagenet", 1): 200}
    plain = {("cifar100", 10): 100, ("tiny_imagenet", 10): 200, ("digits", 1): 10}
    for cases, expected in ((mirrored, True), (plain, False)):
        for (name, ipc), classes in cases.items():
            assert settings(name, ipc, classes)["method"]["mirror"] is expected, (name, ipc)
    epochs = {num: score_epochs(num) for num in (10, 100, 200, 500, 1000, 2000)}
    assert epochs == {10: 1000, 100: 2000, 200: 20_000, 500: 5000, 1000: 5000, 2000: 10_000}
    assert settings("cifar10", 1)["evaluate"]["optimizer"] == "adam"
    assert settings("cifar10", 1)["pixel_space"] == "zca"
    large = Target("cifar10", (3, 128, 128), 10, 1)
    assert preset("paper", large)["pixel_space"] == "normalized", "too large to whiten"
