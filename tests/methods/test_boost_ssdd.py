"""Boost-SSDD: float accounting, initial bases, an outer step by hand, approximation networks, options."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddray.artifact.bases import Bases, expand, perceptron
from ddray.data import Dataset, Split
from ddray.distillation.method import Target
from ddray.drawing.images import bases_grid, save_pictures
from ddray.errors import InputError
from ddray.jobs.context import check_size
from ddray.jobs.plan import resolve
from ddray.methods.boost_ssdd import BoostSsddConfig, plan_layout, planned, preset
from ddray.methods.families.ssl import memory as _krr_memory
from ddray.methods.families.ssl.bases_fit import fit_shifts, principal_components, shrink
from ddray.methods.families.ssl.memory import images_at_once, needed_bytes
from ddray.nets import build_net
from ddray.seeding import derive_seed

TEACHER = {"arch": "convnet2_w8", "epochs": 1, "batch": 8, "projector": 8}
QUICK = {"teacher": TEACHER, "pool_size": 2, "inner_steps_max": 2, "batch_real": 6}


@pytest.fixture
def started(toy: Any, planned: Any) -> Any:
    def make(
        method: str = "boost_ssdd", *, steps: int = 4, dataset: Any = None, seed: int = 0, **settings: Any
    ) -> Any:
        layer = {"steps": steps, "method": {**QUICK, **settings}, "arch": "convnet2_w8_bn"}
        _, ctx, distiller = planned(method, dataset or toy(), ipc=2, seed=seed, **layer)
        distiller.setup(ctx)
        return ctx, distiller

    return make


def config_of(dataset: str, budget: int, shape: tuple[int, int, int], **settings: Any) -> BoostSsddConfig:
    method_settings = preset("paper", Target(dataset, shape, 100, 1, budget))["method"]
    return BoostSsddConfig.parse({**method_settings, **settings})


@pytest.mark.parametrize(
    ("dataset", "budget", "side", "expected"),
    [
        ("cifar100", 25, 32, (50, 50)),
        ("cifar100", 50, 32, (100, 100)),
        ("cifar100", 100, 32, (200, 200)),
        ("cifar100", 1000, 32, (500, 500)),
        ("cifar100", 5000, 32, (700, 500)),
        ("tiny_imagenet", 50, 64, (100, 100)),
        ("tiny_imagenet", 100, 64, (200, 200)),
        ("tiny_imagenet", 200, 64, (400, 400)),
        ("imagenet", 250, 64, (500, 500)),
    ],
)
def test_table_5_is_the_paper_preset(dataset: str, budget: int, side: int, expected: tuple[int, int]) -> None:
    config = config_of(dataset, budget, (3, side, side))
    assert (config.num_image_bases, config.num_target_bases) == expected
    assert (config.scale, config.hidden) == ((2, 4) if side == 32 else (4, 16))


@pytest.mark.parametrize(
    ("dataset", "budget", "side", "m"),
    [("cifar100", 100, 32, 114), ("cifar100", 1000, 32, 2418), ("cifar100", 5000, 32, 12_127),
     ("tiny_imagenet", 200, 64, 2382)],
)  # fmt: skip
def test_the_budget_is_counted_to_the_float(dataset: str, budget: int, side: int, m: int) -> None:
    shape = (3, side, side)
    config = config_of(dataset, budget, shape)
    u, v, h = config.num_image_bases or 0, config.num_target_bases or 0, config.hidden
    fixed = u * 3 * 16 * 16 + v * 512 + 3 * (v * h + h + h * v + v)

    plan = plan_layout(config, budget, shape, 50_000)

    assert plan.num_images == m
    assert plan.storage_floats == fixed + m * (u + v)
    assert plan.storage_floats <= budget * 3 * side * side < plan.storage_floats + u + v


def test_outside_table_5_bases_keep_the_shares_of_its_rows() -> None:
    """Twice the budget; of a small one at most a half of the floats for images and a third for targets."""
    digits = plan_layout(config_of("digits", 200, (1, 16, 16)), 200, (1, 16, 16), 1437)
    assert (digits.num_image_bases, digits.num_target_bases) == (64, 33)
    assert digits.storage_floats <= 200 * 256
    cifar10 = plan_layout(config_of("cifar10", 10, (3, 32, 32)), 10, (3, 32, 32), 50_000)
    assert (cifar10.num_image_bases, cifar10.num_target_bases) == (20, 20)
    few = plan_layout(config_of("cifar10", 10, (3, 32, 32)), 10, (3, 32, 32), 15)
    assert (few.num_image_bases, few.num_target_bases, few.num_images) == (15, 15, 15)


def test_a_budget_too_small_names_the_smallest_that_works(toy: Any) -> None:
    dataset = toy((60,) * 10, shape=(1, 16, 16))
    with pytest.raises(
        InputError, match=r"budget must be >= (\d+) images for boost_ssdd on toy, got 1"
    ) as caught:
        check_size(resolve("boost_ssdd", dataset, budget=1), dataset.train())
    least = int(str(caught.value).split(">= ")[1].split()[0])
    check_size(resolve("boost_ssdd", dataset, budget=least), dataset.train())
    with pytest.raises(InputError, match=f"budget must be >= {least}"):
        check_size(resolve("boost_ssdd", dataset, budget=least - 1), dataset.train())


def test_the_smallest_budget_is_found_at_once(toy: Any) -> None:
    """Networks so wide that storing them takes many millions of images."""
    dataset = toy((60,) * 10, shape=(1, 16, 16))
    plan = resolve("boost_ssdd", dataset, budget=1, layers=[{"method": {"hidden": 10**9}}])
    with pytest.raises(InputError, match="budget must be >= ") as caught:
        check_size(plan, dataset.train())
    least = int(str(caught.value).split(">= ")[1].split()[0])
    assert least > 10**7
    num_images = [plan_layout(plan.config.method, n, (1, 16, 16), 600).num_images for n in (least - 1, least)]
    assert num_images[0] < 1 <= num_images[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 3}, "method.scale must divide the images' sides, 16x16, got 3"),
        ({"num_image_bases": 193}, r"num_image_bases must be <= 24 .*got 193"),
        ({"num_target_bases": 129}, r"num_target_bases <= 24 .*129"),
    ],
)
def test_bases_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, toy: Any, planned: Any
) -> None:
    with pytest.raises(InputError, match=message):
        planned("boost_ssdd", toy(), ipc=20, steps=1, method={**QUICK, **changes})


def test_rotations_need_square_images(toy: Any, planned: Any) -> None:
    wide = toy(shape=(3, 16, 20))
    with pytest.raises(InputError, match=r"rotation needs square images, got 16x20; use jigsaw"):
        planned("boost_ssdd", wide, ipc=2, steps=1, method=QUICK)


def test_principal_components_are_those_of_an_uncentred_svd() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0, 0, 0, 0, 0])
    actual = principal_components(rows, 3)
    expected = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:3]
    cosines = (actual.double() @ expected.T).abs()
    torch.testing.assert_close(cosines, torch.eye(3).double(), rtol=1e-4, atol=1e-4)


def test_the_start_is_a_projection_onto_principal_components(started: Any) -> None:
    ctx, distiller = started(num_image_bases=7, num_target_bases=5)
    parameters = {name: value.detach() for name, value in distiller._engine.parameters.items()}
    assert parameters["image_bases"].shape == (7, 3, 8, 8)
    assert parameters["target_bases"].shape == (5, 128)

    real = shrink(ctx.space.encode(ctx.split.images), 2)
    base = parameters["image_bases"].flatten(1)
    torch.testing.assert_close(base @ base.T, torch.eye(7), rtol=1e-4, atol=1e-4)
    # Every row of coefficients is the projection of one real image, and of its representation.
    projected, features = real @ base.T, distiller.representations @ parameters["target_bases"].T
    for image_row, target_row in zip(
        parameters["image_coefficients"], parameters["target_coefficients"], strict=True
    ):
        index = int((projected - image_row).abs().sum(1).argmin())
        torch.testing.assert_close(projected[index], image_row, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features[index], target_row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["real", "random"])
def test_other_starts_are_real_images_or_noise(init: str, started: Any) -> None:
    ctx, distiller = started(init=init)
    parameters = distiller._engine.parameters
    real = shrink(ctx.space.encode(ctx.split.images), 2)
    nearest = torch.cdist(parameters["image_bases"].detach().flatten(1), real).amin(1)
    assert bool((nearest < 1e-4).all()) == (init == "real")
    assert 0.5 < float(parameters["image_coefficients"].detach().std()) < 1.5
    distiller.step()


def naive_loss(parameters: dict[str, Tensor], real: Tensor, representations: Tensor, net: Any) -> Tensor:
    """Algorithm 2 and Eq 3 view by view in float64, with an explicit inverse and one graph through it all."""
    small = (parameters["image_coefficients"] @ parameters["image_bases"].flatten(1)).view(-1, 3, 8, 8)
    images = F.interpolate(small, size=(16, 16), mode="bilinear")
    features, targets = [], []
    for turns in range(4):
        features.append(net.embed(images.rot90(turns, (2, 3))))
        coefficients = (
            parameters["target_coefficients"] if turns == 0 else parameters["view_coefficients"][turns - 1]
        )
        targets.append(coefficients @ parameters["target_bases"])
    s, y = torch.cat(features), torch.cat(targets)
    s = torch.cat([s, s.new_ones(len(s), 1)], 1)
    t = net.embed(real)
    t = torch.cat([t, t.new_ones(len(t), 1)], 1)
    gram = s @ s.T
    inverse = torch.linalg.inv(gram + 1e-6 * gram.trace().detach() * torch.eye(len(s), dtype=s.dtype))
    return (t @ s.T @ inverse @ y - representations).square().mean()


def test_an_outer_step_is_adamw_on_the_gradient_of_equation_3(started: Any) -> None:
    """One network with fixed weights; batch_real covers the split, so only the batch's order is random."""
    ctx, distiller = started(batch_real=24, pool_size=1, inner_steps_max=1, lr_outer=1e-3, steps=10)
    loop = distiller._engine
    loop.inner.fill(loop._draw())
    net = build_net(ctx.arch, (3, 16, 16), 128, seed=0)
    net.load_state_dict(loop.inner.net(0).state_dict())
    net.double().eval()
    before = {name: p.detach().double().clone().requires_grad_() for name, p in loop.parameters.items()}
    real, representations = ctx.space.encode(ctx.split.images).double(), distiller.representations.double()
    loss = naive_loss(before, real, representations, net)
    expected_loss = float(loss.detach())
    gradients = dict(zip(before, torch.autograd.grad(loss, list(before.values())), strict=True))

    actual_loss = distiller.step()["loss"]

    assert float(actual_loss) == pytest.approx(expected_loss, rel=1e-3)
    for name, parameter in loop.parameters.items():
        gradient = loop._optimizer.state[parameter]["exp_avg"] * 10  # (1 - .9) of the first gradient
        error = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert float(error) < 2e-2, name
        moved = (parameter.detach() - before[name].detach()).abs()
        assert float(moved.max()) == pytest.approx(1e-3, rel=1e-2)  # AdamW's first step is lr, up to eps


def test_a_graph_in_parts_gives_the_same_step(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A ridge large enough that float32's rounding of the features, 1e-7, does not dominate.
    _, whole = started(pool_size=1, ridge=1e-2)
    expected = whole.step()["loss"]
    _, parts = started(pool_size=1, ridge=1e-2)
    monkeypatch.setattr(_krr_memory, "_GRAPH_BYTES", 8 * parts._engine._costs.graph)
    num = parts._engine._extent.num_images
    assert images_at_once(parts._engine._costs, parts._engine._extent) == 2 < num
    actual = parts.step()["loss"]
    assert float(actual) == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in parts._engine.parameters.items():
        a = parts._engine._optimizer.state[parameter]["exp_avg"]
        b = whole._engine._optimizer.state[whole._engine.parameters[name]]["exp_avg"]
        assert float((a - b).norm() / b.norm()) < 1e-3, name


def test_labels_play_no_part(toy: Any, started: Any) -> None:
    from dataclasses import replace

    dataset: Dataset = toy()
    split = dataset.train()
    permuted = replace(dataset, load_train=lambda: Split(split.images, split.labels.roll(5)))
    snapshots = []
    for data in (dataset, permuted):
        _, distiller = started(dataset=data, steps=2)
        distiller.step()
        snapshots.append(distiller.snapshot())
    assert snapshots[0].meta.fingerprint != snapshots[1].meta.fingerprint
    assert all(
        torch.equal(snapshots[0].compact[name], snapshots[1].compact[name]) for name in snapshots[0].compact
    )


def test_the_set_that_is_stored_is_the_set_that_is_trained_on(started: Any) -> None:
    _, distiller = started(steps=2)
    distiller.step()
    distilled = distiller.snapshot()
    distilled.validate()
    decoded = distilled.decode()

    with torch.no_grad():
        images, targets = distiller._engine._synthesise(distiller._engine.parameters, slice(None))
    torch.testing.assert_close(decoded.images, images, rtol=1e-5, atol=1e-5)
    m = len(distilled.images)
    torch.testing.assert_close(decoded.targets[:m], targets[:m], rtol=1e-5, atol=1e-5)
    assert distilled.meta.bases is not None
    assert distilled.meta.bases.approximation_mse is not None
    shift = (decoded.targets - targets)[m:].square().mean()
    base = distilled.compact["target_bases"]
    # The bases' rows are nearly orthonormal: an error of V coefficients spreads over D dimensions.
    expected = distilled.meta.bases.approximation_mse * float(base.square().sum()) / base.shape[1]
    assert float(shift) == pytest.approx(expected, rel=0.05)
    assert distilled.meta.storage_floats == sum(t.numel() for t in distilled.compact.values())


def test_approximations_are_ranked_as_in_table_11(started: Any) -> None:
    """Prediction error: same >= bias >= networks >= all stored = 0; only the last may break the budget."""
    errors, floats = {}, {}
    for kind in ("same", "bias", "mlp", "ideal"):
        _, distiller = started(steps=1, approximation=kind)
        distiller.step()
        meta = distiller.snapshot().meta
        assert meta.bases is not None
        errors[kind], floats[kind] = meta.bases.approximation_mse, meta.storage_floats
    assert errors["same"] > errors["bias"] > errors["mlp"] > errors["ideal"] == 0
    assert max(floats[kind] for kind in ("same", "bias", "mlp")) <= 6 * 768


@pytest.mark.parametrize("augmentation", ["jigsaw", "crop", "none"])
def test_other_augmentations_distil(augmentation: str, started: Any) -> None:
    _, distiller = started(steps=1, augmentation=augmentation)
    assert torch.isfinite(distiller.step()["loss"])
    distilled = distiller.snapshot()
    distilled.validate()
    views = {"jigsaw": 4, "crop": 6, "none": 1}[augmentation]
    assert len(distilled.decode().images) == views * len(distilled.images)
    assert distilled.meta.storage_floats <= 6 * 768


def test_without_bases_images_and_targets_are_learned_themselves(started: Any) -> None:
    _, distiller = started(steps=1, parameterize=False, augmentation="none")
    distiller.step()
    distilled = distiller.snapshot()
    distilled.validate()
    assert set(distilled.compact) == {"images", "targets"}
    assert distilled.meta.storage_floats == len(distilled.images) * (768 + 128) <= 6 * 768


def test_networks_learn_a_shift_that_they_can_express() -> None:
    """Coefficients far from 0 and of unequal size, as principal ones are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) * torch.tensor([20.0, 5, 2, 1, 0.5, 0.1]) + 10
    shift = torch.stack([0.3 * x.clamp(min=10) - 2, -x])
    tensors, mse = fit_shifts(x, x + shift, 8, generator)

    names = ("hidden_weight", "hidden_bias", "shift_weight", "shift_bias")
    assert tuple(tensors) == names
    predicted = perceptron(x, *(tensors[name] for name in names))
    assert mse == pytest.approx(float((predicted - shift).square().mean()), rel=1e-3)
    assert mse < 0.02 * float(shift.var())
    again, _ = fit_shifts(x, x + shift, 8, torch.Generator().manual_seed(1))
    assert not torch.equal(again["hidden_weight"], tensors["hidden_weight"])


@pytest.mark.parametrize("spread", [0.0, 1e-5])
@pytest.mark.parametrize("num", [1, 20])
def test_networks_learn_a_shift_of_coefficients_that_hardly_vary(num: int, spread: float) -> None:
    """One image (m = 1), or columns that are nearly constant: a bias alone reaches error 0."""
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(1, 30, generator=generator) + spread * torch.randn(num, 30, generator=generator)
    shift = torch.randn(3, 1, 30, generator=generator).expand(-1, num, -1)
    tensors, mse = fit_shifts(x, x + shift, 4, generator)
    assert mse < 1e-3
    assert max(float(tensor.abs().max()) for tensor in tensors.values()) < 100


def test_a_set_too_large_for_the_memory_is_refused_with_what_it_needs(
    toy: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_krr_memory, "available_bytes", lambda device: 2**20)
    _, ctx, distiller = planned("boost_ssdd", toy(), ipc=2, steps=1, method=QUICK)
    with pytest.raises(
        InputError, match=r"boost_ssdd needs about 0\.\d GiB for \d+ images with their views, cpu"
    ):
        distiller.setup(ctx)


@pytest.mark.parametrize(
    ("dataset", "budget", "side", "num_real", "full_gib"),
    [
        ("cifar100", 1000, 32, 50_000, 20),
        ("cifar100", 5000, 32, 50_000, 100),
        ("tiny_imagenet", 200, 64, 100_000, 40),
        ("imagenet", 250, 64, 1_281_167, 40),
        ("imagenette", 10, 128, 9_469, 350),
    ],
)
def test_every_row_of_the_tables_fits_a_gpu_of_24_gib(
    dataset: str, budget: int, side: int, num_real: int, full_gib: int
) -> None:
    """Under the preset; full batches would not fit."""
    shape = (3, side, side)
    run = preset("paper", Target(dataset, shape, 100, 1, budget))
    blank = torch.zeros(1, dtype=torch.uint8).expand(num_real, *shape)
    stand_in = SimpleNamespace(
        dataset=SimpleNamespace(image_shape=shape),
        split=Split(blank, torch.zeros(num_real, dtype=torch.int64)),
        arch=run["arch"],
        device=torch.device("cpu"),
        budget=budget,
        method="boost_ssdd",
    )

    def gib(**method_settings: Any) -> float:
        config = BoostSsddConfig.parse({**run["method"], **method_settings})
        _, extent = planned(stand_in, config)  # type: ignore[arg-type]
        return needed_bytes(stand_in, config, extent, 512) / 2**30  # type: ignore[arg-type]

    assert gib() < 24
    assert gib(inner_batch=None) > full_gib


def test_an_inner_batch_is_images_with_all_of_their_views(started: Any) -> None:
    ctx, distiller = started(inner_batch=9)
    images, targets = distiller._engine._draw()(ctx.generator("rows"))
    with torch.no_grad():
        whole_images, whole_targets = distiller._engine._synthesise(distiller._engine.parameters, slice(None))
    m = distiller._engine._extent.num_images
    rows = [int((whole_images - image).abs().amax((1, 2, 3)).argmin()) for image in images]
    assert len(rows) == 8 < len(whole_images)
    assert [index // m for index in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows[:2] == [index - m for index in rows[2:4]] == [index - 3 * m for index in rows[6:]]
    torch.testing.assert_close(targets, whole_targets[rows])
    torch.testing.assert_close(images, whole_images[rows])


def test_decoding_equals_the_training_form(started: Any) -> None:
    """`ideal` stores what was learned: decoding it gives exactly the pairs of the last step."""
    _, distiller = started(steps=1, approximation="ideal")
    distiller.step()
    decoded = distiller.snapshot().decode()
    learned = Bases(scale=2, augmentation="rotation", approximation="ideal")
    parameters = {name: value.detach() for name, value in distiller._engine.parameters.items()}
    for actual, expected in zip((decoded.images, decoded.targets), expand(parameters, learned), strict=True):
        assert torch.equal(actual, expected)


def test_the_networks_of_a_pool_differ(started: Any) -> None:
    ctx, distiller = started()
    assert derive_seed(ctx.seed, "distill", "inner", 0, 0) != derive_seed(ctx.seed, "distill", "inner", 1, 0)
    first, second = (distiller._engine.inner.net(slot_index).state_dict() for slot_index in range(2))
    assert not torch.equal(first["body.convs.0.weight"], second["body.convs.0.weight"])


def test_pictures_stand_beside_the_artifact(started: Any, tmp_path: Path) -> None:
    """Distilled images, image bases and t-SNE (Figs 2a-2c): PNGs of the right size that show something."""
    _, distiller = started(steps=1, num_image_bases=7)
    distiller.step()
    distilled = distiller.snapshot()
    save_pictures(distilled, tmp_path / "set.pt", representations=distiller.representations)

    m = len(distilled.images)
    columns = min(10, m)
    # Cells of 64 pixels with 2 between them.
    sizes = {
        "set.png": (66 * columns + 2, 66 * -(-m // columns) + 2),
        "set.bases.png": (66 * 7 + 2, 66 + 2),
        "set.tsne.png": (640, 640),
    }
    assert {path.name for path in tmp_path.glob("set.*")} == set(sizes)
    for name, size in sizes.items():
        with Image.open(tmp_path / name) as picture:
            assert (picture.format, picture.size) == ("PNG", size), name
            colours = picture.convert("RGB").getcolors(2**20)
        assert colours is not None
        assert len(colours) > 2, name
    with Image.open(tmp_path / "set.tsne.png") as picture:
        seen = {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
    assert {(0x9E, 0xB0, 0xC7), (0xD5, 0x5E, 0x00)} <= seen


def test_a_picture_of_bases_stretches_each_to_its_own_range() -> None:
    bases = torch.stack([torch.linspace(-1, 1, 64), torch.linspace(5, 6, 64)]).view(2, 1, 8, 8)
    picture = bases_grid(bases)
    assert picture.shape == (3, 68, 134)
    first, second = picture[:, 2:66, 2:66], picture[:, 2:66, 68:132]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert (float(first.min()), float(first.max())) == (0, 1)


def test_a_set_without_bases_has_no_picture_of_them(started: Any, tmp_path: Path) -> None:
    _, distiller = started(steps=1, parameterize=False, augmentation="none")
    save_pictures(distiller.snapshot(), tmp_path / "set.pt", representations=distiller.representations)
    assert {path.name for path in tmp_path.glob("set.*")} == {"set.png", "set.tsne.png"}
