"""The learning rate of every step of a training by a recipe."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch

from ddray.training.recipe import Recipe

_LAST: Final = 0.01  # where FRePo's cosine ends, as a share of the rate


def phases(recipe: Recipe) -> list[list[float]]:
    """Return the rate of every epoch, in phases: a phase has an optimiser of its own, so fresh momentum."""
    if recipe.schedule == "vico":  # the peers re-create the optimiser after epoch E // 2 + 1 of E + 1
        first = min(recipe.epochs // 2 + 2, recipe.epochs + 1)
        all_phases = [recipe.lr] * first, [recipe.lr * 0.1] * (recipe.epochs + 1 - first)
        return [rates for rates in all_phases if rates]
    return [[recipe.lr * _factor(recipe, epoch) for epoch in range(recipe.epochs)]]


def _factor(recipe: Recipe, epoch: int) -> float:
    """Return the schedule's factor on lr in an epoch counted from 0."""
    if recipe.schedule == "step15":
        return float(0.5 ** (epoch // 15))
    if recipe.schedule == "multistep":
        return float(0.2 ** sum(epoch >= recipe.epochs * sixths // 6 for sixths in (4, 5)))
    if recipe.schedule == "cosine":
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * epoch / recipe.epochs))))
    return 1.0


def step_rate(recipe: Recipe, rates: Sequence[float], done: int, epoch: int) -> Callable[[int], float]:
    """Return the rate of a step, counted from 0, of a phase whose epochs have `rates`.

    Args:
        recipe: schedule and warm-up.
        rates: of the phase's epochs, or of those that are left of it.
        done: epochs of the training before these.
        epoch: steps of an epoch.
    """
    if recipe.warmup == 0:
        return lambda step: rates[step // epoch]
    first = done * epoch

    def rate(step: int) -> float:
        if recipe.schedule == "cosine":
            return recipe.lr * warm_cosine(first + step, recipe.warmup, recipe.epochs * epoch)
        return rates[step // epoch] * min(1.0, (first + step + 1) / recipe.warmup)

    return rate


def warm_cosine(step: int, warmup: int, num_steps: int) -> float:
    """Return FRePo's factor on the rate: linear to 1 over `warmup` steps, then a cosine to .01 at the end.

    `step` counts from 0; a training of at most `warmup` steps only rises.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * share))
