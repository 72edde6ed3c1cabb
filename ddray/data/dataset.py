"""Split and Dataset: images with labels, loaded on first use; stratified splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ddray import seeding
from ddray.errors import InputError

_HASH_CHUNK = 4096  # images hashed at a time: bounds the memory of memory-mapped sets


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 [N, C, H, W]; float32 for spectrograms only.
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
        """Return a copy of the images at `index` [M], in that order."""
        return Split(self.images[index], self.labels[index])


@dataclass
class Dataset:
    """A dataset whose train and test halves are read on first use, each once.

    Attributes:
        name: what `open_dataset` reopens it by: a known name, or an absolute path.
        class_names: one name per label.
        image_shape: (C, H, W).
        mean: per channel, in [0, 1] units (spectrograms: in their own).
        std: per channel, likewise.
        can_flip: whether a mirrored image keeps its class (not for digits, house numbers, speech).
        load_train: reads the train split.
        load_test: reads the test split; only `test()` calls it, so that a broken test set affects nothing
            else.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    can_flip: bool
    load_train: Callable[[], Split] = field(repr=False)
    load_test: Callable[[], Split] = field(repr=False)
    _train: Split | None = field(default=None, init=False, repr=False)
    _test: Split | None = field(default=None, init=False, repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def train(self) -> Split:
        """Return the train split.

        Raises:
            InputError: a file is missing or corrupt, a label is out of range, a class has no image.
        """
        if self._train is None:
            split = self._checked(self.load_train(), "train")
            counts = torch.bincount(split.labels, minlength=self.num_classes)
            if bool((counts == 0).any()):
                empty = self.class_names[int((counts == 0).nonzero()[0])]
                raise InputError(f"every class of {self.name} must have a train image, got none of {empty!r}")
            self._train = split
        return self._train

    def test(self) -> Split:
        """Return the test split.

        Raises:
            InputError: a file is missing or corrupt, a label is out of range, there is no image.
        """
        if self._test is None:
            self._test = self._checked(self.load_test(), "test")
        return self._test

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over train's images, labels and the class names; test plays no part."""
        split = self.train()
        head = {
            "class_names": self.class_names,
            "shape": list(split.images.shape),
            "dtype": str(split.images.dtype),
        }
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for chunk in torch.split(split.images, _HASH_CHUNK):
            digest.update(chunk.contiguous().numpy().data)
        digest.update(split.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def _checked(self, split: Split, which: str) -> Split:
        """Return `split` if its shape and labels fit this dataset."""
        if len(split) == 0:
            raise InputError(f"the {which} split of {self.name} must have images, got none")
        if tuple(split.images.shape[1:]) != self.image_shape:
            raise InputError(
                f"{which} images of {self.name} must have shape {list(self.image_shape)}, "
                f"got {list(split.images.shape[1:])}"
            )
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise InputError(
                f"{which} labels of {self.name} must lie in 0..{self.num_classes - 1} "
                f"(it names {self.num_classes} classes), got {wrong}"
            )
        return split


def stratified_holdout(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw which samples to hold out, the same fraction of every class.

    A class with at least two samples gives at least one and keeps at least one; a single sample stays.

    Args:
        labels: int64 [N].
        fraction: of each class, rounded to the nearest count.
        generator: CPU generator of the draw.

    Returns:
        bool [N], true where held out.
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
    """Split `split` into train and val, stratified by class; both keep the order of `split`.

    Args:
        split: what to carve from, usually all of train.
        seed: decides which images go to val.
        fraction: share of val, in (0, 1).

    Returns:
        (train, val): disjoint, together complete. A class with at least 2 images has at least 1 in each.

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
    return split.select((~in_val).nonzero()[:, 0]), split.select(in_val.nonzero()[:, 0])


def search_rows(train: Split, *, seed: int) -> Tensor:
    """Return each image's row in `carve_val`'s train followed by its val, int64 [N]."""
    numbered = Split(torch.arange(len(train)).view(-1, 1, 1, 1), train.labels)
    remaining, val = carve_val(numbered, seed=seed)
    return torch.cat([remaining.images, val.images]).flatten().argsort()
