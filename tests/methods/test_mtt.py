"""Trajectory matching: the loss, the draws, the updates, one iteration against the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import SplitName
from ddray.data.pixels import fit_zca
from ddray.errors import DivergedError, InputError
from ddray.jobs.plan import resolve
from ddray.jobs.pool_needs import predict_pool_specs
from ddray.methods.families.trajectories import (
    Learned,
    TrajectoryConfig,
    distance,
    draw_batches,
    draw_iteration,
    in_expert_space,
)
from ddray.methods.families.unrolled import sweep
from ddray.methods.mtt import MTTConfig
from ddray.nets import build_net
from ddray.testing import random_dataset
from ddray.training.dsa import siamese

EXPERTS: dict[str, Any] = {"num_models": 2, "epochs": 3, "batch": 10, "lr": 0.05}
METHOD: dict[str, Any] = {
    **{"inner_steps": 3, "expert_epochs": 2, "max_start": 2, "lr_start": 0.1, "lr_lr": 1e-6, "lr_img": 1.0},
    "experts": EXPERTS,
}


def started(planned: Any, method: str = "mtt", ipc: int = 2, **changes: Any) -> tuple[Any, Any]:
    dataset = random_dataset((12, 10, 14))
    settings = {**METHOD, **changes}
    _, ctx, distiller = planned(method, dataset, ipc=ipc, arch="convnet1_w8", method=settings)
    distiller.setup(ctx)
    return ctx, distiller


class TestLoss:
    def test_it_is_1_where_the_student_stayed_and_0_at_the_target(self) -> None:
        start, target = torch.randn(2, 7, dtype=torch.float64)
        loss_of = distance(start, target)
        assert loss_of(start)[0] == 1
        assert loss_of(target)[0] == 0
        assert torch.equal(loss_of(target)[1], torch.zeros_like(target))

    def test_its_gradient_is_that_of_the_quotient(self) -> None:
        start, target, end = torch.randn(3, 7, dtype=torch.float64)
        end.requires_grad_(True)
        quotient = (end - target).pow(2).sum() / (start - target).pow(2).sum()
        loss, gradient = distance(start, target)(end.detach())
        torch.testing.assert_close(loss, quotient.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(quotient, end)[0])

    def test_two_steps_of_softmax_regression_have_the_gradients_of_the_formulas(self) -> None:
        """theta <- theta - a x'(p - y) / n, by hand, through autograd."""
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        start, target = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        labels, rate = torch.tensor([0, 1, 2, 0, 1]), torch.full((), 0.3, dtype=torch.float64)

        def loss_of_step(index: int, flat: Tensor, leaves: Any) -> Tensor:
            return F.cross_entropy(leaves[0] @ flat.view(4, 3), labels)

        swept = sweep(loss_of_step, [images], start, rate.expand(2), distance(start, target))
        x, a, theta = images.clone().requires_grad_(True), rate.clone().requires_grad_(True), start.view(4, 3)
        for _ in range(2):
            theta = theta - a * x.T @ ((x @ theta).softmax(1) - F.one_hot(labels, 3)) / 5
        loss = (theta.flatten() - target).square().sum() / (start - target).square().sum()
        in_images, in_rate = torch.autograd.grad(loss, [x, a])
        torch.testing.assert_close(swept.leaves[0], in_images, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(swept.rates.sum(), in_rate, rtol=1e-10, atol=1e-12)


class TestDraws:
    def test_starts_and_targets_are_those_of_the_ranges(self) -> None:
        """t never reaches T+, and the last snapshot that is read is T+ + M - 1."""
        config = MTTConfig.parse({**METHOD, "max_start": 3, "experts": {**EXPERTS, "epochs": 9}})
        generator = torch.Generator().manual_seed(0)
        draws = [draw_iteration(config, step, 6, None, generator) for step in range(200)]
        assert {draw.start for draw in draws} == {0, 1, 2}
        assert max(draw.start for draw in draws) + config.expert_epochs == 3 + 2 - 1
        assert {draw.expert for draw in draws} == {0, 1}

    @pytest.mark.parametrize(("steps", "sizes"), [(2, [1, 3]), (3, [1, 3, 3]), (5, [1, 3, 3, 1, 3])])
    def test_batches_are_cut_from_permutations_whose_end_comes_first(
        self, steps: int, sizes: list[int]
    ) -> None:
        """Of 7 images by 3: a remainder of 1, then 3 and 3; with fewer or more steps than batches."""
        batches = draw_batches(7, 3, steps, torch.Generator().manual_seed(2))
        assert [len(rows) for rows in batches] == sizes
        generator = torch.Generator().manual_seed(2)
        first = torch.randperm(7, generator=generator)
        assert torch.equal(batches[0], first[6:])
        assert torch.equal(batches[1], first[3:6])
        if steps > 3:
            assert torch.equal(batches[3], torch.randperm(7, generator=generator)[6:])

    @pytest.mark.parametrize("batch", [None, 7, 100])
    def test_without_a_smaller_batch_every_step_sees_all_images(self, batch: int | None) -> None:
        batches = draw_batches(7, batch, 3, torch.Generator().manual_seed(2))
        assert [sorted(rows.tolist()) for rows in batches] == [list(range(7))] * 3

    def test_every_step_has_a_plan_of_its_own_with_parameters_per_image(self) -> None:
        config = MTTConfig.parse(METHOD)
        drawn = draw_iteration(config, 0, 6, siamese(True, "dsa"), torch.Generator().manual_seed(0))
        plans = [plan for plan in drawn.plans if plan is not None]
        assert len(plans) == config.inner_steps
        assert not torch.equal(plans[0].params, plans[1].params)
        assert len(plans[0].params.unique(dim=0)) == 6
        assert all(len(plan.choices.unique()) == 1 for plan in plans)


def test_an_update_is_torchs_sgd_with_momentum() -> None:
    generator = torch.Generator().manual_seed(0)
    value, *gradients = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    learned, parameter = Learned(value, lr=0.3, momentum=0.5), value.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.5)
    for gradient in gradients:
        learned.move(gradient)
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(learned.value, parameter.detach())


@pytest.mark.parametrize("gradient", [torch.ones(3), torch.full((3,), torch.nan)])
def test_a_refused_update_leaves_value_and_momentum(gradient: Tensor) -> None:
    learned = Learned(torch.zeros(3), lr=0.3, momentum=0.5)
    learned.move(torch.ones(3))
    before = learned.state()
    learned.move(gradient, torch.tensor(False))
    assert all(torch.equal(learned.state()[name], value) for name, value in before.items())
    learned.move(torch.ones(3), torch.tensor(True))
    assert not torch.equal(learned.value, before["value"])


@pytest.mark.parametrize("augment", ["none", "dsa"])
def test_an_iteration_is_that_of_the_whole_graph(planned: Any, augment: str) -> None:
    """All N steps in one graph, drawn by the same generator; then SGD with the momentum's first step."""
    ctx, distiller = started(planned, augment=augment, batch_syn=4)
    engine = distiller._engine
    images = engine._images.value.double().requires_grad_(True)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    drawn = draw_iteration(engine._config, 0, 6, engine._dsa, ctx.generator("step", 1))
    snapshots = engine._experts[drawn.expert].double()
    net = build_net("convnet1_w8", ctx.dataset.image_shape, 3, seed=0).double()
    start, target = snapshots[drawn.start], snapshots[drawn.start + 2]
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    theta = start
    for rows, plan in zip(drawn.batches, drawn.plans, strict=True):
        batch = images[rows] if plan is None else engine._dsa.apply(images[rows], plan)
        theta = theta.clone().requires_grad_(True) if theta is start else theta
        parts = theta.split([shape.numel() for shape in shapes])
        weights = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        logits = torch.func.functional_call(net, weights, (batch,))
        loss = F.cross_entropy(logits, engine._labels[rows])
        theta = theta - rate * torch.autograd.grad(loss, theta, create_graph=True)[0]
    matched = (theta - target).square().sum() / (start - target).square().sum()
    in_images, in_rate = torch.autograd.grad(matched, [images, rate])

    before = engine._images.value.clone()
    reported = distiller.step()["loss"]
    torch.testing.assert_close(reported.double(), matched.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(engine._images.velocity.double(), in_images, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(engine._images.value, before - engine._images.velocity)
    torch.testing.assert_close(float(engine._rate.velocity), float(in_rate), rtol=1e-3, atol=1e-6)


def test_a_set_holds_the_learned_rate_and_hard_labels(planned: Any) -> None:
    _, distiller = started(planned)
    assert distiller.snapshot().meta.learned_lr == pytest.approx(0.1)
    distiller.step()
    distilled = distiller.snapshot()
    assert distilled.meta.learned_lr == float(distiller._engine._rate.value) != pytest.approx(0.1, abs=1e-9)
    assert distilled.soft_labels is None
    assert distilled.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_rate_that_is_not_positive_ends_the_run(planned: Any) -> None:
    _, distiller = started(planned)
    distiller._engine._rate.value.fill_(-0.001)
    with pytest.raises(
        DivergedError, match=r"mtt diverged by step 1: the learned rate must be > 0, got -0.001"
    ):
        distiller.step()
    with pytest.raises(DivergedError, match="learned rate"):
        distiller.snapshot()


def test_experts_must_be_as_long_as_their_range() -> None:
    with pytest.raises(
        InputError, match=r"experts.epochs must be >= max_start \+ expert_epochs - 1 = 4, got 3"
    ):
        TrajectoryConfig.parse({**METHOD, "max_start": 3})


def test_experts_and_set_share_one_whitening(planned: Any) -> None:
    """That of the images which experts have seen, also where a set is distilled from all of train."""
    dataset = random_dataset((12, 10, 14))
    _, ctx, _ = planned("mtt", dataset, ipc=1, pixel_space="zca", method=METHOD)
    seen, _ = SplitName(0).carve(dataset.train())
    matrix, whole = fit_zca(seen).zca_matrix, fit_zca(dataset.train()).zca_matrix
    shared = in_expert_space(ctx)
    assert matrix is not None
    assert shared.space.zca_matrix is not None
    assert torch.equal(shared.space.zca_matrix, matrix)
    assert whole is not None
    assert not torch.equal(whole, matrix)


@pytest.mark.parametrize(
    ("dataset", "classes", "size", "ipc", "expected"),
    [
        ("cifar10", 10, 32, 1, (50, 2, 2, None, 100.0, 1e-7, 0.01, "zca")),
        ("cifar10", 10, 32, 50, (30, 2, 40, None, 1000.0, 1e-5, 0.001, "normalized")),
        ("cifar100", 100, 32, 50, (80, 2, 40, 125, 1000.0, 1e-5, 0.01, "zca")),
        ("tiny_imagenet", 200, 64, 20, (20, 2, 40, 200, 1e4, 1e-4, 0.01, "normalized")),
    ],
)
def test_presets_are_those_of_the_table(
    dataset: str, classes: int, size: int, ipc: int, expected: tuple[Any, ...]
) -> None:
    data = random_dataset((ipc,) * classes, (3, size, size), name=dataset)
    config = resolve("mtt", data, ipc=ipc).config
    method = config.method
    fields = (method.inner_steps, method.expert_epochs, method.max_start, method.batch_syn, method.lr_img)
    assert (*fields, method.lr_lr, method.lr_start, config.pixel_space) == expected
    assert config.evaluate.lr == "learned"


@pytest.mark.parametrize("method", ["mtt", "datm"])
def test_a_network_that_drops_is_refused_before_its_experts_are_trained(method: str, planned: Any) -> None:
    dataset = random_dataset((4, 4), (3, 32, 32))
    _, ctx, distiller = planned(method, dataset, arch="efficientnet_b0", method=METHOD)
    with pytest.raises(InputError, match=r"repeat its steps exactly, but efficientnet_b0 drops at random"):
        distiller.pool_specs(ctx)


def test_a_dry_run_predicts_the_experts(planned: Any) -> None:
    """Whose keys name the pixel space of the run, not that of a stand-in."""
    plan, ctx, distiller = planned("mtt", random_dataset((12, 10, 14)), pixel_space="zca", method=METHOD)
    predicted = predict_pool_specs(plan)
    assert predicted
    transforms = [spec.transform for spec in distiller.pool_specs(ctx)]
    assert [spec.transform for spec in predicted] == transforms == ["zca+dsa"] * 2
