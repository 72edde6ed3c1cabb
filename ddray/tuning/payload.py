"""What workers get through the object store: real images once per node, and copies at the boundary.

Of images that stay on the disk they get the name, and map them themselves.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddray.data import Dataset, PixelSpace, Split
from ddray.data.packed import Images, PackedImages, copied, shared
from ddray.distillation.shards import Shard
from ddray.errors import InputError


@dataclass(frozen=True)
class Payload:
    """Part of a dataset as NumPy arrays (docs/ray.md, 11: shared without a copy per worker) and plain values.

    `train_rows`, int64 [N + M], has for each of train's images its row in `images` followed by `held_images`;
    it is None where `images` are all of train.
    """

    facts: dict[str, Any]  # name, class names, shape, statistics, fingerprint
    split_name: str  # which part of the dataset `images` is
    images: Images  # uint8 [N, C, H, W] to distil from
    labels: np.ndarray[Any, Any]  # int64 [N]
    held_images: Images  # uint8 [M, C, H, W] to score on
    held_labels: np.ndarray[Any, Any]  # int64 [M]
    zca: dict[str, np.ndarray[Any, Any]]  # zca_mean [D] and zca_matrix [D, D] fitted on `images`, or empty
    kind: str  # pixel space
    train_rows: np.ndarray[Any, Any] | None = None


def pack(
    dataset: Dataset,
    split: Split,
    split_name: str,
    held_out: Split,
    space: PixelSpace,
    train_rows: Tensor | None = None,
) -> Payload:
    """Return the payload of a split to distil from, and of the part to score on."""
    facts = ("name", "class_names", "image_shape", "mean", "std", "can_flip", "fingerprint")
    zca = {"zca_mean": space.zca_mean, "zca_matrix": space.zca_matrix}
    return Payload(
        facts={name: getattr(dataset, name) for name in facts},
        split_name=split_name,
        images=shared(split.images),
        labels=split.labels.numpy(),
        held_images=shared(held_out.images),
        held_labels=held_out.labels.numpy(),
        zca={name: value.numpy() for name, value in zca.items() if value is not None and space.kind == "zca"},
        kind=space.kind,
        train_rows=None if train_rows is None else train_rows.numpy(),
    )


@dataclass(frozen=True)
class Unpacked:
    """A worker's own copy of those parts of a payload that it uses.

    `dataset` has its metadata, and all of train; a worker can't open its test set.
    """

    payload: Payload
    dataset: Dataset
    space: PixelSpace

    @cached_property
    def split(self) -> Split:
        """What is distilled."""
        return Split(copied(self.payload.images), torch.tensor(self.payload.labels))

    @cached_property
    def held_out(self) -> Split:
        """What is scored on."""
        return Split(copied(self.payload.held_images), torch.tensor(self.payload.held_labels))

    def shard(self, classes: range) -> tuple[Shard, Split]:
        """Return a shard of what is distilled, with a copy of its classes' images only."""
        images = self.payload.images
        is_float = isinstance(images, np.ndarray) and images.dtype.kind == "f"
        shard = Shard(classes, torch.tensor(self.payload.labels), float(images.min()) if is_float else None)
        rows = shard.rows
        part = images.rows(rows) if isinstance(images, PackedImages) else torch.tensor(images[rows.numpy()])
        return shard, Split(part, shard.labels[rows])


_latest: tuple[tuple[str, str, str, int], Unpacked] | None = None


def unpack(payload: Payload) -> Unpacked:
    """Copy a payload out of the object store; a worker that runs many trials copies it once."""
    global _latest
    facts = dict(payload.facts)
    fingerprint = facts.pop("fingerprint")
    identity = (fingerprint, facts["name"], f"{payload.split_name}:{payload.kind}", len(payload.held_labels))
    if _latest is not None and _latest[0] == identity:
        return _latest[1]
    rows = payload.train_rows

    def train() -> Split:
        split, held_out = unpacked.split, unpacked.held_out
        if rows is None:
            return split
        joined = Split(torch.cat([split.images, held_out.images]), torch.cat([split.labels, held_out.labels]))
        return joined.select(torch.tensor(rows))

    dataset = Dataset(**facts, load_train=train, load_test=_no_test)
    dataset.__dict__["fingerprint"] = fingerprint  # the whole train set's, not this part's
    zca = {name: torch.tensor(value) for name, value in payload.zca.items()}
    space = PixelSpace(payload.kind, dataset.mean, dataset.std, **zca)  # type: ignore[arg-type]
    unpacked = Unpacked(payload, dataset, space)
    _latest = (identity, unpacked)
    return unpacked


def _no_test() -> Split:
    raise InputError("a worker can't open the test set: the images it needs are sent to it")
