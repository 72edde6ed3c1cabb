"""Stratified subsets: of a set to train on (--train-limit), and random real images at a set's storage."""

import torch
from torch import Tensor

from ddray.artifact.distilled_set import TrainSet
from ddray.data import PixelSpace, Split
from ddray.errors import InputError
from ddray.evaluation.options import EvaluateOptions
from ddray.seeding import derive


def class_ranks(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the rank of each of `labels` [N] in a random order of its class, counted from 0, int64 [N]."""
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return ranks


def limited(train_set: TrainSet, limit: int, generator: torch.Generator) -> TrainSet:
    """Return at most `limit` images of a set, every class in proportion; the order is preserved.

    A class gives its share of the limit, rounded up or down by the largest remainders; the CPU generator of
    the draw decides between equal ones.

    Raises:
        InputError: `limit` is below 1.
    """
    if limit < 1:
        raise InputError(f"--train-limit must be >= 1, got {limit}")
    labels = train_set.labels
    if limit >= len(labels):
        return train_set
    counts, ranks = torch.bincount(labels), class_ranks(labels, generator)
    quotas, rests = counts * limit // len(labels), counts * limit % len(labels)
    # The largest rests get one image more, equal ones in random order.
    shuffled = torch.randperm(len(labels), generator=generator)
    further = shuffled[(ranks == quotas[labels])[shuffled]]
    further = further[torch.argsort(rests[labels[further]], descending=True, stable=True)]
    first = torch.cat([torch.nonzero(ranks < quotas[labels])[:, 0], further[: limit - int(quotas.sum())]])
    return train_set.select(first.sort().values)


def limited_set(train_set: TrainSet, options: EvaluateOptions) -> TrainSet:
    """Return at most `--train-limit` images of a set, every class in proportion."""
    if options.train_limit is None:
        return train_set
    return limited(train_set, options.train_limit, derive(options.seed, "evaluate", "train-limit"))


def random_subset(real: Split, per_class: int, space: PixelSpace, generator: torch.Generator) -> TrainSet:
    """Return random real images in a pixel space; a class with fewer than `per_class` gives all it has."""
    subset = real.select(torch.nonzero(class_ranks(real.labels, generator) < per_class)[:, 0])
    return TrainSet(space.encode(subset.images), subset.labels)
