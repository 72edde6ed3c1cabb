"""G-VBSM: the densification term against numpy, batches, the turn of networks, running averages, resume."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.distillation.method import Target, coupling_of
from ddray.errors import InputError
from ddray.methods import get_method
from ddray.methods.families.activations import WatchedNet
from ddray.methods.g_vbsm import GVBSMConfig, activation_recipe, batches_of, densification, preset
from ddray.tuning.settings import method_protocol

QUICK = {"teacher_archs": ["convnet2_w8_bn", "convnet2_w8"], "teacher_epochs": 1}


def faint(num_classes: int = 3, ipc: int = 4, side: int = 16, size: float = 0.06) -> Tensor:
    """Return images [K, n, 2, side, side] so faint that eigenvalues lie less than 10 apart, float64."""
    generator = torch.Generator().manual_seed(0)
    return size * torch.randn(num_classes, ipc, 2, side, side, generator=generator, dtype=torch.float64)


def expected_densification(rows: np.ndarray[Any, Any]) -> float:
    """The term of one class's images as rows [n, D]."""
    values = np.linalg.eigvalsh(rows @ rows.T)

    def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shares = np.exp(x - x.max())
        return shares / shares.sum()

    assert 0.01 < values.max() - values.min() < 10
    soft, sharp = softmax(values / 4), softmax(values)
    return float((soft * np.log(soft / sharp)).sum())


@pytest.mark.parametrize("side", [16, 64])
def test_densification_is_the_sum_over_classes_of_numpys(side: int) -> None:
    """Images of 64 px are pooled to 32 px, smaller ones stay."""
    images = faint(side=side)
    pooled = images if side <= 32 else F.avg_pool2d(images.flatten(0, 1), 2).reshape(3, 4, 2, 32, 32)
    expected = sum(expected_densification(rows.flatten(1).numpy()) for rows in pooled)

    assert expected > 1e-5
    assert float(densification(images)) == pytest.approx(expected, rel=1e-8)


def test_densification_does_not_depend_on_the_order_of_images_and_is_0_for_one() -> None:
    images = faint()
    permuted = images[:, [2, 0, 3, 1]]

    assert float(densification(images)) > 1e-5
    assert float(densification(permuted)) == pytest.approx(float(densification(images)), rel=1e-8)
    assert float(densification(images[:, :1])) == 0


def test_the_gradient_of_densification_is_that_without_the_targets() -> None:
    """Against differences of two values; the softened distribution is constant."""
    images = faint(1, 3, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(densification(images), images)
    step = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = images.detach().flatten(2)
    target = (torch.linalg.eigvalsh(rows @ rows.mT) / 4).softmax(1)

    def loss(size: float) -> float:
        moved = (images.detach() + size * step).flatten(2)
        sharp = torch.linalg.eigvalsh(moved @ moved.mT).log_softmax(1)
        return float((target * (target.log() - sharp)).sum())

    assert float((gradient * step).sum()) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-5)


def test_a_batch_has_whole_classes_or_as_many_images_of_each_as_it_is_told() -> None:
    cifar = batches_of(10, 50, 100)
    tiny = batches_of(40, 50, 100, 5)
    large = batches_of(3, 7, 4)

    assert [batch.shape for batch in cifar] == [(2, 50)] * 5
    assert cifar[1].flatten().tolist() == list(range(100, 200))
    assert [batch.shape for batch in tiny] == [(20, 5)] * 20
    assert (tiny[0] // 50).unique().tolist() == list(range(20))
    assert tiny[1][0].tolist() == [5, 6, 7, 8, 9]
    assert [tuple(batch.shape) for batch in large] == [(1, 4), (1, 3)] * 3
    for batches, num in ((cifar, 500), (tiny, 2000), (large, 21)):
        assert torch.cat([batch.flatten() for batch in batches]).sort().values.tolist() == list(range(num))


def started(planned: Any, toy: Any, *, steps: int = 6, ipc: int = 2, **method: Any) -> Any:
    _, ctx, distiller = planned("g_vbsm", toy(), ipc=ipc, steps=steps, method={**QUICK, **method})
    distiller.setup(ctx)
    return ctx, distiller


def test_step_t_takes_network_t_mod_m(planned: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, method = started(planned, toy, steps=6, batch=2)
    turns: list[tuple[int, int]] = []
    nets, real = method._engine._nets, WatchedNet.__call__

    def note(net: WatchedNet, views: Tensor, *args: Any) -> Any:
        turns.append((nets.index(net), len(views)))
        return real(net, views, *args)

    monkeypatch.setattr(WatchedNet, "__call__", note)
    for _ in range(6):
        method.step()

    assert turns == [(0, 2), (1, 2)] * 3  # three batches of a class, two steps each


def test_batches_are_learned_one_after_another_and_share_the_averages(planned: Any, toy: Any) -> None:
    _, method = started(planned, toy, steps=6, batch=2, skip=0.0)
    engine = method._engine
    images, averages = [method.snapshot().images], []
    for _ in range(6):
        method.step()
        images.append(method.snapshot().images)
        averages.append(engine._nets[0].averages[0][0].clone())

    for step, (before, after) in enumerate(pairwise(images)):
        moved = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
        assert moved == [2 * (step // 2), 2 * (step // 2) + 1]
    assert float(averages[0].norm()) > 0
    assert torch.equal(averages[0], averages[1])  # the other network's turn
    assert not torch.equal(averages[1], averages[2])
    assert float((averages[2] - 0.8 * averages[1]).norm()) > 0  # not begun anew with the next batch


def test_an_average_begins_at_zero(planned: Any, toy: Any) -> None:
    """After one step it is a fifth of the batch's statistic, here of the network's input."""
    _, method = started(planned, toy, skip=0.0, crop="none", jitter=0)
    images = method.snapshot().images

    method.step()

    average = method._engine._nets[0].averages[0][0]
    torch.testing.assert_close(average, 0.2 * images.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ["convnet2_w8_bn", "convnet2_w8"])
def test_the_first_loss_is_the_sum_of_its_terms(arch: str, planned: Any, toy: Any) -> None:
    settings = {"teacher_archs": [arch], "crop": "none", "jitter": 0, "skip": 0.0}
    ctx, method = started(planned, toy, ipc=2, statistics_weight=0.3, densify_weight=2.0, **settings)
    engine = method._engine
    images = engine._images.detach().clone()
    recipe = activation_recipe(GVBSMConfig.parse({**QUICK, **settings}))
    network, statistics = ctx.pool.get(method.pool_specs(ctx))
    net = network.module()
    logits, distances = WatchedNet(net, statistics, recipe, 0.8)(images, torch.Generator())
    with torch.no_grad():
        expected = F.cross_entropy(logits, engine._labels) + 0.3 * (10 * distances[0] + sum(distances[1:]))
        expected += 2 * densification(images.unflatten(0, (3, 2)))

    assert float(method.step()["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_images_stay_pixels_and_the_loss_falls(planned: Any, toy: Any) -> None:
    ctx, method = started(planned, toy, steps=40, padding=1, jitter=1)

    losses = [float(method.step()["loss"]) for _ in range(40)]

    pixels = ctx.space.decode(method.snapshot().images)
    assert -1e-5 < float(pixels.min()) < float(pixels.max()) < 1 + 1e-5
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_cut_between_or_within_batches_continues_bit_for_bit(cut: int, planned: Any, toy: Any) -> None:
    whole, first, second = (started(planned, toy, steps=6, batch=2)[1] for _ in range(3))
    losses = [whole.step()["loss"] for _ in range(6)]
    for _ in range(cut):
        first.step()
    second.load_state_dict(first.state_dict())

    rest = [second.step()["loss"] for _ in range(6 - cut)]

    assert torch.equal(torch.stack(rest), torch.stack(losses[cut:]))
    assert torch.equal(second.snapshot().images, whole.snapshot().images)


def test_fewer_steps_than_batches_leave_some_as_they_were(planned: Any, toy: Any) -> None:
    _, method = started(planned, toy, steps=2, batch=2)
    before = method.snapshot().images
    for _ in range(2):
        method.step()

    moved = (before != method.snapshot().images).flatten(1).any(1)

    assert moved.sum() == 4


def test_the_second_network_of_a_name_has_another_seed(planned: Any, toy: Any) -> None:
    ctx, method = started(planned, toy, teacher_archs=["convnet2_w8", "convnet2_w8_bn", "convnet2_w8"])

    specs = method.pool_specs(ctx)

    assert [spec.seed for spec in specs[:3]] == [0, 0, 1]
    assert [spec.kind for spec in specs] == ["supervised"] * 3 + ["activations"] * 3
    assert [spec.parents for spec in specs[3:]] == [(spec.key,) for spec in specs[:3]]
    assert {spec.recipe["weight_decay"] for spec in specs[:3]} == {0.0}


def test_mirrored_views_only_where_a_class_stays_the_same(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("g_vbsm", toy(can_flip=False), ipc=2, steps=1, method={**QUICK, "padding": 0})
    method.setup(ctx)
    engine = method._engine

    views = [
        engine._view(torch.Generator().manual_seed(seed)).roll(
            tuple(-shift for shift in _shift(seed)), dims=(2, 3)
        )
        for seed in range(8)
    ]

    assert all(torch.equal(view, engine._batch) for view in views)


def _shift(seed: int) -> list[int]:
    """Return the rolls that follow the draws of six padded crops without padding."""
    generator = torch.Generator().manual_seed(seed)
    torch.randint(1, (2, 6), generator=generator)
    return torch.randint(33, (2,), generator=generator).tolist()


def test_other_pixel_spaces_are_refused(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("g_vbsm", toy(), steps=1, pixel_space="zca", method=QUICK)
    with pytest.raises(InputError, match="g_vbsm needs pixel_space=normalized, got zca"):
        method.setup(ctx)


@pytest.mark.parametrize(
    ("side", "classes", "ipc", "steps", "method"),
    [
        (32, 10, 10, 4000, {}),
        (32, 10, 50, 20_000, {}),
        (32, 100, 10, 40_000, {"teacher_epochs": 50}),
        (
            *(64, 200, 50, 400_000),
            {
                **{"teacher_epochs": 50, "teacher_lr": 0.1, "teacher_batch": 128},
                **{"teacher_schedule": "cosine", "padding": 8, "per_class": 5},
            },
        ),
    ],
)
def test_presets_are_the_shipped_commands(
    side: int, classes: int, ipc: int, steps: int, method: dict[str, Any]
) -> None:
    target = Target("pictures", (3, side, side), classes, ipc)

    for name in ("paper", "repo"):
        settings = preset(name, target)
        assert settings["steps"] == steps
        assert GVBSMConfig.parse(settings["method"]) == GVBSMConfig.parse(method)
    config = GVBSMConfig()
    assert (config.lr, config.decay, config.skip, config.jitter, config.batch) == (0.05, 0.8, 0.4, 32, 100)
    assert (config.statistics_weight, config.first_factor, config.densify_weight) == (0.01, 10.0, 1.0)


def test_imagenets_preset_crops_by_area_and_leaves_no_layer_out() -> None:
    config = GVBSMConfig.parse(preset("repo", Target("imagenet", (3, 224, 224), 1000, 10))["method"])

    assert (config.lr, config.decay, config.skip, config.patch) == (0.1, 0.4, 0.0, 16)
    assert (config.crop, config.batch, config.real_batch) == ("resized", 80, 256)
    assert config.teacher_archs == ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2")


def test_it_is_scored_with_soft_labels_and_takes_no_shards() -> None:
    reason = coupling_of(get_method("g_vbsm"), GVBSMConfig(), "convnet3")

    assert method_protocol("g_vbsm") == "soft"
    assert reason is not None
    assert "several classes" in reason
