"""ESFR: both terms by hand in float64, one step replayed, its bases' bytes without the terms, resumption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.artifact.partition import Partition, expand
from ddray.config import Config
from ddray.errors import InputError
from ddray.methods import get_method
from ddray.methods.esfr import ESFRConfig, pool_specs
from ddray.methods.families.matching.batches import ClassBatches
from ddray.methods.families.matching.relations import (
    class_spread,
    gram,
    relation_loss,
    relations,
    relations_of_means,
)
from ddray.nets import build_net
from ddray.seeding import derive_seed
from ddray.testing import random_dataset

POOL = {"num_models": 2, "epochs": 1, "arch": "convnet2_w8"}
QUICK = {"batch_real": 6, "pool": POOL}
BRIEF: dict[str, dict[str, Any]] = {
    "dm": {**QUICK, "base": "dm"},
    "idm": {**QUICK, "base": "idm", "net_steps": 2, "batch_train": 8},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def started(planned: Any, toy: Any, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts a method on toy images; the pool is shared by all tests."""
    monkeypatch.setenv("DDRAY_HOME", str(tmp_path_factory.getbasetemp() / "esfr"))

    def go(name: str = "esfr", *, ipc: int = 2, steps: int = 3, **options: Any) -> Any:
        _, ctx, distiller = planned(name, toy(), ipc=ipc, steps=steps, **options)
        distiller.setup(ctx)
        return ctx, distiller

    return go


def test_cc_is_n_times_the_trace_of_the_biased_covariance() -> None:
    features = normal(3, 5, 4)
    expected = sum(5 * torch.cov(rows.T, correction=0).trace() for rows in features)

    assert float(class_spread(features)) == pytest.approx(float(expected), rel=1e-12)


def test_cc_is_half_the_mean_of_all_squared_distances() -> None:
    features = normal(2, 4, 3)
    pairs = sum(float((a - b).square().sum()) / (2 * 4) for rows in features for a in rows for b in rows)

    assert float(class_spread(features)) == pytest.approx(pairs, rel=1e-12)


def by_place(samples: Tensor) -> Tensor:
    """M of maps [n, C, P] by a loop over images, places and pairs of channels."""
    num, channels, places = samples.shape
    matrix = torch.zeros(channels, channels, dtype=torch.float64)
    for place in range(places):
        mean = [sum(float(sample[c, place]) for sample in samples) / num for c in range(channels)]
        for sample in samples:
            for a in range(channels):
                for b in range(channels):
                    z = float(sample[a, place]) - mean[a], float(sample[b, place]) - mean[b]
                    matrix[a, b] += z[0] * z[1] / num
    return matrix


def test_m_is_a_sum_over_places() -> None:
    samples = normal(2, 5, 3 * 4)
    expected = torch.stack([by_place(rows.view(5, 3, 4)) for rows in samples])

    torch.testing.assert_close(relations(samples, 3), expected, rtol=1e-12, atol=1e-12)


def test_m_of_class_means_is_m() -> None:
    samples = normal(2, 5, 3 * 4, seed=1)
    grams = torch.stack([gram(rows, 3).mean(0) for rows in samples])

    result = relations_of_means(samples.mean(1), grams, 3)

    torch.testing.assert_close(result, relations(samples, 3), rtol=1e-12, atol=1e-12)


def test_m_of_one_place_is_the_biased_covariance() -> None:
    samples = normal(1, 6, 4)

    torch.testing.assert_close(relations(samples, 4)[0], torch.cov(samples[0].T, correction=0))


def test_cm_is_the_squared_frobenius_distance() -> None:
    real, synthetic = relations(normal(2, 7, 6), 3), relations(normal(2, 3, 6, seed=1), 3)
    expected = sum(float(a - b) ** 2 for a, b in zip(real.flatten(), synthetic.flatten(), strict=True))

    assert float(relation_loss(real, synthetic)) == pytest.approx(expected, rel=1e-12)
    assert float(relation_loss(real, real)) == 0


def test_cm_does_not_see_a_map_that_is_added_to_all() -> None:
    real, synthetic, shift = normal(2, 7, 6), normal(2, 3, 6, seed=1), normal(2, 1, 6, seed=2)
    expected = float(relation_loss(relations(real, 3), relations(synthetic, 3)))

    moved = relation_loss(relations(real, 3), relations(synthetic + 10 * shift, 3))

    assert float(moved) == pytest.approx(expected, rel=1e-9)
    assert expected > 0


def test_neither_term_has_a_gradient_for_one_image() -> None:
    alone = normal(2, 1, 6).requires_grad_(True)
    real = relations(normal(2, 7, 6, seed=1), 3)

    loss = class_spread(alone) + relation_loss(real, relations(alone, 3))

    assert torch.autograd.grad(loss, alone)[0].abs().max() == 0


@pytest.mark.parametrize("base", ["dm", "idm"])
def test_without_weights_it_is_its_base_bit_by_bit_and_needs_no_pool(base: str, started: Any) -> None:
    settings = {name: value for name, value in BRIEF[base].items() if name not in ("base", "pool")}
    _, expected = started(base, method=settings)
    ctx, distiller = started(method={**BRIEF[base], "lambda_cc": 0, "lambda_cm": 0})

    assert distiller.pool_specs(ctx) == []
    for _ in range(3):
        assert torch.equal(distiller.step()["loss"], expected.step()["loss"])
    assert torch.equal(distiller.snapshot().images, expected.snapshot().images)


def test_cc_or_cm_alone_is_another_run_than_the_base(started: Any) -> None:
    losses = []
    for weights in ((0, 0), (0.05, 0), (0, 0.01), (0.05, 0.01)):
        settings = {**QUICK, "lambda_cc": weights[0], "lambda_cm": weights[1]}
        losses.append(float(started(method=settings)[1].step()["loss"]))

    base, cc, cm, both = losses
    assert base < cc
    assert base < cm
    assert both - base == pytest.approx(cc - base + cm - base, rel=1e-4)


def test_a_step_on_cc_alone_lowers_it(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DM's own distance is taken out; the same network is drawn before and after."""
    monkeypatch.setattr("ddray.methods.esfr.squared_distance", lambda real, synthetic: 0 * synthetic[0].sum())
    settings = {**QUICK, "lambda_cc": 1.0, "lambda_cm": 0, "lr_img": 1e-3, "augment": "none"}
    settings["pool"] = {**POOL, "num_models": 1}
    _, distiller = started(ipc=3, method=settings)

    values = [float(distiller.step()["loss"]) for _ in range(3)]

    assert values[0] > values[1] > values[2] > 0


def replayed(ctx: Any, distiller: Any, images: Tensor, config: Config, real: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of step 1 of base dm in float64, class by class, and its gradient."""
    shape, num_classes = ctx.dataset.image_shape, ctx.dataset.num_classes
    net = build_net(ctx.arch, shape, num_classes, seed=derive_seed(ctx.seed, "distill", "net", 1)).double()
    member = int(torch.randint(2, (), generator=ctx.generator("observer", 1)))
    observer = ctx.pool.get(distiller.pool_specs(ctx))[member].module().double()
    live = images.clone().requires_grad_(True)
    loss = torch.zeros((), dtype=torch.float64)
    for label in range(num_classes):
        rows = live[2 * label : 2 * label + 2]
        theirs = net.features(real[label]).embedding.detach()
        ours = net.features(rows).embedding
        matrices = [by_place_fast(values.view(len(values), 8, -1)) for values in (theirs, ours)]
        seen = observer.features(rows).embedding
        loss = loss + (theirs.mean(0) - ours.mean(0)).square().sum()
        loss = loss + config.lambda_cm * (matrices[0] - matrices[1]).square().sum()
        loss = loss + config.lambda_cc * (seen - seen.mean(0)).square().sum()
    return loss.detach(), torch.autograd.grad(loss, live)[0]


def by_place_fast(maps: Tensor) -> Tensor:
    """M of maps [n, C, P], image by image."""
    mean = maps.mean(0)
    return torch.stack([(sample - mean) @ (sample - mean).T for sample in maps]).mean(0)


def test_a_step_on_dm_is_that_of_a_loop_over_classes(started: Any) -> None:
    weights = {"lambda_cc": 0.5, "lambda_cm": 0.2, "lr_img": 0.1, "augment": "none"}
    ctx, distiller = started(seed=3, method={**QUICK, **weights})
    images = distiller.snapshot().images.double()
    index = ClassBatches(ctx, 6).draw(ctx.generator("step", 1)).view(3, -1)
    real = torch.stack([ctx.space.encode(ctx.split.images[rows]).double() for rows in index])
    loss, gradient = replayed(ctx, distiller, images, ESFRConfig.parse(weights), real)

    assert float(distiller.step()["loss"]) == pytest.approx(float(loss), rel=1e-4)
    moved = distiller.snapshot().images.double()
    torch.testing.assert_close(moved, images - 0.1 * gradient, rtol=1e-4, atol=1e-5)


def test_a_step_on_idm_adds_both_terms_of_the_mini_images(started: Any) -> None:
    settings = {**BRIEF["idm"], "augment": "none", "num_trained": 0, "ce_weight": 0.0}
    _, base = started("idm", method={k: v for k, v in settings.items() if k not in ("base", "pool")})
    ctx, distiller = started(method={**settings, "lambda_cc": 0.5, "lambda_cm": 0.2})
    images = expand(distiller.snapshot().images.double(), Partition(factor=2)).view(3, 8, 3, 16, 16)
    member = int(torch.randint(2, (), generator=ctx.generator("observer", 1)))
    observer = ctx.pool.get(distiller.pool_specs(ctx))[member].module().double()
    generator = ctx.generator("step", 1)
    distiller._engine._queue.push()
    members = distiller._engine._queue.members
    net = members[int(torch.randint(len(members), (), generator=generator))].net
    net, index = _double(ctx, net), ClassBatches(ctx, 6).draw(generator).view(3, -1)
    distiller._engine._queue.members = members[:-1]  # the step pushes it itself
    distiller._engine._queue._num_pushed -= 1

    net.requires_grad_(False), observer.requires_grad_(False)

    expected = float(base.step()["loss"])
    for label in range(3):
        real = ctx.space.encode(ctx.split.images[index[label]]).double()
        pair = [net.features(each).embedding.view(len(each), 8, -1) for each in (real, images[label])]
        seen = observer.features(images[label]).embedding
        expected += 0.5 * float((seen - seen.mean(0)).square().sum())
        expected += 0.2 * float((by_place_fast(pair[0]) - by_place_fast(pair[1])).square().sum())

    assert float(distiller.step()["loss"]) == pytest.approx(expected, rel=1e-4)
    assert distiller.snapshot().meta.ipc_decoded == 8


def _double(ctx: Any, net: Any) -> Any:
    copy = build_net(ctx.arch, ctx.dataset.image_shape, ctx.dataset.num_classes, seed=0).double()
    copy.load_state_dict(net.state_dict())
    return copy


@pytest.mark.parametrize("cut", [1, 2])
def test_a_run_on_idm_goes_on_from_its_state(cut: int, started: Any) -> None:
    (_, first), (_, second), (_, whole) = (started(method=BRIEF["idm"]) for _ in range(3))
    losses = [whole.step()["loss"] for _ in range(3)]
    for _ in range(cut):
        first.step()

    second.load_state_dict(first.state_dict())

    assert all(torch.equal(second.step()["loss"], loss) for loss in losses[cut:])
    assert torch.equal(second.snapshot().images, whole.snapshot().images)


@pytest.mark.parametrize(
    ("base", "factor", "is_alone"), [("dm", 1, True), ("idm", 1, True), ("idm", 2, False)]
)
def test_one_image_per_class_is_said(
    base: str, factor: int, is_alone: bool, started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ctx, distiller = started(ipc=1, method={**BRIEF[base], "factor": factor})

    assert (f"esfr leaves both terms out, and is {base} alone" in caplog.text) == is_alone
    assert (distiller.pool_specs(ctx) == []) == is_alone


def test_the_pool_is_of_resnets_that_have_not_seen_val(started: Any) -> None:
    ctx, _ = started(method=QUICK)

    specs = pool_specs(ctx, ESFRConfig())

    assert len(specs) == 1000
    assert {(spec.arch, spec.split, spec.kind) for spec in specs} == {
        ("resnet18_vico", "train-val0", "supervised")
    }
    assert specs[0].recipe == {
        **{"epochs": 40, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch": 256}
    }
    assert [spec.seed for spec in specs[:3]] == [0, 1, 2]


def test_defaults_are_those_of_the_base() -> None:
    dm, idm = ESFRConfig.parse({}), ESFRConfig.parse({"base": "idm"})

    assert (dm.lr_img, dm.factor, dm.lambda_cc, dm.lambda_cm) == (1.0, 1, 0.05, 0.01)
    assert (idm.lr_img, idm.factor, idm.lambda_cc, idm.lambda_cm) == (0.2, 2, 0.01, 0.03)
    assert (idm.ce_weight, idm.num_trained, idm.net_steps, idm.batch_train) == (0.5, 2, 10, 256)
    assert ESFRConfig.parse({"base": "idm", "lr_img": 0.7}).lr_img == 0.7
    assert ESFRConfig.parse(idm.dump()) == idm
    assert ESFRConfig.parse(dm.dump()) == dm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 2}, "factor=2 needs base=idm, got base=dm"),
        ({"queue_size": 7}, "queue_size=7 needs base=idm, got base=dm"),
        ({"base": "idm", "precision": "bf16"}, "precision=bf16 needs base=dm, got base=idm"),
    ],
)
def test_settings_of_the_other_base_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ESFRConfig.parse(settings)


def test_what_it_can_not_do_is_refused(started: Any) -> None:
    with pytest.raises(InputError, match=r"pixel_space=normalized.*got raw; or set method.lambda_cc=0"):
        started(method=QUICK, pixel_space="raw")
    with pytest.raises(InputError, match=r"its last map, pooled, .* got lenet; or set method.lambda_cm=0"):
        started(method=QUICK, arch="lenet")
    ctx, distiller = started(method={**QUICK, "lambda_cc": 0}, pixel_space="raw")
    assert distiller.pool_specs(ctx) == []
    assert torch.isfinite(distiller.step()["loss"])


@pytest.mark.parametrize("arch", ["resnet10_ap", "convnet2_w8_max", "vit_tiny"])
def test_other_networks_have_relations_too(arch: str, started: Any) -> None:
    _, distiller = started(method={**QUICK, "lambda_cc": 0}, arch=arch)

    assert distiller._engine._channels > 0
    assert torch.isfinite(distiller.step()["loss"])


def test_observers_count_in_the_memory_of_a_step_without_their_weights(started: Any) -> None:
    """ResNet-10's weights are 20 MB, its maps of an image of 16 px a few."""
    pool = {**POOL, "num_models": 1, "arch": "resnet10_in"}
    _, with_pool = started(method={**QUICK, "lambda_cm": 0, "pool": pool})
    weights = sum(weight.nbytes for weight in with_pool._engine._observers.net.parameters())
    sizes = []
    for observers in (with_pool._engine._observers, None):
        with_pool._engine._observers = observers
        with pytest.MonkeyPatch.context() as patch:
            where = "ddray.methods.families.matching.batches.class_groups"
            patch.setattr(where, lambda num, size, *_, **__: sizes.append(size) or [slice(0, num)])
            with_pool._engine._branch.groups(with_pool._engine._forward, 1)

    assert 0 < sizes[0] - sizes[1] < weights / 4


def test_work_counts_the_observers() -> None:
    config = ESFRConfig.parse({"batch_real": 1, "pool": {"arch": "convnet2_w8"}})
    shape = random_dataset().image_shape
    both = config.work_per_step(20, 10, "convnet2_w8", shape)

    assert both == pytest.approx((20 + 10 + 20) / (20 + 10) * _without(config, shape))
    assert get_method("esfr").config_type is ESFRConfig


def _without(config: ESFRConfig, shape: tuple[int, int, int]) -> float:
    return config.model_copy(update={"lambda_cc": 0.0}).work_per_step(20, 10, "convnet2_w8", shape)
