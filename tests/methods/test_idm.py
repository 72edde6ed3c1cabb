"""IDM: its loss by hand, its queue, and one step replayed class by class in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ddray.artifact.partition import Partition, expand
from ddray.distillation.method import Target
from ddray.methods import get_method
from ddray.methods.families.matching.batches import ClassBatches
from ddray.methods.families.matching.idm import idm_loss
from ddray.methods.families.matching.queue import NetQueue
from ddray.nets import build_net
from ddray.seeding import derive_seed
from ddray.system.numerics import applied

IMAGENET = {"batch_real": 128, "batch_train": 128, "push_every": 50, "ce_weight": 3.0}
SETTINGS = {"batch_real": 4, "augment": "none", "net_steps": 2, "batch_train": 6}


def test_the_loss_is_means_and_cross_entropy_summed_over_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    real, synthetic = (torch.randn(2, num, 3, generator=generator).double() for num in (5, 2))
    logits = torch.randn(4, 2, generator=generator).double()

    loss = idm_loss(real, synthetic, logits, torch.tensor([0, 0, 1, 1]), weight=0.7)

    expected = 0.0
    for label in range(2):
        for dim in range(3):
            expected += float(real[label, :, dim].mean() - synthetic[label, :, dim].mean()) ** 2
        rows = logits[2 * label : 2 * label + 2].tolist()
        entropies = [math.log(sum(math.exp(value) for value in row)) - row[label] for row in rows]
        expected += 0.7 * sum(entropies) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_the_queue_keeps_the_youngest(toy: Any, planned: Any) -> None:
    _, ctx, _ = planned("idm", toy(), steps=1)
    queue = NetQueue(ctx, size=3, lr=0.1)
    for _ in range(5):
        queue.push()

    assert len(queue.members) == 3
    for member, net_index in zip(queue.members, (2, 3, 4), strict=True):
        seed = derive_seed(ctx.seed, "distill", "queue", net_index)
        expected = build_net(ctx.arch, ctx.dataset.image_shape, 3, seed=seed)
        assert all(
            torch.equal(a, b) for a, b in zip(member.net.parameters(), expected.parameters(), strict=True)
        )


def test_a_member_counts_its_right_answers_since_the_last_reset(toy: Any, planned: Any) -> None:
    _, ctx, _ = planned("idm", toy(), steps=1)
    queue = NetQueue(ctx, size=2, lr=1e-9)
    queue.push(), queue.push()
    images, labels = ctx.space.encode(ctx.split.images[:10]), ctx.split.labels[:10]
    right = int((queue.members[1].net(images).argmax(1) == labels).sum())

    for _ in range(3):
        queue.train(1, images, labels)

    assert float(queue.members[0].accuracy()) == 0.0
    assert float(queue.members[1].accuracy()) == pytest.approx(right / 10)
    queue.forget_accuracies()
    assert queue.members[1].seen == 0


def test_a_probe_of_the_precision_counts_no_answers(toy: Any, planned: Any) -> None:
    _, ctx, _ = planned("idm", toy(), steps=1)
    images, labels = ctx.space.encode(ctx.split.images[:10]), ctx.split.labels[:10]
    with applied("auto") as numerics:
        queue = NetQueue(ctx, size=1, lr=1e-9)
        queue.push()
        right = int((queue.members[0].net(images).argmax(1) == labels).sum())
        queue.train(0, images, labels)

    assert len(numerics.probed) == 1
    assert float(queue.members[0].right) == pytest.approx(right, abs=1)  # bfloat16 may turn one


def test_a_queue_goes_on_from_its_state(toy: Any, planned: Any) -> None:
    _, ctx, _ = planned("idm", toy(), steps=1, arch="convnet2_w8_bn")
    images, labels = ctx.space.encode(ctx.split.images), ctx.split.labels
    first, second = NetQueue(ctx, size=3, lr=0.1), NetQueue(ctx, size=3, lr=0.1)
    first.push(), first.push()
    first.train(0, images, labels)
    state = first.state_dict()

    second.load_state_dict(state)
    for queue in (first, second):
        queue.train(0, images, labels), queue.train(1, images, labels)
        queue.push()

    assert len(second.members) == 3
    for one, other in zip(first.members, second.members, strict=True):
        assert one.net.state_dict().keys() == other.net.state_dict().keys()
        assert all(
            torch.equal(a, b)
            for a, b in zip(one.net.state_dict().values(), other.net.state_dict().values(), strict=True)
        )
        assert (float(one.right), one.seen) == (float(other.right), other.seen)


def test_steps_are_dms_with_the_queues_networks_and_cross_entropy(toy: Any, planned: Any) -> None:
    """Three steps; before each, the distiller's own queue tells which network it will use."""
    settings = {**SETTINGS, "lr_img": 0.3, "momentum": 0.5, "push_every": 2, "ce_weight": 0.05}
    _, ctx, distiller = planned("idm", toy(), ipc=2, seed=1, steps=3, method=settings)
    distiller.setup(ctx)
    assert len(distiller._engine._queue.members) == 3
    images = distiller.snapshot().images.double()
    velocity = torch.zeros_like(images)
    batches, partition = ClassBatches(ctx, 4), Partition(factor=2)

    for step in range(1, 4):
        generator = ctx.generator("step", step)
        if step % 2 == 1:
            distiller._engine._queue.push()
        index = int(torch.randint(len(distiller._engine._queue.members), (), generator=generator))
        member = distiller._engine._queue.members[index]
        net = build_net(ctx.arch, ctx.dataset.image_shape, 3, seed=0).double()
        net.load_state_dict(member.net.state_dict())
        if step % 2 == 1:  # the step pushes it itself
            distiller._engine._queue.members = distiller._engine._queue.members[:-1]
            distiller._engine._queue._num_pushed -= 1
        accuracy = 0.0 if step == 1 else float(member.accuracy())
        real_index = batches.draw(generator).view(3, -1)
        live = images.clone().requires_grad_(True)
        loss = torch.zeros((), dtype=torch.float64)
        for label in range(3):
            real = net.features(ctx.space.encode(ctx.split.images[real_index[label]]).double()).embedding
            synthetic = net.features(expand(live[2 * label : 2 * label + 2], partition))
            entropy = F.cross_entropy(synthetic.logits, torch.full((8,), label))
            loss = loss + (real.detach().mean(0) - synthetic.embedding.mean(0)).square().sum()
            loss = loss + 0.05 * 100 * accuracy * entropy
        velocity = 0.5 * velocity + torch.autograd.grad(loss, live)[0]
        images = images - 0.3 * velocity

        assert float(distiller.step()["loss"]) == pytest.approx(float(loss.detach()), rel=1e-3)

    torch.testing.assert_close(distiller.snapshot().images.double(), images, rtol=1e-3, atol=1e-3)
    assert len(distiller._engine._queue.members) == 5
    assert distiller.snapshot().meta.ipc_decoded == 8


def test_only_as_many_networks_as_asked_for_are_trained(toy: Any, planned: Any) -> None:
    for num_trained in (0, 1, 9):
        _, ctx, distiller = planned("idm", toy(), steps=1, method={**SETTINGS, "num_trained": num_trained})
        distiller.setup(ctx)
        distiller.step()
        seen = sorted(member.seen for member in distiller._engine._queue.members)
        trained = min(num_trained, 4)
        assert seen == [0] * (4 - trained) + [2 * 6] * trained


@pytest.mark.parametrize(
    ("name", "size", "classes", "ipc", "expected"),
    [
        ("cifar10", 32, 10, 1, {"batch_real": 5000, "push_every": 5}),
        ("cifar10", 32, 10, 10, {}),
        ("cifar10", 32, 10, 50, {"ce_weight": 0.1, "net_steps": 10, "accuracy_window": 500}),
        ("cifar100", 32, 100, 1, {"batch_real": 5000, "push_every": 5}),
        ("cifar100", 32, 100, 10, {"ce_weight": 0.1, "net_steps": 50}),
        ("cifar100", 32, 100, 50, {"ce_weight": 0.1, "net_steps": 10, "accuracy_window": 500}),
        ("tiny_imagenet", 64, 200, 1, {}),
        ("tiny_imagenet", 64, 200, 10, {"accuracy_window": 500}),
        ("tiny_imagenet", 64, 200, 50, {"ce_weight": 0.8, "net_steps": 50, "accuracy_window": 1000}),
        ("imagenette", 128, 10, 1, {**IMAGENET, "queue_size": 50, "accuracy_window": 200}),
        ("imagenette", 128, 10, 10, {**IMAGENET, "queue_size": 50, "accuracy_window": 1000}),
        ("imagenette", 128, 10, 50, {**IMAGENET, "queue_size": 100, "accuracy_window": 500}),
    ],
)
def test_the_preset_is_the_authors_commands(
    name: str, size: int, classes: int, ipc: int, expected: dict[str, Any]
) -> None:
    preset = get_method("idm").preset("paper", Target(name, (3, size, size), classes, ipc))

    assert preset["method"] == expected
    assert preset["steps"] == 20_000
    assert preset["evaluate"] == {"epochs": 1000, "augment": "dsa"}
    defaults = get_method("idm").config_type()
    assert (defaults.lr_img, defaults.momentum, defaults.factor, defaults.queue_size) == (0.2, 0.5, 2, 100)
    assert (defaults.push_every, defaults.num_trained, defaults.net_steps) == (30, 2, 10)
    assert defaults.accuracy_window == 100
