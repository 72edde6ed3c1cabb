from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.artifact.distilled_set import TrainSet
from ddray.data import PixelSpace, fit_zca, normalized_space
from ddray.errors import DdrayError, InputError
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext
from ddray.evaluation.soft import (
    Soft,
    SoftConfig,
    half_cosine,
    mix,
    resolve_settings,
    shuffle_strips,
    soft_loss,
)
from ddray.evaluation.teachers import Teachers, get_teachers, least_accuracy
from ddray.jobs import score as scoring
from ddray.jobs.trainers import PoolTrainer
from ddray.nets import build_net
from ddray.pool.local import LocalPool
from ddray.training.recipe import TeacherRecipe

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_the_kl_divergence_at_a_temperature_without_its_square() -> None:
    logits, teacher = torch.randn(2, 5, 7, generator=seeded(), dtype=torch.float64)

    loss = soft_loss(logits, torch.softmax(teacher / 20, 1), 20.0)

    total = 0.0
    for a, b in zip(logits.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(x / 20) for x in a]
        p = [math.exp(x / 20) for x in b]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        total += sum(y * math.log(y / x) for x, y in zip(q, p, strict=True))
    assert float(loss) == pytest.approx(total / 5, rel=1e-9)


def test_the_rate_falls_along_half_a_cosine() -> None:
    assert [half_cosine(e, 4) for e in range(4)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * e / 8)) for e in range(4)]
    )
    assert half_cosine(4, 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "ipc", "num_classes", "size", "arch", "expected"),
    [
        ({}, 10, 10, 32, "resnet18", (400, 0.01, 100)),  # never more than the set has
        ({}, 50, 10, 32, "resnet18", (400, 0.01, 128)),
        ({}, 10, 200, 64, "resnet18", (300, 0.01, 128)),
        ({"recipe": "repo"}, 10, 10, 32, "resnet18", (400, 0.001, 50)),
        ({"recipe": "repo"}, 50, 100, 32, "resnet18", (400, 0.001, 200)),
        ({"recipe": "repo"}, 1, 10, 32, "mobilenet_v2", (400, 0.0025, 10)),
        ({"recipe": "repo", "lr": 0.1, "batch": 7, "epochs": 3}, 10, 10, 32, "vgg11", (3, 0.1, 7)),
        ({"recipe": "table5"}, 10, 10, 224, "resnet18", (2000, 0.001, 50)),
        ({"recipe": "table5"}, 50, 10, 224, "resnet18", (1500, 0.001, 100)),
        ({"recipe": "table5"}, 100, 10, 224, "resnet18", (1000, 0.001, 100)),
    ],
)
def test_recipes_are_the_papers_and_the_codes(
    options: dict[str, Any], ipc: int, num_classes: int, size: int, arch: str, expected: tuple[Any, ...]
) -> None:
    config = SoftConfig.parse(options)

    settings = resolve_settings(
        config, arch=arch, num_images=ipc * num_classes, num_classes=num_classes, size=size
    )

    assert (settings.epochs, settings.lr, settings.batch) == expected
    assert (settings.temperature, settings.weight_decay, settings.min_scale) == (20.0, 0.01, 0.08)
    assert settings.mix == ("mixup" if config.recipe == "table5" else "cutmix")


def test_mixes() -> None:
    images = torch.rand(6, 1, 8, 8, generator=seeded())

    plain, pasted, blended = (mix(images, kind, seeded(2)) for kind in ("none", "cutmix", "mixup"))

    assert torch.equal(plain.images, images)
    assert plain.share == 1.0
    unchanged = (pasted.images == images).float().mean()
    assert 0 < pasted.share < 1
    assert float(unchanged) >= pasted.share
    assert torch.allclose(
        blended.images, blended.share * images + (1 - blended.share) * images[blended.partner]
    )
    assert sorted(blended.partner.tolist()) == list(range(6))


def test_strips_are_shuffled_whole_and_image_by_image() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(30, 1, 4, 4).contiguous()

    shuffled = shuffle_strips(images, 2, seeded())

    quarters = {tuple(sorted(image.flatten().tolist())) for image in shuffled}
    assert quarters == {tuple(range(16))}
    parts = {tuple(image[0, :2, :2].flatten().tolist()) for image in shuffled}
    assert parts == {(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)}
    assert torch.equal(shuffle_strips(images, 1, seeded()), images)
    with pytest.raises(InputError, match="patches must divide the image's side of 4 px, got 3"):
        shuffle_strips(images, 3, seeded())


def teachers_of(nets: list[Any], space: PixelSpace) -> Teachers:
    return Teachers(
        nets, space, "+".join(["x"] * len(nets)), 0.9, [{"arch": "x", "accuracy": 0.9}] * len(nets)
    )


def test_several_teachers_probabilities_are_averaged() -> None:
    nets = [build_net("convnet2_w8", (3, 16, 16), 3, seed=seed).eval() for seed in (0, 1)]
    space = PixelSpace("normalized", (0.5,) * 3, (0.2,) * 3)
    images = torch.randn(4, 3, 16, 16, generator=seeded())

    actual = teachers_of(nets, space).probabilities(images, space, 2.0)

    expected = sum(torch.softmax(net(images) / 2, 1) for net in nets) / 2
    assert torch.allclose(actual, expected, atol=1e-6)
    assert "each" in teachers_of(nets, space).describe()
    assert "each" not in teachers_of(nets[:1], space).describe()


def test_a_teacher_sees_images_in_its_own_pixel_space(toy: Any) -> None:
    dataset = toy()
    net = build_net("convnet2_w8", (3, 16, 16), 3, seed=0).eval()
    teacher_space = normalized_space(dataset)
    raw = PixelSpace("raw", dataset.mean, dataset.std)
    whitened = fit_zca(dataset.train())
    images = dataset.train().images[:5]

    teachers = teachers_of([net], teacher_space)
    expected = teachers.probabilities(teacher_space.encode(images), teacher_space, 1.0)
    for space in (raw, whitened):
        actual = teachers.probabilities(space.encode(images), space, 1.0)
        assert torch.allclose(actual, expected, atol=1e-3)


@pytest.fixture
def ctx_and_pool(digits: Any) -> tuple[EvalContext, Any]:
    train = digits.train()
    few = train.select(torch.arange(300))
    ctx = EvalContext(digits, train.select(torch.arange(300, 500)), normalized_space(digits), CPU)
    return ctx, LocalPool(PoolTrainer(digits, few, CPU))


def test_a_student_learns_from_a_teacher_alone(ctx_and_pool: Any, digits: Any) -> None:
    """Its own labels are wrong, the teacher's are not: it must not see its own."""
    ctx, pool = ctx_and_pool
    recipe = TeacherRecipe(epochs=8, augment="none")
    teachers = get_teachers(pool, ["convnet2_w16"], recipe, ctx, split_name="few")
    assert teachers.accuracy > 0.8
    images = ctx.space.encode(digits.train().images[:100])
    lying = TrainSet(images, torch.randint(10, (100,), generator=seeded()))

    protocol = Soft(SoftConfig(epochs=60, lr=0.005), teachers)
    first, again, other = (
        protocol.evaluate(lying, ctx, arch="convnet2_w16", seed=seed) for seed in (0, 0, 1)
    )

    assert first.accuracy > 0.6
    assert first.num_images == 100
    assert first.accuracy == again.accuracy
    assert first.accuracy != other.accuracy


def test_the_same_network_twice_is_two_networks(ctx_and_pool: Any) -> None:
    ctx, pool = ctx_and_pool
    recipe = TeacherRecipe(epochs=4, augment="none")

    teachers = get_teachers(pool, ["convnet2_w8", "convnet2_w8"], recipe, ctx, split_name="few")

    weights = [next(net.parameters()) for net in teachers.nets]
    assert not torch.equal(*weights)
    assert teachers.arch == "convnet2_w8+convnet2_w8"
    accuracies = [one["accuracy"] for one in teachers.each]
    assert min(accuracies) - 0.1 <= teachers.accuracy <= 1


def test_a_teacher_at_chance_is_refused_before_any_student(ctx_and_pool: Any) -> None:
    ctx, pool = ctx_and_pool
    shuffled = replace(ctx.split, labels=(ctx.split.labels + 1) % 10)  # a wrong label order
    with pytest.raises(DdrayError, match=r"teacher convnet2_w8 must be better than chance .* needed 0\.1"):
        get_teachers(
            pool,
            ["convnet2_w8"],
            TeacherRecipe(epochs=8, augment="none"),
            replace(ctx, split=shuffled),
            split_name="few",
        )


@pytest.mark.parametrize(
    ("num_classes", "num_images", "expected"),
    [
        (1, 10, 0.0),
        (2, 100, 0.65),
        (2, 10_000, 0.515),
        (10, 10_000, 0.109),
        (200, 10_000, 0.0071),
        (2, 4, 0.9),
    ],
)
def test_a_teacher_must_do_better_than_luck(num_classes: int, num_images: int, expected: float) -> None:
    assert least_accuracy(num_classes, num_images) == pytest.approx(expected, abs=1e-4)


def test_hard_labels_have_no_teacher_and_soft_ones_need_one(ctx_and_pool: Any, digits: Any) -> None:
    ctx, _ = ctx_and_pool
    with pytest.raises(InputError, match="recipe paper must have a teacher"):
        Soft(SoftConfig(), None)
    images = ctx.space.encode(digits.train().images[:100])
    train_set = TrainSet(images, digits.train().labels[:100])

    result = Soft(SoftConfig(recipe="table5", epochs=60), None).evaluate(
        train_set, ctx, arch="convnet2_w16", seed=0
    )

    assert result.accuracy > 0.6


@pytest.fixture
def distilled(planned: Any, digits: Any, tmp_path: Path) -> Path:
    _, ctx, method = planned(
        "rded", digits, method={"teacher_arch": "convnet2_w8", "teacher_epochs": 2, "factor": 2}
    )
    method.setup(ctx)
    method.snapshot().save(tmp_path / "d.pt")
    return tmp_path / "d.pt"


def options(**changes: Any) -> EvaluateOptions:
    quick: dict[str, Any] = {"protocol": "soft", "teachers": ("convnet2_w8",), "sets": ("teacher.epochs=2",)}
    return EvaluateOptions(**{**quick, "seeds": 1, "epochs": 2, **changes})


def test_the_command_says_what_its_teacher_is_worth(distilled: Path) -> None:
    answer = scoring.evaluate(distilled, options(archs=("convnet2_w8", "convnet2_w16")), device=CPU)

    assert set(answer["teacher"]) == {"arch", "accuracy"}
    assert answer["teacher"]["arch"] == "convnet2_w8"
    assert 0.15 < answer["teacher"]["accuracy"] <= 1
    assert [one["arch"] for one in answer["results"]] == ["convnet2_w8", "convnet2_w16"]
    averaged = scoring.evaluate(distilled, options(teachers=("convnet2_w8",) * 2, split="val"), device=CPU)
    assert len(averaged["teacher"]["each"]) == 2
    assert averaged["split"] == "val"


def test_stitched_sets_are_trained_on_with_shuffled_patches(
    distilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "ddray.evaluation.soft.shuffle_strips", lambda images, num, generator: seen.append(num) or images
    )
    scoring.evaluate(distilled, options(), device=CPU)
    scoring.evaluate(distilled, options(sets=("teacher.epochs=2", "patches=1")), device=CPU)

    assert set(seen[: len(seen) // 2]) == {2}
    assert set(seen[len(seen) // 2 :]) == {1}


def test_table_5_is_a_recipe_of_hard_labels(distilled: Path) -> None:
    answer = scoring.evaluate(
        distilled, options(protocol="hard", recipe="table5", teachers=(), sets=()), device=CPU
    )

    assert "teacher" not in answer
    assert len(answer["results"][0]["per_seed"]) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": "hard"}, "--teacher must be left out, or used with --protocol soft"),
        ({"augment": "dsa"}, "--augment must be left out here"),
        ({"recipe": "table5"}, "recipe of --protocol soft must be one of paper, repo, got 'table5'"),
        ({"sets": ("temprature=3",)}, "unknown option 'temprature'; did you mean 'temperature'"),
        ({"teachers": ("resnet19",)}, "did you mean 'resnet18'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    distilled: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        scoring.evaluate(distilled, options(**changes), device=CPU)
