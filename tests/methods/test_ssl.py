"""The self-supervised teacher: its loss against the definition, its views, and that no label reaches it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.data import Dataset, Split, normalized_space
from ddray.errors import InputError
from ddray.jobs.trainers import PoolTrainer
from ddray.methods.families.ssl.teacher import (
    SOLO_LEARN,
    SslTrainer,
    TeacherConfig,
    barlow_twins_loss,
    image_fingerprint,
    random_view,
    schedule,
    ssl_teacher_spec,
    teacher_net,
)
from ddray.pool.local import LocalPool
from ddray.system.files import home
from ddray.training.embedding import embed_images

CPU = torch.device("cpu")
SMALL = TeacherConfig(arch="convnet2_w8", epochs=2, batch=8, projector=16)


def spec_of(dataset: Dataset, config: TeacherConfig = SMALL, **changes: Any) -> Any:
    split = dataset.train()
    spec = ssl_teacher_spec(config, dataset, split, split_name="train", device=CPU)
    return spec.model_copy(update=changes)


def naive_barlow_twins(a: Tensor, b: Tensor, off_diagonal: float) -> Tensor:
    """The double sum over the D x D cross-correlation, entry by entry."""
    total = torch.zeros((), dtype=a.dtype)
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            scale = ((x.square().mean() + 1e-5) * (y.square().mean() + 1e-5)).sqrt()  # as batch norm divides
            entry = (x * y).mean() / scale
            total = total + ((1 - entry) ** 2 if i == j else off_diagonal * entry**2)
    return total


@pytest.mark.parametrize(("num", "dim"), [(5, 9), (12, 4)])
def test_the_loss_and_its_gradient_equal_the_definition(num: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(num, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    actual, expected = [], []
    for loss, into in ((barlow_twins_loss, actual), (naive_barlow_twins, expected)):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = loss(x, y, 0.3)
        into += [value.detach(), *torch.autograd.grad(value, (x, y))]

    for ours, naive in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


def test_equal_decorrelated_views_have_no_loss() -> None:
    """Orthogonal columns of mean 0: C is the identity."""
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert float(barlow_twins_loss(signs, signs, 1.0)) < 1e-8
    assert float(barlow_twins_loss(signs, -signs, 0.0)) == pytest.approx(12.0, abs=1e-3)


def test_permuted_labels_leave_key_and_bytes_of_the_teacher_unchanged(toy: Any, tmp_path: Path) -> None:
    dataset = toy((6, 5, 7))
    split = dataset.train()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(3))
    permuted = replace(dataset, load_train=lambda: Split(split.images, split.labels[order]))
    assert permuted.fingerprint != dataset.fingerprint
    assert not torch.equal(permuted.train().labels, split.labels)

    files = []
    for pool_index, data in enumerate((dataset, permuted)):
        spec = spec_of(data)
        entry = LocalPool(PoolTrainer(data, data.train(), CPU), tmp_path / str(pool_index)).get([spec])[0]
        assert entry.tensors["features"].shape == (18, 128)
        files.append((tmp_path / str(pool_index) / spec.key / "tensors.safetensors").read_bytes())

    assert spec_of(dataset) == spec_of(permuted)
    assert files[0] == files[1]


def test_other_images_and_other_recipes_are_other_teachers(toy: Any) -> None:
    dataset = toy()
    keys = {
        spec_of(dataset).key,
        spec_of(toy(seed=1)).key,
        spec_of(toy(can_flip=False)).key,
        *(spec_of(dataset, SMALL.model_copy(update={name: value})).key for name, value in CHANGES.items()),
    }
    assert len(keys) == 3 + len(CHANGES)
    assert image_fingerprint(dataset.train().images) == image_fingerprint(dataset.train().images.clone())


CHANGES = {
    "epochs": 3,
    "lr": 0.1,
    "projector": 8,
    "stem_padding": 2,
    "warmup_epochs": 1,
    "solarize": 0.0,
    "seed": 1,
    "arch": "convnet1_w8",
}


def test_an_entry_gives_the_network_behind_its_features(toy: Any) -> None:
    dataset = toy()
    config = SMALL.model_copy(update={"stem_padding": 2})
    images = dataset.train().images
    entry = LocalPool(PoolTrainer(dataset, dataset.train(), CPU)).get([spec_of(dataset, config)])[0]

    net = teacher_net(entry)

    assert not net.training
    features = embed_images(net, images, normalized_space(dataset).encode, CPU)
    assert torch.equal(features, entry.tensors["features"])
    plain = teacher_net(LocalPool(PoolTrainer(dataset, dataset.train(), CPU)).get([spec_of(dataset)])[0])
    assert plain.body.convs[0].padding == (1, 1)
    assert net.body.convs[0].padding == (2, 2)
    assert home().exists()


def test_training_brings_the_loss_down(digits: Dataset) -> None:
    config = SMALL.model_copy(update={"epochs": 15, "batch": 64, "lr": 3e-3})
    _, measured = SslTrainer(digits.train().images[:128], CPU)(spec_of(digits, config))
    assert measured["final_loss"] < 0.6 * measured["first_loss"]


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_a_function_of_the_generator_alone(channels: int) -> None:
    pixels = torch.rand(6, channels, 12, 10, generator=torch.Generator().manual_seed(0))

    def view(seed: int, *, flip: bool = True) -> Tensor:
        torch.manual_seed(seed + 7)
        generator = torch.Generator().manual_seed(seed)
        return random_view(pixels, generator, crop_area=0.3, flip=flip)

    assert torch.equal(view(1), view(1))
    assert not torch.equal(view(1), view(2))
    assert view(1).shape == pixels.shape
    assert float(view(1).min()) >= 0
    assert float(view(1).max()) <= 1
    assert len({tuple(image.flatten().tolist()) for image in view(1)}) == len(pixels)


def test_a_whole_crop_without_jitter_is_the_image_or_its_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    import ddray.methods.families.ssl.teacher as module

    monkeypatch.setattr(module, "_jitter", lambda views, u: views)
    monkeypatch.setattr(module, "luma", lambda views: views)
    pixels = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # At any other ratio than 1 a crop of the whole area would be cut at the image's sides.
    monkeypatch.setattr(module.math, "log", lambda x: 0.0)
    result = random_view(pixels, torch.Generator().manual_seed(1), crop_area=1.0, flip=True)

    same = (result - pixels).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (result - pixels.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert bool((same | mirrored).all())
    assert 5 < int(same.sum()) < 35


def test_greyscale_and_solarisation_apply_whether_jittered_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """solo-learn: jitter .8, greyscale .2, solarisation .2 of the second view, each drawn independently."""
    import ddray.methods.families.ssl.teacher as module

    # A jitter that leaves a mark: the bottom row is 0, which no other operation here produces.
    def marked(views: Tensor, u: Tensor) -> Tensor:
        marked_views = views.clone()
        marked_views[:, :, -1] = 0
        return marked_views

    monkeypatch.setattr(module, "_jitter", marked)
    pixels = torch.tensor([0.6, 0.7, 0.8])[:, None, None].expand(4000, 3, 4, 4)
    views_by_share = {
        share: random_view(
            pixels, torch.Generator().manual_seed(2), crop_area=1.0, flip=False, solarize=share
        )
        for share in (0.0, 0.2)
    }
    top = views_by_share[0.0][:, :, 0, 0]
    grey, jittered = (top[:, 0] - top[:, 2]).abs() < 1e-4, views_by_share[0.0][:, 0, -1, 0] == 0
    assert float(jittered.float().mean()) == pytest.approx(0.8, abs=0.03)
    for mask in (grey, grey[jittered], grey[~jittered]):
        assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.05)
    solarised = (views_by_share[0.2][:, :, 0, 0] - (1 - top)).abs().amax(1) < 1e-4
    for mask in (solarised, solarised[grey], solarised[~jittered]):
        assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.05)
    assert bool((views_by_share[0.2] == views_by_share[0.0])[~solarised].all())


def test_only_the_second_view_is_solarised(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddray.methods.families.ssl.teacher as module

    shares: list[float] = []

    def view(pixels: Tensor, generator: torch.Generator, **options: Any) -> Tensor:
        shares.append(options["solarize"])
        return random_view(pixels, generator, **options)

    monkeypatch.setattr(module, "random_view", view)
    SslTrainer(toy().train().images[:16], CPU)(spec_of(toy(), SMALL.model_copy(update={"epochs": 1})))
    assert shares == [0.0, 0.2] * 2


def test_spectrograms_are_refused(toy: Any) -> None:
    dataset = toy()
    split = Split(dataset.train().images.float(), dataset.train().labels)
    with pytest.raises(InputError, match="8-bit images, toy holds spectrograms"):
        ssl_teacher_spec(SMALL, dataset, split, split_name="train", device=CPU)


def test_solo_learns_recipe_is_that_of_its_files() -> None:
    """scripts/pretrain/cifar: barlow.yaml, augmentations/asymmetric.yaml; solo/methods/base.py."""
    recipe = TeacherConfig.parse(SOLO_LEARN)
    assert (recipe.warmup_epochs, recipe.crop_area, recipe.stem_padding) == (10, 0.08, 2)
    assert (recipe.epochs, recipe.batch, recipe.projector) == (1000, 256, 2048)
    assert (recipe.weight_decay, recipe.solarize, recipe.off_diagonal) == (1e-4, 0.2, 0.0051)


def test_a_teacher_of_before_the_warm_up_could_be_set_has_the_same_key(toy: Any) -> None:
    recipe = spec_of(toy()).recipe
    assert "warmup_epochs" not in recipe
    assert recipe["crop_area"] == 0.2


@pytest.mark.parametrize(("warmup_epochs", "warm"), [(None, 4), (10, 30), (0, 0)])
def test_the_rate_rises_over_the_warm_up_and_falls_as_a_cosine(
    warmup_epochs: int | None, warm: int, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 epochs of 3 steps: a tenth is 4 steps, 10 epochs are 30."""
    import ddray.methods.families.ssl.teacher as module

    rates: list[float] = []

    def run(step: Any, batches: Any, **options: Any) -> None:
        rates.extend(options["lr"](index) for index in range(42))
        for _ in range(14):
            options["on_epoch"](torch.zeros(()))

    monkeypatch.setattr(module, "run", run)
    changes = {"epochs": 14, "lr": 0.5, "warmup_epochs": warmup_epochs}
    config = SMALL.model_copy(update=changes)
    SslTrainer(toy().train().images[:24], CPU)(spec_of(toy(), config))

    rising = [0.5 * (step + 1) / warm for step in range(warm)]
    falling = [0.25 * (1 + math.cos(math.pi * step / (42 - warm))) for step in range(42 - warm)]
    assert rates == pytest.approx(rising + falling)


def test_a_warm_up_longer_than_the_training_only_rises() -> None:
    assert [schedule(step, 4, 8) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("smallest", [0.2, 0.08])
def test_crops_take_at_least_their_share_of_the_area(smallest: float) -> None:
    """Of a ramp along each axis the differences of a view's pixels are the crop's sides."""
    ramp = torch.linspace(0, 1, 64)
    pixels = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)])[:, None].repeat(200, 1, 1, 1)
    import ddray.methods.families.ssl.teacher as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_jitter", lambda views, u: views)
        generator = torch.Generator().manual_seed(0)
        shares = []
        for _ in range(5):
            state = generator.get_state()
            wide = random_view(pixels[0::2], generator, crop_area=smallest, flip=False)
            generator.set_state(state)  # the same boxes along the other axis
            high = random_view(pixels[1::2], generator, crop_area=smallest, flip=False)
            width = wide[:, 0, 32, -1] - wide[:, 0, 32, 0]
            height = high[:, 0, -1, 32] - high[:, 0, 0, 32]
            shares.append(width * height)
    areas = torch.cat(shares)
    assert smallest * 0.9 < float(areas.min()) < smallest * 1.3
    assert float(areas.max()) < 1.02
