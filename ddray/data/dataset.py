"""Split and Dataset: images with labels, loaded on first use; stratified splits and their names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Self

import torch
from torch import Tensor

from ddray import seeding
from ddray.data.packed import PackedImages, parts_of
from ddray.data.reference import DatasetRef
from ddray.errors import InputError
from ddray.system.progress import phase
from ddray.system.tensors import check_channels_first

_SPLIT_NAME: Final = re.compile(r"train(?:-val(\d+)(?:-(\d+))?)?")


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 [N, C, H, W], on the disk if they are large (`PackedImages`); float32 for spectrograms
            only.
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise InputError(
                "a split takes images [N, C, H, W] and labels [N], got "
                f"{list(self.images.shape)} and {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_audio(self) -> bool:
        """Whether the images are spectrograms, for which no image augmentation makes sense."""
        return self.images.is_floating_point()

    def select(self, index: Tensor) -> Split:
        """Return the images at `index` [M], in that order, or where a bool `index` [N] is true.

        They are a copy; packed images stay on the disk.
        """
        if isinstance(self.images, PackedImages):
            return Split(self.images.rows(index), self.labels[index])
        return Split(self.images[index], self.labels[index])


@dataclass
class Dataset:
    """A dataset whose train and test halves are read on first use, each once.

    Attributes:
        name: what `open_dataset` reopens it by: a reference with a known name or an absolute path.
        class_names: one name per label.
        image_shape: (C, H, W).
        mean: per channel, in [0, 1] units (spectrograms: in their own).
        std: per channel, likewise.
        can_flip: whether a mirrored image keeps its class (not for digits, house numbers, speech).
        load_train: reads the train split.
        load_test: reads the test split; only `test()` calls it, so that a broken test set affects nothing
            else.
        size_rule: how the size of the images was chosen.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    can_flip: bool
    load_train: Callable[[], Split] = field(repr=False)
    load_test: Callable[[], Split] = field(repr=False)
    size_rule: str = ""

    @property
    def base(self) -> str:
        """The name without options, by which catalog, settings and published numbers know the dataset."""
        return DatasetRef.parse(self.name).base

    @property
    def overrides(self) -> dict[str, bool]:
        """What the name sets that changes trainings but not the fingerprint: `can_flip`, if it does."""
        can_flip = DatasetRef.parse(self.name).can_flip
        return {} if can_flip is None else {"can_flip": can_flip}

    def with_options(self, **content: Any) -> Self:
        """Return this open dataset with options of content: `can_flip`, the only one that reads no file.

        Raises:
            InputError: another option is set.
        """
        for option, value in content.items():
            if option != "can_flip" and value is not None:
                raise InputError(
                    f"{option} must be set where a dataset is opened, got {value!r} for an open one, "
                    f"{self.name}; use open_dataset(..., {option}={value!r})"
                )
        if (can_flip := content.get("can_flip")) is None:
            return self
        name = str(DatasetRef.parse(self.name).with_options(can_flip=can_flip))
        return replace(self, name=name, can_flip=bool(can_flip))

    def __post_init__(self) -> None:
        check_channels_first(self.image_shape, f"the image shape of {self.name}")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def train(self) -> Split:
        """Return the train split.

        Raises:
            InputError: a file is missing or corrupt, a label is out of range, a class has no image.
        """
        return self._train

    def test(self) -> Split:
        """Return the test split.

        Raises:
            InputError: a file is missing or corrupt, a label is out of range, there is no image.
        """
        return self._test

    @cached_property
    def _train(self) -> Split:
        with phase(f"reading {self.name}"):
            split = self._checked(self.load_train(), "train")
        empty = (torch.bincount(split.labels, minlength=self.num_classes) == 0).nonzero()
        if len(empty):
            raise InputError(
                f"every class of {self.name} must have a train image, "
                f"got none of {self.class_names[int(empty[0])]!r}"
            )
        return split

    @cached_property
    def _test(self) -> Split:
        with phase(f"reading the test images of {self.name}"):
            return self._checked(self.load_test(), "test")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over train's images, labels and the class names; test plays no part."""
        split = self.train()
        shape, dtype = list(split.images.shape), str(split.images.dtype)
        head = json.dumps({"class_names": self.class_names, "shape": shape, "dtype": dtype}, sort_keys=True)
        labels = split.labels.contiguous().numpy()

        def compute() -> str:
            digest = hashlib.sha256(head.encode())
            for part in parts_of(split.images):
                digest.update(part.contiguous().numpy().data)
            digest.update(labels.data)
            return digest.hexdigest()

        if not isinstance(split.images, PackedImages):
            return compute()
        return str(
            split.images.remembered(f"fingerprint {head} {hashlib.sha256(labels.data).hexdigest()}", compute)
        )

    def _checked(self, split: Split, which: str) -> Split:
        """Return `split` if its shape and labels fit this dataset."""
        if len(split) == 0:
            raise InputError(f"the {which} split of {self.name} must have images, got none")
        shape = list(split.images.shape[1:])
        if shape != list(self.image_shape):
            raise InputError(
                f"{which} images of {self.name} must have shape {list(self.image_shape)}, got {shape}"
            )
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= self.num_classes:
            raise InputError(
                f"{which} labels of {self.name} must lie in 0..{self.num_classes - 1} "
                f"(it names {self.num_classes} classes), got {low if low < 0 else high}"
            )
        return split


def stratified_holdout(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Return bool [N]: the samples to hold out of `labels`, int64 [N], drawn by a CPU generator.

    It is the same fraction of every class, rounded to the nearest count. A class with at least two samples
    gives at least one and keeps at least one; a single sample stays.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]  # by class, at random within a class
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    num_held_out = (counts * fraction + 0.5).floor().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[order] = rank < num_held_out[labels[order]]
    return held_out


def carve_val(split: Split, *, seed: int, fraction: float = 0.1) -> tuple[Split, Split]:
    """Return `split`, usually all of train, as (train, val): disjoint, together complete, in its order.

    Val is a fraction of every class; a class with at least 2 images has at least 1 in each half.

    Raises:
        InputError: `fraction` is not in (0, 1), or no class has 2 images.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the validation fraction must lie in (0, 1), got {fraction}")
    in_val = stratified_holdout(split.labels, fraction, seeding.derive(seed, "data", "carve_val"))
    if not bool(in_val.any()):
        raise InputError(
            f"carving val needs a class with 2 images, got {len(split)} images of as many classes"
        )
    return split.select(~in_val), split.select(in_val)


def search_rows(train: Split, *, seed: int) -> Tensor:
    """Return each image's row in `carve_val`'s train followed by its val, int64 [N]."""
    numbered = Split(torch.arange(len(train)).view(-1, 1, 1, 1), train.labels)
    remaining, val = carve_val(numbered, seed=seed)
    return torch.cat([remaining.images, val.images]).flatten().argsort()


@dataclass(frozen=True)
class SplitName:
    """All of train, written `train`, or what is left of it without val, written `train-val<seed>`.

    Attributes:
        val_seed: seed of the val images that are left out; None for all of train.
        val_images: their number, written `train-val<seed>-<number>`; None for a tenth of train.

    Raises:
        InputError: `val_images` without a `val_seed`.
    """

    val_seed: int | None = None
    val_images: int | None = None

    def __post_init__(self) -> None:
        if self.val_seed is None and self.val_images is not None:
            raise InputError(f"--val-images {self.val_images} needs --val-seed, which draws them")

    def __str__(self) -> str:
        parts = ("" if self.val_seed is None else f"val{self.val_seed}", str(self.val_images or ""))
        return "-".join(filter(None, ("train", *parts)))

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return the split that a name stands for; None for any other name."""
        match = _SPLIT_NAME.fullmatch(name)
        numbers = () if match is None else (None if part is None else int(part) for part in match.groups())
        return None if match is None else cls(*numbers)

    def fraction(self, num_train: int) -> float:
        """Return val's share of all `num_train` train images.

        Raises:
            InputError: val would leave nothing to train on.
        """
        if self.val_images is None:
            return 0.1
        if not 1 <= self.val_images < num_train:
            raise InputError(f"--val-images must be in 1..{num_train - 1}, got {self.val_images}")
        return self.val_images / num_train

    def carve(self, train: Split) -> tuple[Split, Split | None]:
        """Return this part of train, and the val images that it leaves out: the same share of every class."""
        if self.val_seed is None:
            return train, None
        return carve_val(train, seed=self.val_seed, fraction=self.fraction(len(train)))
