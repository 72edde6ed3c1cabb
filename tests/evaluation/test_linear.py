"""Protocol linear: pre-training, probe and fine-tuning against plain loops; other shapes and channels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.distilled_set import TrainSet
from ddray.data import Split, normalized_space
from ddray.errors import DivergedError, InputError
from ddray.evaluation import linear
from ddray.evaluation.linear import Linear, adapted, embeddings, train_probe
from ddray.evaluation.protocol import EvalContext, evaluate_archs
from ddray.nets import build_net
from ddray.training.recipe import FinetuneConfig, ProbeConfig, Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=80, lr=0.05, batch=8, schedule="constant", augment="none", weight_decay=0.0)
PROBE = ProbeConfig(steps=60, lr=0.1, batch=16)


@pytest.fixture
def context(toy: Any) -> EvalContext:
    """Classes that differ in brightness, so that any features tell them apart."""
    dataset = toy((30, 30, 30))
    split = dataset.train()
    bright = (split.images // 4 + (split.labels * 80).to(torch.uint8)[:, None, None, None]).to(torch.uint8)
    lit = replace(
        dataset, load_train=lambda: Split(bright, split.labels), load_test=lambda: Split(bright, split.labels)
    )
    return EvalContext(lit, lit.test(), normalized_space(lit), CPU)


def pairs(ctx: EvalContext, num: int = 16, dim: int = 6) -> TrainSet:
    generator = torch.Generator().manual_seed(0)
    images = ctx.space.encode(ctx.split.images[:num])
    return TrainSet(images, torch.zeros(0, dtype=torch.int64), torch.randn(num, dim, generator=generator))


def protocol(ctx: EvalContext, recipe: Recipe = RECIPE, **settings: Any) -> Linear:
    return Linear(recipe, PROBE, real=ctx.dataset.train(), can_flip=True, **settings)


def test_pretraining_regresses_to_the_targets_and_the_probe_scores(context: EvalContext) -> None:
    result = protocol(context).evaluate(pairs(context), context, arch="convnet2_w8_bn", seed=0)

    assert result.num_images == 16
    assert result.measures["pretrain_loss_last"] < 0.5 * result.measures["pretrain_loss_first"]
    assert result.accuracy > 0.9
    again = protocol(context).evaluate(pairs(context), context, arch="convnet2_w8_bn", seed=0)
    assert (again.accuracy, again.measures) == (result.accuracy, result.measures)
    other = protocol(context).evaluate(pairs(context), context, arch="convnet2_w8_bn", seed=1)
    assert other.measures != result.measures


def test_the_first_loss_is_the_mean_squared_error_of_the_fresh_network(context: EvalContext) -> None:
    """One batch: the first epoch's mean loss is that before any step."""
    from ddray.seeding import derive_seed

    train_set = pairs(context)
    recipe = RECIPE.model_copy(update={"epochs": 1, "batch": 64})
    result = protocol(context, recipe).evaluate(train_set, context, arch="convnet2_w8", seed=3)
    net = build_net("convnet2_w8", (3, 16, 16), 6, seed=derive_seed(3, "evaluate", "net"))
    assert train_set.targets is not None
    with torch.no_grad():
        expected = float((net.train()(train_set.images) - train_set.targets).square().mean())
    assert result.measures["pretrain_loss_first"] == pytest.approx(expected, rel=1e-5)


def test_a_labelled_set_is_pretrained_by_cross_entropy(context: EvalContext) -> None:
    split = context.split
    train_set = TrainSet(context.space.encode(split.images[:12]), split.labels[:12])
    result = protocol(context).evaluate(train_set, context, arch="convnet2_w8", seed=0)
    assert result.measures["pretrain_loss_first"] == pytest.approx(math.log(3), abs=0.5)
    assert result.accuracy > 0.9


def test_results_carry_both_losses(context: EvalContext) -> None:
    (row,) = evaluate_archs(protocol(context), pairs(context), context, archs=["convnet2_w8"], num_seeds=2)
    assert row["pretrain_loss_last"] < row["pretrain_loss_first"]
    assert len(row["per_seed"]) == 2


def test_the_backbone_is_frozen_and_seen_without_augmentation(
    context: EvalContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(features: Tensor, labels: Tensor, *rest: Any) -> Any:
        seen.append((features, labels))
        assert not features.requires_grad
        return train_probe(features, labels, *rest)

    monkeypatch.setattr(linear, "train_probe", look)
    instance = protocol(context)
    net, _, _ = instance._pretrained(pairs(context), context, "convnet2_w8_bn", 0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    instance._probed(net, context, 0)

    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    (features, labels), real = seen[0], context.dataset.train()
    with torch.no_grad():
        torch.testing.assert_close(
            features, net.embed(context.space.encode(real.images)), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(labels, real.labels)


def test_features_are_extracted_once_per_backbone(context: EvalContext) -> None:
    """The probe's 60 steps of 16 run on features from one pass over the target."""
    instance = protocol(context)
    net, _, _ = instance._pretrained(pairs(context), context, "convnet2_w8_bn", 0)
    seen: list[Tensor] = []
    hook = net.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    instance._probed(net, context, 0)
    hook.remove()

    real = len(context.dataset.train())
    assert sum(map(len, seen)) == real + len(context.split)
    passed = torch.cat(seen)
    expected = context.space.encode(context.dataset.train().images)
    torch.testing.assert_close(passed[:real], expected, rtol=1e-5, atol=1e-5)


def test_the_probe_is_sgd_with_a_cosine_on_cached_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = (
        torch.randn(20, 5, generator=generator),
        torch.randint(0, 3, (20,), generator=generator),
    )
    config = ProbeConfig(steps=7, lr=0.3, momentum=0.9, batch=8)

    classifier = train_probe(features, labels, 3, config, torch.Generator().manual_seed(9))

    replay = torch.Generator().manual_seed(9)
    torch.manual_seed(int(torch.randint(2**62, (), generator=replay)))
    plain = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    order = [*torch.randperm(20, generator=replay).split(8), *torch.randperm(20, generator=replay).split(8)]
    order += list(torch.randperm(20, generator=replay).split(8))
    for index in order[:7]:
        optimizer.zero_grad()
        F.cross_entropy(plain(features[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(classifier.weight, plain.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(classifier.bias, plain.bias, rtol=1e-4, atol=1e-6)


def test_target_images_take_the_sets_shape() -> None:
    grey = torch.full((2, 1, 28, 28), 100, dtype=torch.uint8)
    assert torch.allclose(adapted(grey, (3, 16, 16)), torch.full((2, 3, 16, 16), 100 / 255))
    colour = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    colour[:, 1] = 255
    assert torch.allclose(adapted(colour, (1, 8, 8)), torch.tensor(0.587))
    same = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(adapted(same, (3, 8, 8)), same.float() / 255)


def test_source_and_target_may_differ_in_shape_channels_and_classes(context: EvalContext) -> None:
    """Pairs of colour images at 16 px, probed on grey ones at 28."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(5).repeat(12)
    dark = torch.randint(0, 40, (60, 1, 28, 28), generator=generator) + 40 * labels[:, None, None, None]
    target = Split(dark.to(torch.uint8), labels)
    grey = replace(
        context.dataset,
        class_names=tuple("abcde"),
        image_shape=(1, 28, 28),
        load_train=lambda: target,
        load_test=lambda: target,
    )
    ctx = EvalContext(grey, grey.test(), context.space, CPU)
    result = Linear(RECIPE, PROBE, real=target, can_flip=True).evaluate(
        pairs(context), ctx, arch="convnet2_w8_bn", seed=0
    )
    assert result.accuracy > 0.6


@pytest.mark.parametrize("arch", ["convnet3", "vgg11", "resnet18", "alexnet", "mobilenet_v2", "vit_tiny"])
def test_every_backbone_of_the_papers_tables_is_probed(arch: str, context: EvalContext) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 1, "batch": 8})
    small = Split(context.split.images[:9], context.split.labels[:9])
    ctx = EvalContext(context.dataset, small, context.space, CPU)
    result = Linear(recipe, ProbeConfig(steps=2), real=small, can_flip=True).evaluate(
        pairs(ctx, 8), ctx, arch=arch, seed=0
    )
    assert result.arch == arch
    assert 0 <= result.accuracy <= 1


def test_finetuning_trains_the_whole_network_with_a_new_last_layer(context: EvalContext) -> None:
    config = FinetuneConfig(steps=25, lr=0.02, batch=16)
    result = protocol(context, finetune=config).evaluate(
        pairs(context), context, arch="convnet2_w8_bn", seed=0
    )
    assert result.accuracy > 0.8


def test_finetuning_starts_from_the_pretrained_body(context: EvalContext) -> None:
    """A step of almost no length leaves the pre-trained body as it was; the last layer is the target's."""
    instance = protocol(context)
    net, _, _ = instance._pretrained(pairs(context), context, "convnet2_w8", 0)
    networks: list[Any] = []
    real_build = linear.build_net

    def build(*args: Any, **options: Any) -> Any:
        networks.append(real_build(*args, **options))
        return networks[-1]

    linear.build_net = build
    try:
        instance._finetuned(net, context, FinetuneConfig(steps=1, lr=1e-12), 0)
    finally:
        linear.build_net = real_build
    body = {name: value for name, value in net.state_dict().items() if not name.startswith("body.classifier")}
    tuned_weights = networks[0].state_dict()
    assert body
    assert all(torch.allclose(tuned_weights[name], value, atol=1e-6) for name, value in body.items())
    assert tuned_weights["body.classifier.weight"].shape[0] == 3


def test_a_loss_that_is_no_number_is_an_error(context: EvalContext) -> None:
    recipe = RECIPE.model_copy(update={"lr": 1e6})
    with pytest.raises(DivergedError, match="pre-training convnet2_w8 diverged"):
        protocol(context, recipe).evaluate(pairs(context), context, arch="convnet2_w8", seed=0)


def test_embeddings_that_do_not_fit_the_memory_are_refused(
    context: EvalContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "available_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"GiB for 90 embeddings of convnet2_w8, cpu has .*--train-limit"):
        protocol(context).evaluate(pairs(context), context, arch="convnet2_w8", seed=0)


def test_embeddings_of_chunks_are_those_of_the_whole(context: EvalContext) -> None:
    net = build_net("convnet2_w8_bn", (3, 16, 16), 2, seed=0).eval()
    actual = embeddings(net, context.split, context)
    with torch.no_grad():
        expected = net.embed(context.space.encode(context.split.images))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("cifar10", "cifar10", True),
        ("cifar10", "cifar10?can_flip=false", False),
        ("cifar10?image_size=64", "cifar10?can_flip=false", False),
        ("cifar10?can_flip=false", "cifar10?can_flip=true", True),
        ("cifar10?can_flip=false", "cifar100", False),
        ("cifar10", "cifar100?can_flip=false", True),
        ("svhn", "cifar10", False),
        ("/pictures", "/pictures", True),
        ("/pictures", "cifar10", False),
    ],
)
def test_a_set_is_mirrored_in_pre_training_where_its_dataset_allows_it(
    name: str, target: str, expected: bool, toy: Any
) -> None:
    """The target's word counts where it is the set's own dataset, however the two are read."""
    dataset = replace(toy(), name=target, can_flip="can_flip=false" not in target)

    assert linear._can_flip(name, dataset) is expected
