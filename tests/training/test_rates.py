"""The rate of every step, with a warm-up, and training by Adam on values (FRePo's scoring)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ddray.seeding import derive
from ddray.training.loop import train, train_together
from ddray.training.rates import phases, step_rate, warm_cosine
from ddray.training.recipe import Recipe


def rates_of(recipe: Recipe, epoch: int) -> list[float]:
    """Every step's rate, of epochs of `epoch` steps."""
    (of_epochs,) = phases(recipe)
    rate = step_rate(recipe, of_epochs, 0, epoch)
    return [rate(step) for step in range(recipe.epochs * epoch)]


def scheduled(scheduler: Callable[[Any], Any], num: int) -> list[float]:
    """Return the rates of `num` steps by a scheduler of PyTorch's, from .2."""
    optimizer, rates = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2), []
    schedule = scheduler(optimizer)
    for _ in range(num):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_a_warm_cosine_is_pytorchs_schedulers_one_after_the_other() -> None:
    schedulers = torch.optim.lr_scheduler
    rise = scheduled(lambda opt: schedulers.LinearLR(opt, start_factor=1 / 6, total_iters=5), 6)
    fall = scheduled(lambda opt: schedulers.CosineAnnealingLR(opt, T_max=14, eta_min=0.002), 14)
    expected = [*rise, *fall]
    recipe = Recipe(epochs=5, lr=0.2, schedule="cosine", warmup=6)
    assert rates_of(recipe, 4) == pytest.approx(expected, rel=1e-9)
    assert warm_cosine(20, 6, 20) == pytest.approx(0.01)
    assert [warm_cosine(step, 6, 4) for step in range(4)] == [1 / 6, 2 / 6, 3 / 6, 4 / 6]


def test_a_warm_up_scales_the_first_steps_of_other_schedules() -> None:
    recipe = Recipe(epochs=6, lr=0.5, schedule="multistep", warmup=5)
    plain = [0.5] * 8 + [0.1] * 2 + [0.02] * 2
    warm = [rate * min(1, (step + 1) / 5) for step, rate in enumerate(plain)]
    assert rates_of(recipe, 2) == pytest.approx(warm)
    assert rates_of(recipe.model_copy(update={"warmup": 0}), 2) == pytest.approx(plain)


def test_the_rates_of_the_epochs_that_are_left_are_those_of_the_whole() -> None:
    recipe = Recipe(epochs=6, lr=0.5, schedule="cosine", warmup=5)
    whole = rates_of(recipe, 2)
    (of_epochs,) = phases(recipe)
    for done in range(6):
        rate = step_rate(recipe, of_epochs[done:], done, 2)
        assert [rate(step) for step in range(12 - 2 * done)] == whole[2 * done :]


def linear() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()


def test_training_on_values_by_adam_is_by_hand() -> None:
    """m, v and their corrections as Kingma and Ba write them; mean square over images and classes."""
    images = torch.randn(6, 1, 2, 2, generator=derive(1), dtype=torch.float64)
    values = torch.randn(6, 3, generator=derive(2), dtype=torch.float64)
    recipe = Recipe(
        epochs=3, lr=0.1, weight_decay=0, batch=4, schedule="cosine", optimizer="adam", warmup=2, cutmix=1
    )
    ours, reference = linear(), linear()

    loss = train(ours, images, values, recipe, generator=derive(4), augment=None, regress=True)

    weights = list(reference.parameters())
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    generator, step, last = derive(4), 0, 0.0
    for _ in range(3):
        last = 0.0
        for index in torch.randperm(6, generator=generator).split(4):
            share = max(0, step - 2) / 4
            rate = (
                0.1 * (step + 1) / 2
                if step < 2
                else 0.1 * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
            )
            error = (reference(images[index]) - values[index]).square().mean()
            step += 1
            for weight, m, v, gradient in zip(
                weights, first, second, torch.autograd.grad(error, weights), strict=True
            ):
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                weight.data -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            last += float(error.detach()) * len(index) / 6
    assert float(loss) == pytest.approx(last, rel=1e-6)  # a float32
    for actual, expected in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_networks_that_are_trained_together_regress_too() -> None:
    images, values = torch.randn(6, 1, 2, 2, generator=derive(1)), torch.randn(6, 3, generator=derive(2))
    recipe = Recipe(epochs=2, batch=4)
    alone, together = (linear().float() for _ in range(2))
    train(alone, images, values, recipe, generator=derive(4), augment=None, regress=True)
    generators = [derive(4)]
    train_together([together], images, values, recipe, generators=generators, augment=None, regress=True)
    assert torch.equal(alone[1].weight, together[1].weight)
    assert not torch.equal(alone[1].weight, linear().float()[1].weight)


def test_recipes_of_before_have_the_same_dump() -> None:
    assert {"optimizer", "warmup"}.isdisjoint(Recipe().dump())
    assert Recipe(optimizer="adam", warmup=3).dump()["warmup"] == 3
