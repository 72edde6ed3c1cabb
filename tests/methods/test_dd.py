"""DD: rates and order by hand, a step replayed in float64, the real batch, the schedule in the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.reading import load
from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.methods import dd
from ddray.methods.dd import DDConfig, inverse_softplus, step_rows
from ddray.methods.families.unrolled import Swept, sweep
from ddray.nets import build_net
from ddray.seeding import derive_seed
from ddray.testing import plan_method, random_dataset
from ddray.training.student import Student, flat_parameters, ordered_loss

SETTINGS = {"arch": "convnet1_w4_sigmoid", "steps": 5}


def started(ipc: int = 2, seed: int = 0, **method: Any) -> tuple[Any, Any]:
    """Return context and engine on three classes of random images."""
    settings = {**SETTINGS, "method": {"batch_real": 8, **method}}
    _, ctx, distiller = plan_method("dd", random_dataset(), ipc=ipc, seed=seed, **settings)
    distiller.setup(ctx)
    return ctx, distiller


@pytest.mark.parametrize("rate", [1e-6, 0.02, 1.0, 30.0])
def test_softplus_is_inverted(rate: float) -> None:
    raw = inverse_softplus(rate)

    assert float(F.softplus(raw, threshold=1e9)) == pytest.approx(rate, rel=1e-9)
    if rate < 30:
        assert float(raw) == pytest.approx(math.log(math.exp(rate) - 1), rel=1e-6)


def test_each_step_has_the_same_images_of_every_class() -> None:
    assert step_rows(3, 2, 1, 2) == [[0, 2, 4], [1, 3, 5], [0, 2, 4], [1, 3, 5]]
    assert step_rows(2, 3, 2, 1) == [[0, 1, 3, 4], [2, 5]]
    assert step_rows(2, 3, 8, 1) == [[0, 1, 2, 3, 4, 5]]


class Unrolled:
    """Three steps on a small network in float64, in functions of images and rates before softplus."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        net = build_net("convnet1_w4_sigmoid", (1, 4, 4), 2, seed=0).double()
        self.student, self.start = Student(net), flat_parameters(net)
        self.images = torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64)
        self.raw = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64)
        self.real = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)
        self.real_labels, self.labels = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
        self.order = [[0, 2], [1, 3], [0, 2]]

    def end_gradient(self, end: Tensor) -> tuple[Tensor, Tensor]:
        point = end.detach().requires_grad_(True)
        loss = F.cross_entropy(self.student.logits(point, self.real), self.real_labels)
        return loss, torch.autograd.grad(loss, point)[0]

    def swept(self, images: Tensor, raw: Tensor, order: list[list[int]] | None = None) -> Swept:
        rows = [torch.tensor(step) for step in order or self.order]
        loss = ordered_loss(self.student, rows, self.labels)
        return sweep(loss, [images], self.start, F.softplus(raw), self.end_gradient)


def test_the_gradients_of_images_and_rates_pass_gradcheck() -> None:
    unrolled = Unrolled()

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor, raw: Tensor) -> Tensor:
            with torch.enable_grad():
                swept = unrolled.swept(images, raw)
            ctx.save_for_backward(swept.leaves[0], swept.rates * torch.sigmoid(raw))
            return swept.loss

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return tuple(grads[0] * saved for saved in ctx.saved_tensors)

    variables = (unrolled.images.requires_grad_(True), unrolled.raw.requires_grad_(True))
    assert torch.autograd.gradcheck(Outer.apply, variables, rtol=1e-6, atol=1e-9)


def test_the_order_of_the_steps_matters() -> None:
    unrolled = Unrolled()

    losses = [
        float(unrolled.swept(unrolled.images, unrolled.raw, order).loss)
        for order in (unrolled.order, [[1, 3], [0, 2], [0, 2]])
    ]

    assert abs(losses[0] - losses[1]) > 1e-6


def test_a_rate_is_that_of_its_step_alone() -> None:
    """With rates 0 but one, the end is one step at this rate."""
    unrolled = Unrolled()
    rows = [torch.tensor(step) for step in unrolled.order]
    loss = ordered_loss(unrolled.student, rows, unrolled.labels)
    for number, step in enumerate(unrolled.order):
        rates = torch.zeros(3).double()
        rates[number] = 0.7

        swept = sweep(loss, [unrolled.images], unrolled.start, rates, unrolled.end_gradient)

        point = unrolled.start.clone().requires_grad_(True)
        logits = unrolled.student.logits(point, unrolled.images[step])
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, unrolled.labels[step]), point)
        torch.testing.assert_close(swept.end, unrolled.start - 0.7 * slope)
        at_rest = [image for image in range(4) if image not in step]
        assert not bool(swept.leaves[0][at_rest].any())


def replayed(ctx: Any, images: Tensor, raw: Tensor, ipc: int, net_seeds: list[int]) -> list[Tensor]:
    """The first iteration's loss and gradients, in float64, by one graph over all steps."""
    generator = ctx.generator("step", 1)
    index = torch.randperm(len(ctx.split), generator=generator)[:8]
    real, labels = ctx.space.encode(ctx.split.images[index]).double(), ctx.split.labels[index]
    variables = [images.detach().double().requires_grad_(True), raw.detach().double().requires_grad_(True)]
    total = torch.zeros(()).double()
    for seed in net_seeds:
        net = build_net(ctx.arch, ctx.dataset.image_shape, 3, seed=seed).double().train()
        params = {name: param.detach().requires_grad_(True) for name, param in net.named_parameters()}
        for step, rate in enumerate(torch.log1p(variables[1].exp())):
            column = step % ipc
            batch = torch.stack([variables[0][label * ipc + column] for label in range(3)])
            logits = torch.func.functional_call(net, params, (batch,))
            loss = -logits.log_softmax(1).diagonal().mean()
            slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            moves = zip(params.items(), slopes, strict=True)
            params = {name: param - rate * slope for (name, param), slope in moves}
        outputs = torch.func.functional_call(net, params, (real,))
        total = total + F.cross_entropy(outputs, labels) / len(net_seeds)
    return [total.detach(), *torch.autograd.grad(total, variables)]


@pytest.mark.parametrize(("net_init", "num_nets"), [("random", 1), ("random", 2), ("fixed", 2)])
def test_a_step_is_adams_on_the_mean_loss_of_its_networks(net_init: str, num_nets: int) -> None:
    method = {"net_init": net_init, "num_nets": num_nets, "rate_start": 0.5, "lr_img": 0.01}
    ctx, distiller = started(seed=4, augment_real="none", **method)
    engine = distiller._engine
    images, raw = engine._images.detach().clone(), engine._raw_rates.detach().clone()
    fresh = [derive_seed(4, "distill", "net", 1, number) for number in range(num_nets)]

    loss = distiller.step()["loss"]

    seeds = [4] if net_init == "fixed" else fresh
    expected, of_images, of_raw = replayed(ctx, images, raw, 2, seeds)
    assert float(raw.exp().log1p()[0]) == pytest.approx(0.5, rel=1e-6)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    # Adam's first step is lr * sign(gradient), where it is far above epsilon.
    for after, before, gradient in ((engine._images, images, of_images), (engine._raw_rates, raw, of_raw)):
        moved = (after.detach() - before).double()
        clear = gradient.abs() > 1e-5
        assert bool(clear.any())
        torch.testing.assert_close(moved[clear], -0.01 * gradient[clear].sign(), rtol=1e-2, atol=1e-5)


def test_the_learning_rate_halves() -> None:
    _, distiller = started(lr_img=0.08, decay_every=2)
    rates = []
    for _ in range(5):
        distiller.step()
        rates.append(distiller._engine._optimizer.param_groups[0]["lr"])

    assert rates == [0.08, 0.08, 0.04, 0.04, 0.02]


def test_the_real_batch_is_cropped_from_reflected_borders() -> None:
    ctx, distiller = started(augment_real="crop_flip", batch_real=24)
    engine = distiller._engine
    index = torch.randperm(24, generator=ctx.generator("step", 1))

    images, labels = engine._real_batch(ctx.generator("step", 1))

    assert torch.equal(labels, ctx.split.labels[index])
    bordered = F.pad(ctx.space.encode(ctx.split.images[index]), (4,) * 4, mode="reflect")
    for image, border in zip(images, bordered, strict=True):
        crops = [border[:, y : y + 16, x : x + 16] for y in range(9) for x in range(9)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for crop in crops)


@pytest.mark.parametrize("net_init", ["random", "fixed"])
def test_the_file_has_the_steps(net_init: str, tmp_path: Path) -> None:
    _, distiller = started(seed=6, net_init=net_init, rate_start=0.25)
    distiller.snapshot().save(tmp_path / "set.pt")

    schedule = load(tmp_path / "set.pt").meta.schedule

    assert schedule is not None
    assert schedule.order == ((0, 2, 4), (1, 3, 5)) * 3
    assert schedule.rates == pytest.approx([0.25] * 6, rel=1e-6)
    assert (schedule.init, schedule.init_seed) == (net_init, 6 if net_init == "fixed" else None)


def test_batch_norm_is_refused() -> None:
    _, ctx, distiller = plan_method("dd", random_dataset(), ipc=1, arch="convnet2_w8_bn", steps=1)

    with pytest.raises(InputError, match=r"dd needs a network without batch norm, got convnet2_w8_bn"):
        distiller.setup(ctx)


def test_presets_are_those_of_the_papers_datasets() -> None:
    cases = [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32)), ("digits", (1, 16, 16)), ("toy", (3, 64, 64))]
    plans = [resolve("dd", random_dataset((3,) * 10, shape, name=name), ipc=1) for name, shape in cases]

    assert [plan.arch for plan in plans] == ["lenet", "alexcifar", "lenet", "convnet4"]
    configs = [plan.config.method for plan in plans]
    assert all(isinstance(config, DDConfig) for config in configs)
    assert [plan.config.steps for plan in plans[:2]] == [23_600, 19_600]
    assert [config.decay_every for config in configs[:2]] == [2360, 1960]
    assert [config.augment_real for config in configs[:2]] == ["none", "crop_flip"]
    assert dd.METHOD.config_type.protocol == "steps"
