"""DATM's initial set: real images that experts classify correctly, and these experts' mean logits as labels.

Images of a class are taken in a random order: those that the first expert gets right, then those of the
second, and so on. An image's label is the mean of the logits of ALL experts that get it right (last
snapshots, eval mode, no augmentation).

**Deviations** (authors' code | ours): a class with fewer right images than ipc: its loop never ends | other
real images follow, then copies under a little noise; an image that no expert gets right: 0 / 0 | the mean of
all experts' logits, with the class's and the largest one swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddray.distillation.method import DistillContext
from ddray.methods.families.matching.initial import parted_copies
from ddray.pool.spec import PoolEntry
from ddray.pool.trajectories import trained_expert
from ddray.training.embedding import outputs

LogitsOf = Callable[[Tensor], Tensor]
"""An expert: maps rows of the split, int64 [n], to logits [n, K] on the CPU."""


def first_right(
    experts: Sequence[LogitsOf], labels: Tensor, ipc: int, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Return rows of the split, int64 [K * ipc], sorted by class, and which are copies of earlier ones.

    Args:
        experts: are called one by one, on images of classes that still lack right ones.
        labels: of the split, int64 [N]; every class has an image.
        ipc: images per class.
        order: a permutation of the N rows.
    """
    num, counts = len(labels), torch.bincount(labels)
    position = torch.empty_like(order)
    position[order] = torch.arange(num)
    key = position + len(experts) * num  # by the first expert that is right, then by position
    for number, expert in enumerate(experts):
        is_right = torch.bincount(labels[key < len(experts) * num], minlength=len(counts))
        rows = torch.nonzero(
            (is_right < counts.clamp(max=ipc))[labels] & (key >= len(experts) * num)
        ).flatten()
        if len(rows) == 0:
            break
        right = rows[expert(rows).argmax(1) == labels[rows]]
        key[right] = position[right] + number * num
    by_class = torch.argsort(labels * (len(experts) + 1) * num + key)
    columns = torch.arange(ipc)
    places = (counts.cumsum(0) - counts)[:, None] + columns % counts[:, None]
    return by_class[places.flatten()], (columns >= counts[:, None]).flatten()


def mean_right_logits(experts: Sequence[LogitsOf], rows: Tensor, labels: Tensor) -> Tensor:
    """Return the mean logits [n, K] of the experts that get an image right, for rows [n] with labels [n]."""
    total, right_total, num_right = torch.zeros(()), torch.zeros(()), torch.zeros(len(rows))
    for expert in experts:
        logits = expert(rows)
        right = (logits.argmax(1) == labels).to(logits.dtype)
        total = total + logits
        right_total, num_right = right_total + right[:, None] * logits, num_right + right
    means = right_total / num_right.clamp(min=1)[:, None]
    overall = total / len(experts)
    index = torch.arange(len(rows))
    largest = overall.argmax(1)
    swapped = overall.clone()
    swapped[index, largest], swapped[index, labels] = overall[index, labels], overall[index, largest]
    return torch.where(num_right[:, None] > 0, means, swapped)


def right_images(ctx: DistillContext, entries: Sequence[PoolEntry]) -> tuple[Tensor, Tensor, Tensor]:
    """Return images [K * ipc, C, H, W] in the context's space, their classes, and logits [K * ipc, K]."""
    experts = expert_logits(ctx, entries)
    labels = ctx.split.labels
    order = torch.randperm(len(labels), generator=ctx.generator("right images"))
    rows, is_copy = first_right(experts, labels, ctx.ipc, order)
    logits = mean_right_logits(experts, rows, labels[rows])
    images = parted_copies(ctx, ctx.space.encode(ctx.split.images[rows]), is_copy)
    return images, labels[rows], logits


def expert_logits(ctx: DistillContext, entries: Sequence[PoolEntry]) -> list[LogitsOf]:
    """Return the experts after their last epoch; each is built when it is called, as they may be many."""

    def expert_of(entry: PoolEntry) -> LogitsOf:
        def logits_of(rows: Tensor) -> Tensor:
            net, space = trained_expert(entry, ctx.device), ctx.space.to(ctx.device)
            parts = outputs(net, ctx.split.images[rows], space.encode, ctx.device)
            return torch.cat([part.float().cpu() for part in parts])

        return logits_of

    return [expert_of(entry) for entry in entries]
