from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from ddray.data import PixelSpace, Split
from ddray.errors import InputError
from ddray.evaluation.options import EvaluateConfig
from ddray.jobs.plan import resolve
from ddray.seeding import derive
from ddray.training.cutmix import cutmix
from ddray.training.dsa import dsa_for
from ddray.training.jitter import color_jitter
from ddray.training.loop import augmenter, train
from ddray.training.rates import phases
from ddray.training.recipe import RECIPES, Recipe, minimax_epochs, named_recipe

SPACE = PixelSpace("normalized", (0.5,), (0.25,))


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6, 100, 1500])
def test_multistep_is_pytorchs_scheduler_with_the_milestones_of_idc(epochs: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    milestones = [2 * epochs // 3, 5 * epochs // 6]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=milestones, gamma=0.2)
    (rates,) = phases(Recipe(epochs=epochs, schedule="multistep"))
    for epoch in range(epochs):
        assert rates[epoch] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def boxed(images: Tensor, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return IDC's CutMix of a batch, pixel by pixel, its partners, and the share that is left."""
    generator = derive(seed)
    _, lam, row, column = torch.rand(4, generator=generator).tolist()
    partner = torch.randperm(len(images), generator=generator)
    height, width = images.shape[2:]
    cut_h, cut_w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    cy, cx = int(row * height), int(column * width)
    mixed, left = images.clone(), 0
    for y in range(height):
        for x in range(width):
            if cy - cut_h // 2 <= y < cy + cut_h // 2 and cx - cut_w // 2 <= x < cx + cut_w // 2:
                for i in range(len(images)):
                    mixed[i, :, y, x] = images[partner[i], :, y, x]
            else:
                left += 1
    return mixed, partner, left / (height * width)


def test_cutmix_is_the_codes_box_with_the_share_of_pixels_as_weight() -> None:
    images = torch.randn(5, 2, 7, 9, generator=derive(0))
    shares = []
    for seed in range(40):
        original = images.clone()
        result = cutmix(images, 1.0, derive(seed))
        assert result is not None
        mixed, partner, share = boxed(images, seed)
        assert torch.equal(result.images, mixed)
        assert torch.equal(result.partner, partner)
        assert result.share == pytest.approx(share)
        assert torch.equal(images, original)
        shares.append(share)
    assert min(shares) < 0.5 < max(shares)


def test_cutmix_mixes_by_its_probability() -> None:
    images = torch.zeros(2, 1, 4, 4)
    generator = derive(3)
    mixed = sum(cutmix(images, 0.3, generator) is not None for _ in range(2000))
    assert 0.26 < mixed / 2000 < 0.34


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_training_on_soft_labels_is_sgd_on_their_cross_entropy_by_hand(mix: float) -> None:
    images = torch.randn(5, 1, 6, 6, generator=derive(1))
    soft_labels = torch.randn(5, 3, generator=derive(2)).softmax(1)
    recipe = Recipe(epochs=2, lr=0.2, momentum=0, weight_decay=0, batch=5, schedule="constant", cutmix=mix)
    ours: Any = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    reference: Any = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    reference.load_state_dict(ours.state_dict())

    train(ours, images, soft_labels, recipe, generator=derive(4), augment=None)

    generator = derive(4)
    for _ in range(2):
        index = torch.randperm(5, generator=generator)
        batch, targets = images[index], soft_labels[index]
        if mixed := cutmix(batch, mix, generator) if mix else None:
            batch, share = mixed.images, mixed.share
            targets = share * targets + (1 - share) * targets[mixed.partner]
        loss = -(targets * F.log_softmax(reference(batch), 1)).sum(1).mean()
        for parameter, gradient in zip(
            reference.parameters(), torch.autograd.grad(loss, reference.parameters()), strict=True
        ):
            parameter.data -= 0.2 * gradient
    for parameter, expected in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_training_with_cutmix_is_sgd_on_the_two_labels_by_hand() -> None:
    images = torch.randn(7, 1, 6, 6, generator=derive(1))
    labels = torch.randint(0, 3, (7,), generator=derive(2))
    recipe = Recipe(
        epochs=4, lr=0.2, momentum=0.5, weight_decay=0.01, batch=4, schedule="constant", cutmix=0.6
    )
    ours: Any = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    reference: Any = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    reference.load_state_dict(ours.state_dict())

    loss = train(ours, images, labels, recipe, generator=derive(4), augment=None)

    generator, last, num_mixed = derive(4), 0.0, 0
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.5, weight_decay=0.01)
    for _ in range(4):
        last = 0.0
        for index in torch.randperm(7, generator=generator).split(4):
            state = generator.get_state()
            batch, targets = images[index], F.one_hot(labels[index], 3).float()
            if float(torch.rand(4, generator=generator)[0]) < 0.6:
                torch.randperm(len(index), generator=generator)
                replayed = torch.Generator().set_state(state)
                mixed = cutmix(batch, 1.0, replayed)
                assert mixed is not None
                batch = mixed.images
                targets = mixed.share * targets + (1 - mixed.share) * targets[mixed.partner]
                num_mixed += 1
            step = -(targets * F.log_softmax(reference(batch), 1)).sum(1).mean()
            optimizer.zero_grad()
            step.backward()
            optimizer.step()
            last += float(step.detach()) * len(index) / 7
    assert 0 < num_mixed < 8
    assert loss == pytest.approx(last, rel=1e-5)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_cutmix_follows_the_augmentation() -> None:
    seen: list[Tensor] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return self.weight.expand(len(x), 2)

    images = torch.zeros(4, 1, 8, 8)
    recipe = Recipe(epochs=20, schedule="constant", cutmix=1.0)
    net: Any = Net()
    train(
        net,
        images,
        torch.tensor([0, 1, 0, 1]),
        recipe,
        generator=derive(0),
        augment=lambda batch, generator: batch + torch.arange(1.0, 5.0).view(4, 1, 1, 1),
    )
    assert len(seen) == 20
    assert any(len(batch[i].unique()) == 2 for batch in seen for i in range(4))
    assert all(set(batch.unique().tolist()) <= {1.0, 2.0, 3.0, 4.0} for batch in seen)


class TestStrategy:
    def batch(self) -> Tensor:
        return torch.randn(6, 3, 16, 16, generator=derive(0))

    @pytest.mark.parametrize("name", ["dsa", "dsa_idc"])
    def test_it_replaces_the_operations(self, name: Any) -> None:
        apply = augmenter(name, can_flip=True, space=SPACE, strategy="flip")
        assert apply is not None
        batch = self.batch()
        for seed in range(4):
            out = apply(batch, derive(seed))
            for before, after in zip(batch, out, strict=True):
                assert torch.equal(after, before) or torch.equal(after, before.flip(2))

    def test_idc_without_cutout_zeroes_no_square(self) -> None:
        ones = torch.ones(8, 1, 16, 16)
        apply = augmenter("dsa_idc", can_flip=False, space=SPACE, strategy="cutout_flip")
        bare = augmenter("dsa_idc", can_flip=True, space=SPACE, strategy="flip")
        assert apply is not None
        assert bare is not None
        assert bool((apply(ones, derive(0)) == 0).any())
        assert torch.equal(bare(ones, derive(0)), ones)

    def test_flip_is_left_out_where_it_changes_the_class(self) -> None:
        batch = self.batch()
        assert augmenter("dsa", can_flip=False, space=SPACE, strategy="flip") is None
        color = augmenter("dsa_idc", can_flip=False, space=SPACE, strategy="color_flip")
        expected = augmenter("dsa_idc", can_flip=True, space=SPACE, strategy="color")
        assert color is not None
        assert expected is not None
        assert torch.equal(color(batch, derive(2)), expected(batch, derive(2)))

    @pytest.mark.parametrize("can_flip", [True, False])
    def test_without_one_it_is_the_papers(self, can_flip: bool) -> None:
        batch, dsa = self.batch(), dsa_for(can_flip)
        apply = augmenter("dsa", can_flip=can_flip, space=SPACE)
        assert apply is not None
        assert torch.equal(
            apply(batch, derive(5)), dsa.apply(batch, dsa.draw(len(batch), derive(5), shared_op=True))
        )

    def test_an_unknown_operation_is_refused_when_the_recipe_is_read(self) -> None:
        with pytest.raises(InputError, match=r"DSA operation must be one of .*'cuttout'.*'cutout'"):
            Recipe.parse({"strategy": "color_cuttout"})


class TestCropJitter:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_the_jitter_is_torchvisions(self, order: tuple[int, ...]) -> None:
        pixels = torch.rand(4, 3, 8, 8, generator=derive(0), dtype=torch.float64)
        factors = 0.6 + 0.8 * torch.rand(3, 4, generator=derive(1), dtype=torch.float64)
        adjust = (v2.functional.adjust_brightness, v2.functional.adjust_contrast)
        for index, image in enumerate(pixels):
            expected = image
            for which in order:
                operation = (*adjust, v2.functional.adjust_saturation)[which]
                expected = operation(expected, float(factors[which, index]))
            actual = color_jitter(pixels, factors, order)[index]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)  # its weights of grey are rounded

    def test_grey_images_keep_their_channel_and_have_no_saturation(self) -> None:
        pixels = torch.rand(5, 1, 8, 8, generator=derive(0))
        factors = torch.tensor([[1.0], [1.0], [0.6]]).expand(3, 5)
        torch.testing.assert_close(color_jitter(pixels, factors, (2, 0, 1)), pixels)

    def test_crops_show_at_least_half_and_are_mirrored_where_they_may_be(self) -> None:
        ramp = (torch.arange(16.0) / 15).expand(400, 3, 16, 16).contiguous()
        batch = SPACE.encode(ramp)
        for can_flip in (True, False):
            apply = augmenter("crop_jitter", can_flip=can_flip, space=SPACE)
            assert apply is not None
            pixels = SPACE.decode(apply(batch, derive(3)))
            assert torch.equal(apply(batch, derive(3)), apply(batch, derive(3)))
            assert float(pixels.min()) >= -1e-6
            assert float(pixels.max()) <= 1 + 1e-6
            mirrored = float((pixels[..., -1] < pixels[..., 0]).all(2).all(1).float().mean())
            assert mirrored == pytest.approx(0.5 * can_flip, abs=0.1)
            spread = pixels[:, 0, 8].amax(1) - pixels[:, 0, 8].amin(1)
            # sqrt(.5 x 3/4) of the side at least, times factors of contrast and brightness of .6 each.
            assert float(spread.min()) > (math.sqrt(0.375) - 2 / 16) * 0.36 - 0.05
            assert float(spread.std()) > 0.05


class TestNamedRecipe:
    def test_vico_is_the_default(self) -> None:
        assert Recipe(**RECIPES["vico"]) == Recipe()

    def test_idc_is_dsdms_evaluation(self) -> None:
        recipe = Recipe.parse(named_recipe({"recipe": "idc"}))
        assert (recipe.epochs, recipe.batch, recipe.schedule, recipe.cutmix) == (1500, 64, "multistep", 0.5)
        assert recipe.augment == "dsa_idc"
        assert recipe.strategy == "color_crop_flip_scale_rotate"
        assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.01, 0.9, 5e-4)

    def test_minimaxs_is_its_code_for_hard_labels(self) -> None:
        recipe = Recipe.parse(named_recipe({"recipe": "minimax"}, ipc=10))
        assert (recipe.epochs, recipe.batch, recipe.schedule, recipe.cutmix) == (2000, 64, "multistep", 1.0)
        assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.01, 0.9, 5e-4)
        assert recipe.augment == "crop_jitter"
        lengths = {1: 3000, 2: 2000, 10: 2000, 11: 1500, 50: 1500, 51: 1000, 200: 1000, 201: 500, 501: 300}
        assert {ipc: minimax_epochs(ipc, 10) for ipc in lengths} == lengths
        assert [minimax_epochs(ipc, 100) for ipc in (1, 10, 50, 100)] == [2000, 1300, 1000, 600]
        assert named_recipe({"recipe": "minimax", "epochs": 7}, ipc=50)["epochs"] == 7

    @pytest.mark.parametrize(("ipc", "epochs"), [(1, 3000), (10, 2000), (20, 1500)])
    def test_minimaxs_epochs_are_those_of_the_run(self, ipc: int, epochs: int, digits: Any) -> None:
        config = resolve("dm", digits, ipc=ipc, layers=[{"evaluate": {"recipe": "minimax"}}]).config.evaluate
        assert (config.epochs, config.augment, config.cutmix) == (epochs, "crop_jitter", 1.0)

    @pytest.mark.parametrize("name", sorted(RECIPES))
    def test_it_names_every_field(self, name: str) -> None:
        assert set(RECIPES[name]) == set(Recipe.model_fields)

    def test_what_is_given_beside_it_wins(self) -> None:
        assert named_recipe({"recipe": "idc", "epochs": 7})["epochs"] == 7
        assert named_recipe({"epochs": 7}) == {"epochs": 7}

    @pytest.mark.parametrize("name", ["idd", 3, ["idc"]])
    def test_another_name_is_refused(self, name: Any) -> None:
        with pytest.raises(InputError, match="recipe must be one of idc, minimax, vico"):
            named_recipe({"recipe": name})

    def test_it_wins_over_the_preset_and_later_layers_over_it(self, digits: Any) -> None:
        layers = [{"evaluate": {"recipe": "idc"}}, {"evaluate": {"epochs": 9}}]
        config = resolve("dm", digits, ipc=1, layers=layers).config.evaluate
        expected = {**RECIPES["idc"], "epochs": 9}
        assert {name: getattr(config, name) for name in expected} == expected
        assert isinstance(config, EvaluateConfig)
        before = resolve("dm", digits, ipc=1, layers=[{"evaluate": {"epochs": 9}}, layers[0]]).config.evaluate
        assert before.epochs == 1500


def test_spectrograms_are_never_augmented() -> None:
    recipe = Recipe.parse(named_recipe({"recipe": "idc", "epochs": 3}))
    labels = torch.tensor([0])
    audio, pictures = Split(torch.zeros(1, 1, 4, 4), labels), Split(torch.zeros(1, 1, 4, 4).byte(), labels)
    assert audio.is_audio
    assert not pictures.is_audio
    assert recipe.on(pictures) == recipe
    bare = recipe.on(audio)
    assert (bare.augment, bare.strategy, bare.cutmix) == ("none", None, 0.0)
    assert (bare.epochs, bare.schedule, bare.batch) == (3, "multistep", 64)
