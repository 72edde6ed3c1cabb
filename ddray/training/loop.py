"""Training a network by a recipe: what the `hard` protocol, the pool and methods' inner loops do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import PixelSpace, Split
from ddray.nets import Net, training_format
from ddray.training.cutmix import cutmix, mixed_cross_entropy
from ddray.training.engine import Batch, Order, Rule, Step, run
from ddray.training.policies import Augmenter
from ddray.training.recipe import Recipe


def train(
    net: Net,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    augment: Augmenter | None,
    on_epoch: Callable[[Tensor], None] | None = None,
) -> float:
    """Train `net` in place and leave it in eval mode.

    Args:
        net: the network, on the images' device.
        images: float32 [N, C, H, W] in their pixel space.
        labels: int64 [N], or float32 [N, D]: targets of the outputs, under the mean squared error.
        recipe: epochs, rates, batch, schedule.
        generator: CPU generator of the batches' order and the augmentation.
        augment: applied to every batch, before CutMix; None leaves it as it is.
        on_epoch: called with each epoch's mean loss, a scalar on the device.

    Returns:
        The mean loss of the last epoch.
    """
    form = training_format(net, images.device)
    images = images.contiguous(memory_format=form)
    net.to(memory_format=form).train()
    soft = labels.is_floating_point()
    optimizer = partial(torch.optim.SGD, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    rule = Rule(F.mse_loss if soft else mixed_cross_entropy, optimizer)
    order = Order(len(labels), recipe.batch)
    epoch = len(order.sizes)
    losses: list[Tensor] = []

    def batch(index: Tensor) -> Batch:
        inputs = images[index]
        if augment is not None:
            inputs = augment(inputs, generator)
        mixed = cutmix(inputs, recipe.cutmix, generator) if recipe.cutmix > 0 and not soft else None
        return (inputs, labels[index]) if mixed is None else (mixed.images, *mixed.targets(labels[index]))

    def end(loss: Tensor) -> None:
        losses[:] = [loss]
        if on_epoch is not None:
            on_epoch(loss)

    for rates in _phases(recipe):
        run(
            Step([net], rule, num_steps=len(rates) * epoch),
            map(batch, order.indices(generator, images.device)),
            lr=lambda step, rates=rates: rates[step // epoch],  # type: ignore[misc]
            epoch=epoch,
            on_epoch=end,
        )
    net.to(memory_format=torch.channels_last).eval()
    return float(losses[0])


def _phases(recipe: Recipe) -> list[list[float]]:
    """Return the rate of every epoch, in phases: a phase has an optimiser of its own, so fresh momentum."""
    if recipe.schedule == "vico":  # the peers re-create the optimiser after epoch E // 2 + 1 of E + 1
        first = min(recipe.epochs // 2 + 2, recipe.epochs + 1)
        return [[recipe.lr] * first, [recipe.lr * 0.1] * (recipe.epochs + 1 - first)]
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


@torch.no_grad()
def accuracy(
    net: Net, split: Split, space: PixelSpace, *, device: torch.device, chunk: int | None = None
) -> float:
    """Return the fraction of a split that `net` (in eval mode) classifies correctly.

    Args:
        net: the network, on `device`.
        split: real images, uint8 [N, C, H, W].
        space: the pixel space the network was trained in.
        device: where to compute.
        chunk: images at once; default 32 on a CPU (they fit the cache there), 1,024 on a GPU.
    """
    chunk = chunk or (32 if device.type == "cpu" else 1024)
    space = space.to(device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(split), chunk):
        images = space.encode(split.images[start : start + chunk].to(device, non_blocking=True))
        labels = split.labels[start : start + chunk].to(device, non_blocking=True)
        logits = net(images.contiguous(memory_format=torch.channels_last))
        right += (logits.argmax(1) == labels).sum()
    return float(right) / len(split)
