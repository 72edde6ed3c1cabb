from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.distilled_set import TrainSet
from ddray.artifact.reading import load
from ddray.data import normalized_space
from ddray.errors import DdrayError, InputError
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext
from ddray.evaluation.soft import (
    Soft,
    cropper,
    mix,
    mse_gt,
    repeat_updates,
    shuffle_strips,
    soft_config,
    soft_loss,
    training_rule,
)
from ddray.evaluation.soft_recipes import SoftConfig, resolve_settings
from ddray.evaluation.teachers import Teachers, get_teachers
from ddray.jobs import score as scoring
from ddray.jobs.trainers import PoolTrainer
from ddray.nets import build_net
from ddray.pool.local import LocalPool
from ddray.training.embedding import Score
from ddray.training.engine import Step
from ddray.training.recipe import TeacherRecipe

CPU = torch.device("cpu")
SCORE = Score(0.5, (0.5, 0.5, 0.5))


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
    scaled = soft_loss(logits, torch.softmax(teacher / 20, 1), 20.0, 400.0)
    assert float(scaled) == pytest.approx(80 * total, rel=1e-9)


def test_mse_gt_is_over_batch_and_classes_and_takes_an_images_own_label() -> None:
    logits, teacher = torch.randn(2, 5, 7, generator=seeded(), dtype=torch.float64)
    labels = torch.tensor([3, 0, 6, 6, 2])

    loss = mse_gt(logits, teacher, labels, ce_weight=0.15)

    ours, theirs = logits.numpy(), teacher.numpy()
    entropy = np.mean([np.log(np.exp(row).sum()) - row[k] for row, k in zip(ours, labels, strict=True)])
    assert float(loss) == pytest.approx(((ours - theirs) ** 2).sum() / 35 + 0.15 * entropy, rel=1e-12)
    assert float(mse_gt(teacher, teacher, labels, ce_weight=0.0)) == 0


def test_mse_gt_trains_on_the_mixed_images_logits_and_the_unmixed_labels(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy()
    train, space = dataset.train(), normalized_space(dataset)
    nets: list[Any] = [build_net("convnet2_w8_bn", (3, 16, 16), 3, seed=seed).eval() for seed in (8, 9)]
    batches: list[Any] = []

    class Remembered(Step):
        def __call__(self, inputs: Tensor, *targets: Tensor) -> None:
            batches.append((inputs.clone(), *targets))
            super().__call__(inputs, *targets)

    monkeypatch.setattr("ddray.evaluation.soft.Step", Remembered)
    images, labels = space.encode(train.images[:12]), train.labels[:12]
    ctx = EvalContext(dataset, train, space, CPU)
    config = SoftConfig(recipe="gvbsm", epochs=1, batch=12, crop="resized", min_scale=1.0)
    Soft(config, Teachers(nets, space, "x+y", 0.9, [])).evaluate(
        TrainSet(images, labels), ctx, arch="convnet2_w8_bn", seed=4
    )

    ((mixed, logits, targets),) = batches
    torch.testing.assert_close(logits, sum(net(mixed) for net in nets).detach() / 2)
    assert sorted(targets.tolist()) == sorted(labels.tolist())
    # Most of an image's pixels, or all but a partner's box, are those of the image of its label.
    nearest = [(row - images).abs().flatten(1).lt(1e-4).float().mean(1).argmax() for row in mixed]
    assert sum(int(labels[index] == target) for index, target in zip(nearest, targets, strict=True)) >= 6


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


def test_crops_of_a_recipe(toy: Any) -> None:
    """RDED's are of 1/factor to all of the area, at factor 1 the whole image; SRe2L's have a black border."""
    space, images = normalized_space(toy()), torch.rand(300, 3, 16, 16, generator=seeded())

    def crops(flip: bool = False, **options: Any) -> Tensor:
        config = SoftConfig.parse(options)
        settings = resolve_settings(config, arch="convnet2", num_images=300, num_classes=3, size=16)
        return cropper(settings, space, images, flip=flip)(images, seeded(1))

    def seen(ramp: Tensor) -> Tensor:
        """Share of the side that the crops of a ramp over the columns show."""
        return (ramp[:, 0, 0].amax(1) - ramp[:, 0, 0].amin(1)) / 15

    assert torch.allclose(crops(recipe="rded"), images, atol=1e-5)
    images = torch.linspace(0, 1, 16).expand(300, 3, 16, 16).contiguous() * 15
    shares = seen(crops(recipe="rded", patches=2))
    assert (
        float(shares.min()) >= math.sqrt(1 / 2 * 3 / 4) - 2 / 16
    )  # the narrowest half of the area, one pixel
    assert float(shares.mean()) == pytest.approx(math.sqrt(0.75), abs=0.07)
    assert float(seen(crops(recipe="repo")).min()) < 0.35
    padded = crops(recipe="sre2l")
    black = space.encode(torch.zeros(1, 3, 1, 1))
    assert torch.allclose(padded.amin((0, 2, 3)), black.flatten(), atol=1e-6)
    assert (padded == images).all(3).all(2).all(1).float().mean() < 0.1


@pytest.mark.parametrize("recipe", ["paper", "repo", "rded", "sre2l", "table5", "gvbsm"])
def test_weight_decay_is_on_weights_of_two_or_more_axes_or_on_all(recipe: Any) -> None:
    """AdamW at lr .5 without a gradient takes lr x decay of what is decayed, and nothing of the rest."""
    config = SoftConfig(recipe=recipe)
    size = 224 if recipe == "gvbsm" else 32  # where it has a decay of .01
    settings = resolve_settings(config, arch="resnet18", num_images=100, num_classes=10, size=size)
    net = build_net("convnet2_w8_bn", (3, 16, 16), 3, seed=0)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(1.0)
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    step = Step(
        [net], replace(training_rule(settings, hard=True), loss=lambda logits: 0 * logits.sum()), lr=0.5
    )

    step(torch.randn(4, 3, 16, 16, generator=seeded()))

    for name, param in net.named_parameters():
        is_decayed = recipe == "sre2l" or before[name].ndim > 1
        expected = before[name] * (1 - 0.5 * 0.01 if is_decayed else 1)
        torch.testing.assert_close(param.detach(), expected, msg=name)


def test_two_passes_of_a_batch_move_running_averages_as_one_of_ours() -> None:
    net = build_net("convnet2_w8_bn", (3, 16, 16), 3, seed=0).train()
    theirs, images = copy.deepcopy(net), torch.randn(7, 3, 16, 16, generator=seeded()) + 2
    repeat_updates(net, 2)

    for batch in (images, -images):
        theirs(batch)
        assert torch.equal(net(batch), theirs(batch))

    for (name, ours), value in zip(net.named_buffers(), theirs.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(ours, value)


class Double(EvalContext):
    """Networks in float64: Adam makes steps of what rounding leaves of a gradient that should be 0."""

    def fresh_net(self, *arguments: Any, **settings: Any) -> Any:
        return super().fresh_net(*arguments, **settings).double()


def authors_loop(net: Any, label: Any, batches: list[Tensor], settings: Any, epoch: int) -> None:
    """RDED's and D3HR's, or SRe2L's, loop over mixed batches, from their code's description."""
    params = dict(net.named_parameters())
    matrices = [param for name, param in params.items() if name.endswith("weight") and param.dim() > 1]
    others = [param for param in params.values() if all(param is not matrix for matrix in matrices)]
    is_sre2l, epochs = settings.recipe == "sre2l", len(batches) // epoch
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.01 if is_sre2l else 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.001, weight_decay=0.01)
    halves = 1 if is_sre2l else 2
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / epochs / halves))
    )
    temperature = 30 if is_sre2l else 20
    net.train()
    for number, mixed in enumerate(batches, 1):
        if not is_sre2l:
            with torch.no_grad():
                net(mixed)
        optimizer.zero_grad()
        outputs = F.log_softmax(net(mixed) / temperature, 1)
        labels = F.softmax(label(mixed) / temperature, 1)
        torch.nn.KLDivLoss(reduction="batchmean")(outputs, labels).backward()
        optimizer.step()
        if number % epoch == 0:
            rate.step()
    net.eval()


@pytest.mark.parametrize("recipe", ["repo", "rded", "sre2l"])
def test_training_is_that_of_the_authors_code(recipe: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, arch = toy(), "convnet2_w8_bn"
    train, space = dataset.train(), normalized_space(dataset)
    ctx = Double(dataset, train, space, CPU)
    teacher = build_net(arch, (3, 16, 16), 3, seed=9).eval().double()
    batches: list[Tensor] = []
    students: list[Any] = []

    def remembered(*arguments: Any, **settings: Any) -> Any:
        mixed = mix(*arguments, **settings)
        batches.append(mixed.images.clone())
        return mixed

    monkeypatch.setattr("ddray.evaluation.soft.mix", remembered)
    monkeypatch.setattr(
        "ddray.evaluation.protocol.score_net", lambda net, *_, **__: students.append(net) or SCORE
    )
    train_set = TrainSet(space.encode(train.images[:12]).double(), train.labels[:12])
    config = SoftConfig(recipe=recipe, epochs=3, batch=5)
    teachers = Teachers([teacher], space, "x", 0.9, [])
    Soft(config, teachers).evaluate(train_set, ctx, arch=arch, seed=4)

    theirs = ctx.fresh_net(arch, train_set.images, seed=4)
    labeller = copy.deepcopy(teacher).train(recipe == "sre2l")
    authors_loop(theirs, lambda images: labeller(images).detach(), batches, config, epoch=3)
    assert len(batches) == 9
    for (name, ours), value in zip(
        students[0].state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours, value, rtol=1e-6, atol=1e-7, msg=name)


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


def test_a_set_is_trained_on_by_its_methods_recipe(distilled: Path) -> None:
    assert scoring.evaluate(distilled, options(), device=CPU)["recipe"] == "rded"
    assert soft_config(options(recipe="sre2l"), load(distilled)).recipe == "sre2l"
    assert soft_config(options(sets=("recipe=repo",)), load(distilled)).patches == 2
    other = load(distilled)
    other = replace(other, meta=other.meta.model_copy(update={"method": "random"}))
    assert soft_config(options(), other).recipe == "paper"


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
        (
            {"recipe": "table5"},
            "recipe of --protocol soft must be one of d3hr, .*, repo, sre2l, sre2l_cifar, got 'table5'",
        ),
        ({"sets": ("ce_weight=.1",)}, "ce_weight must be left out with loss kl, got 0.1"),
        ({"sets": ("temprature=3",)}, "unknown option 'temprature'; did you mean 'temperature'"),
        ({"teachers": ("resnet19",)}, "did you mean 'resnet18'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    distilled: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        scoring.evaluate(distilled, options(**changes), device=CPU)
