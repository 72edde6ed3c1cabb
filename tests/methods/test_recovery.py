"""Recovery: CDA's curriculum of crops, the two parts of a distance, and how a network is squeezed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ddray.data import normalized_space, open_dataset
from ddray.errors import InputError
from ddray.jobs.context import make_context
from ddray.jobs.plan import resolve
from ddray.methods.families import recovery
from ddray.methods.families.recovery import (
    BatchStatistics,
    batch_view,
    pixel_range,
    smallest_area,
    squeezed_spec,
)
from ddray.methods.sre2l import SRe2LConfig
from ddray.nets import build_net
from ddray.testing import random_dataset
from ddray.training.crops import draw_boxes, padded_crop
from ddray.training.loop import augmenter

QUICK = {"teacher_arch": "convnet2_w8_bn", "teacher_epochs": 1}


@pytest.mark.parametrize("milestone", [1.0, 0.5])
@pytest.mark.parametrize(
    ("crop", "middle"), [("step", 1.0), ("linear", 0.54), ("cosine", 0.54), ("fixed", 0.08)]
)
def test_the_smallest_area_falls_from_1_to_8_percent(crop: Any, middle: float, milestone: float) -> None:
    """At start, in the middle of the fall, at its end and after it."""
    start = 0.08 if crop == "fixed" else 1.0

    assert smallest_area(crop, 0.0, milestone) == pytest.approx(start)
    assert smallest_area(crop, milestone / 2, milestone) == pytest.approx(middle)
    assert smallest_area(crop, milestone, milestone) == 0.08
    assert smallest_area(crop, 1.0, milestone) == 0.08
    assert smallest_area("none", 0.3, milestone) is None


def test_the_cosine_is_cdas_formula_at_every_step() -> None:
    steps, milestone = 40, 0.7

    for t in range(steps + 1):
        fall = 0.08 + 0.92 * (1 + math.cos(math.pi * t / (milestone * steps))) / 2
        expected = fall if t < milestone * steps else 0.08
        assert smallest_area("cosine", t / steps, milestone) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.6, 0.9])
def test_no_drawn_box_is_smaller_than_the_curriculum_says(progress: float) -> None:
    side = 224
    least = smallest_area("cosine", progress, 1.0)
    assert least is not None

    boxes = draw_boxes(2000, (side, side), torch.Generator().manual_seed(0), scale=(least, 1.0))

    areas = boxes[:, 2] * boxes[:, 3] / side**2
    assert float(areas.min()) >= least - 1 / side  # by the rounding of both sides
    assert float(areas.max()) <= 1
    if progress:
        assert float(areas.min()) < least + 0.1


def test_an_area_of_1_leaves_the_batch_whole() -> None:
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = 0
    for seed in range(20):
        view = batch_view(images, torch.Generator().manual_seed(seed), min_area=1.0, rolls=(0, 0), flip=False)
        whole += torch.allclose(view, images, atol=1e-5)

    assert whole == 20


def run(planned: Any, dataset: Any, steps: int = 5, **settings: Any) -> torch.Tensor:
    _, ctx, method = planned("sre2l", dataset, ipc=2, steps=steps, method={**QUICK, **settings})
    method.setup(ctx)
    for _ in range(steps):
        method.step()
    images: torch.Tensor = method.snapshot().images
    return images


def test_without_a_crop_a_batch_is_rolled_and_nothing_else_is_drawn(planned: Any, toy: Any) -> None:
    """`none` keeps the draws and bytes of before there were crops."""
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shifts = torch.randint(0, 5, (2,), generator=torch.Generator().manual_seed(3)).tolist()

    view = batch_view(images, torch.Generator().manual_seed(3), min_area=None, rolls=(0, 4))

    assert torch.equal(view, torch.roll(images, shifts, (2, 3)))
    assert torch.equal(run(planned, toy()), run(planned, toy(), crop="none"))


def test_fixed_is_a_milestone_of_0(planned: Any, toy: Any) -> None:
    fixed = run(planned, toy(), crop="fixed")

    for crop in ("step", "linear", "cosine"):
        assert torch.equal(run(planned, toy(), crop=crop, milestone=0.0), fixed)
        assert not torch.equal(run(planned, toy(), crop=crop), fixed)


def test_settings_at_their_defaults_are_not_dumped() -> None:
    """Runs from before these settings keep their keys."""
    names = {"crop", "milestone", "r_var", "squeeze", "init", "jitter_both_ways"}

    assert not names & {*SRe2LConfig().dump()}
    assert names == {*SRe2LConfig().every_value()} & names


def test_the_weight_of_the_variances_scales_their_distance_alone() -> None:
    net = build_net("convnet2_w8_bn", (3, 16, 16), 3, seed=0).double().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64, requires_grad=True)

    def distances(r_var: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        statistics = BatchStatistics(net, r_var)
        with statistics.watch():
            net(images)
        return statistics.distances, [
            torch.autograd.grad(distance, images, retain_graph=True)[0] for distance in statistics.distances
        ]

    (means, mean_slopes), (sums, sum_slopes), (weighted, slopes) = map(distances, (0.0, 1.0, 11.0))
    for layer in range(2):
        variance, slope = sums[layer] - means[layer], sum_slopes[layer] - mean_slopes[layer]
        assert float(variance.detach()) > 1e-3
        torch.testing.assert_close(weighted[layer], means[layer] + 11 * variance)
        torch.testing.assert_close(slopes[layer], mean_slopes[layer] + 11 * slope)


def test_a_real_start_begins_with_images_of_the_classes(planned: Any, toy: Any) -> None:
    dataset = toy()
    _, ctx, method = planned("sre2l", dataset, ipc=2, steps=1, method={**QUICK, "init": "random"})
    method.setup(ctx)

    distilled, train = method.snapshot(), dataset.train()
    real = ctx.space.encode(train.images)
    for image, label in zip(distilled.images, distilled.labels, strict=True):
        rows = [row for row in range(len(real)) if torch.equal(real[row], image)]
        assert [int(train.labels[row]) for row in rows] == [int(label)]


def test_no_digit_is_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored: list[bool] = []
    original = recovery.resized_crops

    def watch(images: Any, boxes: Any, flips: Any) -> Any:
        mirrored.append(bool(flips.any()))
        return original(images, boxes, flips)

    monkeypatch.setattr(recovery, "resized_crops", watch)
    layer = {"steps": 4, "method": {**QUICK, "crop": "cosine"}, "compile": "off"}
    for flips in (False, True):
        digits = open_dataset("digits", can_flip=flips)
        ctx_plan = resolve("sre2l", digits, ipc=3, layers=[layer])
        ctx = make_context(ctx_plan, digits.train(), split_name="train", device=torch.device("cpu"))
        engine = recovery.Recovery(ctx, ctx_plan.config.method)
        batch = torch.zeros(10, 1, 16, 16)
        mirrored.clear()
        for seed in range(16):
            engine.view(batch, torch.Generator().manual_seed(seed), 0.5)
        assert any(mirrored) is flips
        assert len(mirrored) == 16


def test_the_squeeze_of_the_authors_is_their_recipe(planned: Any, toy: Any) -> None:
    _, ctx, _ = planned("sre2l", toy(), method=QUICK)
    settings = {"teacher_arch": "convnet2_w8_bn", "teacher_epochs": 200}
    theirs = squeezed_spec(ctx, SRe2LConfig.parse({**settings, "squeeze": "crop_flip"})).recipe
    ours = squeezed_spec(ctx, SRe2LConfig.parse(settings)).recipe

    assert (theirs["lr"], theirs["weight_decay"], theirs["momentum"]) == (0.1, 5e-4, 0.9)
    assert (theirs["batch"], theirs["epochs"], theirs["schedule"]) == (128, 200, "cosine")
    assert theirs["augment"] == "crop_flip"
    assert (ours["lr"], ours["batch"], ours["augment"]) == (0.05, 64, "dsa")


@pytest.mark.parametrize("flips", [False, True])
def test_crop_flip_pads_by_4_black_pixels(toy: Any, flips: bool) -> None:
    """As torchvision's RandomCrop(size, padding=4) before the pixels are normalised."""
    dataset = toy(shape=(3, 8, 8))
    space = normalized_space(dataset)
    pixels = dataset.train().images
    apply = augmenter("crop_flip", can_flip=flips, space=space)
    assert apply is not None

    views = apply(space.encode(pixels), torch.Generator().manual_seed(0))

    raw = pixels.float() / 255
    expected = padded_crop(
        raw, torch.Generator().manual_seed(0), padding=4, fill=torch.zeros(3, 1, 1), flip=flips
    )
    torch.testing.assert_close(space.decode(views), expected, atol=1e-5, rtol=0)
    assert not torch.equal(expected, raw)


@pytest.mark.parametrize("crop", ["none", "fixed"])
def test_a_milestone_without_a_curriculum_is_refused(crop: str) -> None:
    with pytest.raises(InputError, match=f"milestone must be left out with crop={crop}, got 0.5; it is for"):
        SRe2LConfig.parse({"crop": crop, "milestone": 0.5})
    assert SRe2LConfig.parse({"crop": "linear", "milestone": 0.5}).milestone == 0.5


def test_spectrograms_are_bounded_by_their_smallest_value_alone(planned: Any, sounds: Any) -> None:
    _, ctx, _ = planned("sre2l", sounds, method=QUICK)
    low, high = pixel_range(ctx)
    space = normalized_space(sounds)
    smallest = float(sounds.train().images.min())
    torch.testing.assert_close(space.decode(low), torch.full((1, 1, 64, 64), smallest))
    assert torch.isinf(high).all()
    pictures = pixel_range(planned("sre2l", random_dataset(), method=QUICK)[1])
    decoded = [float(normalized_space(random_dataset()).decode(end).mean()) for end in pictures]
    assert decoded == pytest.approx([0.0, 1.0], abs=1e-6)


def test_crops_make_other_sets_than_they_once_did() -> None:
    assert [SRe2LConfig.parse({"crop": crop}).edition for crop in ("none", "fixed", "cosine")] == [0, 1, 1]
