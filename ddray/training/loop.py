"""Training a network on a small or real set: the one loop behind the `hard` protocol and the pool's networks.

Data stays on the device, augmentation runs there, and nothing syncs per step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import PixelSpace, Split
from ddray.nets import Net, training_format
from ddray.training.cutmix import cutmix
from ddray.training.policies import Augmenter
from ddray.training.recipe import Recipe

"""Whole recipes by name: `vico` of DC, DSA, DM and their kin; `idc` of IDC and DSDM (DSDM's 1,500 epochs)."""


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
    optimizer = _sgd(net, recipe, recipe.lr)
    loss = torch.zeros((), device=images.device)
    total = recipe.epochs + 1 if recipe.schedule == "vico" else recipe.epochs
    for epoch in range(total):
        if recipe.schedule != "vico":
            optimizer.param_groups[0]["lr"] = recipe.lr * _factor(recipe, epoch)
        order = torch.randperm(len(labels), generator=generator).to(images.device, non_blocking=True)
        loss = torch.zeros((), device=images.device)
        for index in torch.split(order, recipe.batch):
            batch = images[index]
            if augment is not None:
                batch = augment(batch, generator)
            step_loss = _loss(net, batch, labels[index], recipe.cutmix, generator)
            optimizer.zero_grad(set_to_none=True)
            step_loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss += step_loss.detach() * len(index)
        if on_epoch is not None:
            on_epoch(loss / len(labels))
        if recipe.schedule == "vico" and epoch == recipe.epochs // 2 + 1:
            # The peers re-create the optimiser here, which also resets the momentum.
            optimizer = _sgd(net, recipe, recipe.lr * 0.1)
    net.to(memory_format=torch.channels_last).eval()
    return float(loss / len(labels))


def _loss(net: Net, batch: Tensor, labels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return the cross entropy, after CutMix with `probability`; for float targets the mean squared error."""
    if labels.is_floating_point():
        return F.mse_loss(net(batch), labels)
    mixed = cutmix(batch, probability, generator) if probability > 0 else None
    if mixed is None:
        return F.cross_entropy(net(batch), labels)
    logits = net(mixed.images)
    own_loss, partner_loss = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[mixed.partner])
    return mixed.share * own_loss + (1 - mixed.share) * partner_loss


def _sgd(net: Net, recipe: Recipe, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        net.parameters(), lr=lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


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
