"""KIP: its gradient against central differences and autograd, chunks, labels, kernels that take too long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.methods.kip import preset
from ddray.nets.ntk import gram, ntk


def started(planned: Any, toy: Any, steps: int = 3, **method: Any) -> Any:
    dataset = toy((6, 5, 6), (1, 8, 8))
    settings = {"batch_real": 12, "learn_labels": False, **method}
    _, ctx, distiller = planned("kip", dataset, ipc=2, steps=steps, arch="convnet1_w8", method=settings)
    distiller.setup(ctx)
    return ctx, distiller


def whole_loss(
    kernel: str, x: Tensor, y: Tensor, real: Tensor, outputs: Tensor, *, ridge: float = 1e-6
) -> Tensor:
    """The loss by an explicit inverse, all of it differentiable."""
    square = gram(kernel, x)
    penalty = ridge * square.diagonal().mean()
    inverse = torch.linalg.inv(square + penalty * torch.eye(len(x)).double())
    return (ntk(kernel, real, x) @ inverse @ y - outputs).square().mean() / 2


def gradients(engine: Any, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    engine._optimizer.zero_grad()
    loss = engine._backward(real)
    return loss, engine._images.grad.clone(), engine._targets.grad.clone()


@pytest.mark.parametrize("kernel", ["fc1", "conv3", "convnet3"])
def test_loss_and_gradients_are_those_of_the_whole_graph(kernel: str, planned: Any, toy: Any) -> None:
    ctx, distiller = started(planned, toy, kernel=kernel, learn_labels=True)
    engine = distiller._engine
    real = engine._batches.take(engine._batches.draw(ctx.generator("step", 1)))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (engine._images, engine._targets)]
    expected = whole_loss(kernel, *leaves, real, engine._real_targets)

    loss, in_images, in_targets = gradients(engine, real)

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-7, atol=1e-9)
    expected_gradients = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(in_images, expected_gradients[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(in_targets, expected_gradients[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-6, 0.5])
def test_the_gradient_is_that_of_central_differences(ridge: float, planned: Any, toy: Any) -> None:
    """In images and labels; at a large ridge lambda's own dependence on the images counts too."""
    ctx, distiller = started(planned, toy, ridge=ridge, learn_labels=True)
    engine = distiller._engine
    real = engine._batches.take(engine._batches.draw(ctx.generator("step", 1)))
    engine._backward(real)
    leaves = {"_images": ((0, 0, 3, 4), (5, 0, 7, 0)), "_targets": ((0, 1), (5, 2))}
    for name, indices in leaves.items():
        for index in indices:
            losses = []
            for sign in (1, -1):
                moved = {each: getattr(engine, each).detach().clone() for each in leaves}
                moved[name][index] += sign * 1e-4
                losses.append(whole_loss("fc1", *moved.values(), real, engine._real_targets, ridge=ridge))
            numeric = float(losses[0] - losses[1]) / 2e-4
            gradient = float(getattr(engine, name).grad[index])
            assert gradient == pytest.approx(numeric, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kernel", ["fc1", "convnet3"])
def test_chunks_change_nothing(kernel: str, planned: Any, toy: Any) -> None:
    ctx, distiller = started(planned, toy, kernel=kernel, learn_labels=True)
    engine = distiller._engine
    real = engine._batches.take(engine._batches.draw(ctx.generator("step", 1)))
    assert engine._rows >= 12
    whole = gradients(engine, real)
    engine._rows = 5
    for part, expected in zip(gradients(engine, real), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-12)


def test_images_and_labels_move_by_adam(planned: Any, toy: Any) -> None:
    """The first step of Adam moves every value by the rate, against the gradient's sign."""
    _, distiller = started(planned, toy, learn_labels=True, lr_img=0.01)
    engine = distiller._engine
    before = engine._images.detach().clone(), engine._targets.detach().clone()
    assert float(before[1].max()) == pytest.approx(2 / 3)
    distiller.step()
    for old, learned in zip(before, (engine._images, engine._targets), strict=True):
        assert learned.dtype == torch.float64
        large = learned.grad.abs() > 1e-4  # far above Adam's eps
        moved = (old - learned.detach())[large]
        torch.testing.assert_close(moved, 0.01 * learned.grad[large].sign(), rtol=1e-3, atol=0)
        assert len(moved) > 0


def test_labels_are_fixed_or_in_the_set_as_values(planned: Any, toy: Any) -> None:
    _, fixed = started(planned, toy)
    _, learned = started(planned, toy, learn_labels=True)
    for distiller in (fixed, learned):
        distiller.step()
    first, second = fixed.snapshot(), learned.snapshot()
    assert first.soft_labels is None
    assert first.meta.label_kind is None
    assert second.meta.label_kind == "values"
    assert second.soft_labels is not None
    torch.testing.assert_close(
        second.soft_labels.double(), learned._engine._targets.detach(), rtol=1e-6, atol=1e-7
    )
    assert second.meta.storage_floats == 6 * 64 + 6 * 3


def test_the_loss_falls(planned: Any, toy: Any) -> None:
    _, distiller = started(planned, toy, steps=40)
    losses = [float(distiller.step()["loss"]) for _ in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_hopeless_kernel_is_refused_with_its_hours(planned: Any, toy: Any) -> None:
    dataset = toy((50, 50, 50), (3, 32, 32))
    settings = {"kernel": "convnet3", "batch_real": 150}
    _, ctx, distiller = planned("kip", dataset, ipc=10, steps=100_000, arch="convnet1_w8", method=settings)
    with pytest.raises(
        InputError, match=r"kernel=convnet3, 30 images and 100000 steps on cpu takes about [\d,]+ hours"
    ):
        distiller.setup(ctx)


def test_a_kernel_that_does_not_fit_is_refused_with_its_memory(planned: Any, toy: Any) -> None:
    """A pair of 32 px takes 295 MB with pooling: 16 maps of 2.3 million float64 values for all layers."""
    dataset = toy((120, 120, 120), (3, 32, 32))
    settings = {"kernel": "convnet3", "batch_real": 3, "max_hours": 1e9}
    _, ctx, distiller = planned("kip", dataset, ipc=100, steps=1, arch="convnet1_w8", method=settings)
    with pytest.raises(
        InputError, match=r"convnet3 of 300 images needs about 8\d\.\d GiB .* cpu has [\d.]+ free"
    ):
        distiller.setup(ctx)


def test_presets_are_the_papers_labels_and_whitening_or_the_notebooks() -> None:
    target = Target("cifar10", (3, 32, 32), 10, 10)
    paper, code = preset("paper", target), preset("repo", target)
    assert (paper["pixel_space"], code["pixel_space"]) == ("zca", "normalized")
    assert (paper["method"]["learn_labels"], code["method"]["learn_labels"]) == (True, False)
    assert code["steps"] == 300
