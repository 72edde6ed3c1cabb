"""Small generators for tests: a few steps on a few images."""

from __future__ import annotations

from typing import Any

import torch

from ddray.data import Dataset, Split
from ddray.methods import get_method
from ddray.methods.families.generative.fit import RealImages, Training
from ddray.methods.families.generative.pool import SYSTEMS
from ddray.pool.spec import PoolSpec
from ddray.seeding import forked_global
from ddray.testing import random_dataset

CPU = torch.device("cpu")


def quick_recipe(system: str, **changes: Any) -> Any:
    """Return a system's recipe, with its method's quick settings and some changes."""
    quick = getattr(get_method(system).config_type, "quick", {})
    return SYSTEMS[system].recipe.parse({**quick["generator"], **changes})


def training_of(system: str, dataset: Dataset | None = None, **changes: Any) -> Training:
    """Return a system's training on a dataset, by default 24 random images of three classes."""
    dataset = dataset or random_dataset(shape=(3, 8, 8))
    real = RealImages(dataset.train(), dataset.num_classes, dataset.can_flip, 0, CPU)
    with forked_global(0):
        return SYSTEMS[system].training(real, quick_recipe(system, **changes))


def spec_of(system: str, dataset: Dataset, **changes: Any) -> PoolSpec:
    """Return the spec of a quick generator."""
    return PoolSpec(
        kind="generator",
        dataset=dataset.fingerprint,
        split="train",
        transform="raw",
        arch=system,
        recipe=quick_recipe(system, **changes).dump(),
        seed=0,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
    )


def bright_quadrants(per_class: int = 40) -> Dataset:
    """Return grey images of 8 px whose class is the quadrant that is bright."""
    num = 4 * per_class
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(per_class)
    images = torch.randint(0, 60, (num, 1, 8, 8), generator=generator)
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[row, 0, top : top + 4, left : left + 4] += 150
    split = Split(images.to(torch.uint8), labels)
    return Dataset(
        name="quadrants",
        class_names=("a", "b", "c", "d"),
        image_shape=(1, 8, 8),
        mean=(0.3,),
        std=(0.3,),
        can_flip=False,
        load_train=lambda: split,
        load_test=lambda: split,
    )
