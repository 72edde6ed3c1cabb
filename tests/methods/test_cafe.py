"""CAFE: its loss by hand, and when its loops end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.methods.cafe import Accuracies, cafe_loss

SETTINGS = {"batch_real": 4, "batch_query": 3, "window": 3, "max_inner": 5, "max_outer": 6}


@pytest.mark.parametrize("num_maps", [1, 3])
def test_the_loss_is_alignment_plus_discrimination(num_maps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5 + i) for i in range(num_maps)] + [(2, 4)]
    real, synthetic = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)
    )
    embedded = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    labels = [0, 1, 1]

    loss = cafe_loss(real, synthetic, embedded, torch.tensor(labels), early_weight=0.3, discrimination=0.7)

    expected = 0.0
    for layer, (a, b) in enumerate(zip(real, synthetic, strict=True)):
        weight = 2.0 if layer == num_maps else 1.0 if layer == num_maps - 1 else 0.3
        expected += weight * sum(
            (x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
        )
    for row, label in zip(embedded.tolist(), labels, strict=True):
        scores = [sum(x * y for x, y in zip(row, mean, strict=True)) for mean in synthetic[-1].tolist()]
        expected += 0.7 * (math.log(sum(map(math.exp, scores))) - scores[label])
    assert float(loss) == pytest.approx(expected, rel=1e-10)


def test_a_first_step_is_the_loss_of_all_images_at_once(toy: Any, planned: Any) -> None:
    """Chunks, sums and class means against one pass in float64."""
    from ddray.methods.families.matching.batches import ClassBatches
    from ddray.nets import build_net
    from ddray.seeding import derive_seed

    settings = {**SETTINGS, "lr_img": 0.5, "max_outer": 1}
    _, ctx, distiller = planned("cafe", toy(), ipc=2, seed=3, steps=1, method=settings)
    distiller.setup(ctx)
    start = distiller.snapshot().images

    loss = float(distiller.step()["loss"])

    net = build_net(ctx.arch, (3, 16, 16), 3, seed=derive_seed(3, "distill", "net", 1)).double()
    index = ClassBatches(ctx, 4).draw(ctx.generator("step", 1))
    live = start.double().requires_grad_(True)
    statistics, embedded = [], None
    for images, per in ((ctx.space.encode(ctx.split.images[index]).double(), 4), (live, 2)):
        _, embedding, maps = net.features(images)
        embedded = embedding.detach() if embedded is None else embedded
        values = [*(m.flatten(1) for m in maps), embedding]
        statistics.append([torch.stack([part.mean(0) for part in v.split(per)]) for v in values])
    labels = torch.arange(3).repeat_interleave(4)
    expected = cafe_loss(
        [v.detach() for v in statistics[0]],
        statistics[1],
        embedded,
        labels,
        early_weight=0.1,
        discrimination=0.01,
    )
    (gradient,) = torch.autograd.grad(expected, live)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    moved = start.double() - distiller.snapshot().images.double()
    assert float((moved - 0.5 * gradient).norm() / (0.5 * gradient).norm()) < 2e-3


def loops(distiller: Any, accuracies: list[float], steps: int) -> list[tuple[int, int]]:
    """After each step: networks created so far, and how often the accuracy was measured in that step."""
    calls: list[int] = []
    remaining = iter(accuracies)

    def num_right(generator: torch.Generator) -> Tensor:
        calls.append(1)
        return torch.tensor(next(remaining, 0.5) * distiller._engine._accuracies.num)

    distiller._engine._num_right = num_right
    counts = []
    for _ in range(steps):
        calls.clear()
        distiller.step()
        counts.append((distiller._engine._num_nets, len(calls)))
    return counts


def test_a_network_that_has_settled_is_given_up(toy: Any, planned: Any) -> None:
    _, ctx, distiller = planned("cafe", toy(), steps=9, method={**SETTINGS, "inner_gap": 0.0, "max_inner": 1})
    distiller.setup(ctx)

    # an outer and an inner measurement per step; the third outer one drops a network that stands still
    assert loops(distiller, [], 7) == [(1, 2), (1, 2), (1, 1), (2, 2), (2, 2), (2, 1), (3, 2)]


def test_a_network_that_moves_serves_until_the_limit(toy: Any, planned: Any) -> None:
    _, ctx, distiller = planned("cafe", toy(), steps=9, method={**SETTINGS, "inner_gap": 0.0, "max_inner": 1})
    distiller.setup(ctx)
    moving = [value for pair in zip([0.0, 0.5] * 8, [0.2] * 16, strict=True) for value in pair]

    assert [num_nets for num_nets, _ in loops(distiller, moving, 7)] == [1] * 6 + [2]


def test_its_training_pauses_when_the_accuracy_has_moved(toy: Any, planned: Any) -> None:
    _, ctx, distiller = planned("cafe", toy(), steps=9, method={**SETTINGS, "inner_gap": 0.1})
    distiller.setup(ctx)

    # one outer measurement, then inner ones: three that stand still, a jump at the fourth
    assert loops(distiller, [0.3, 0.3, 0.3, 0.3, 0.6], 1) == [(1, 5)]
    assert loops(distiller, [0.3] * 9, 1) == [(1, 6)]  # never a jump: five epochs are the limit


def test_the_rate_is_halved_three_times(toy: Any, planned: Any) -> None:
    _, ctx, distiller = planned("cafe", toy(), steps=10, method={**SETTINGS, "lr_img": 0.8, "max_outer": 1})
    distiller.setup(ctx)
    rates = []
    for _ in range(10):
        distiller.step()
        rates.append(distiller._engine._optimizer.param_groups[0]["lr"])

    assert rates == pytest.approx([0.8] * 6 + [0.4] * 2 + [0.2, 0.1])


def test_accuracies_are_those_of_the_window_and_survive_a_state() -> None:
    accuracies = Accuracies(window=3, num=10)
    for num_right in (2, 9, 4, 5):
        accuracies.add(torch.tensor(float(num_right)))
    assert accuracies.values() == [0.9, 0.4, 0.5]
    assert accuracies.spread(math.inf) == 0.5
    other = Accuracies(window=3, num=10)
    other.load(accuracies.values()[1:])
    assert other.spread(math.inf) == math.inf
    other.add(torch.tensor(7.0))
    assert other.values() == [0.4, 0.5, 0.7]
