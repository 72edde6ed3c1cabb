"""DistilledSet: the self-describing file that every method writes and every protocol reads.

`distilled.pt` is `torch.save` of a dict of tensors plus one JSON string `meta`, always read with
`weights_only=True`. Files of the DC family (`res_*.pt`) and of MTT (`images_best.pt`) are read too.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.artifact import statistics as generative
from ddray.artifact.bases import Bases, check
from ddray.artifact.bases import expand as expand_bases
from ddray.artifact.partition import Partition, expand
from ddray.config import Config
from ddray.data import PixelSpace
from ddray.errors import InputError
from ddray.system.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

FORMAT_VERSION: Final = 1
_ZCA: Final = ("zca_mean", "zca_matrix")


class Meta(Config):
    """Metadata stored with a distilled set."""

    dataset: str
    fingerprint: str
    """Sha256 of the real train set it was distilled from."""
    class_names: tuple[str, ...]
    ipc: int = Field(ge=1)
    """Stored images per class (0 is refused)."""
    ipc_decoded: int = Field(ge=1)
    storage_floats: int = Field(ge=1)
    pixel_space: Literal["raw", "normalized", "zca"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]
    """(C, H, W) as decoded."""
    method: str
    config: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    split: str | None = None
    """What it was distilled from: `train`, or `train-val<seed>`, which excludes the val tenth."""
    arch: str
    norm: str
    generator: str | None = None
    """Hash of the generative model behind the images, if any."""
    budget: int | None = Field(default=None, ge=1)
    """Storage budget of a self-supervised set, in images; its ipc is the budget per class."""
    decoder: Literal["partition", "boost_ssdd", "d3hr"] | None = None
    """What turns stored tensors into training images; None: they are stored as they are."""
    partition: Partition | None = None
    """The parameters of decoder `partition`."""
    bases: Bases | None = None
    """The parameters of decoder `boost_ssdd`."""
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None


@dataclass(frozen=True)
class TrainSet:
    """What an evaluator trains on: decoded images in the set's pixel space.

    Attributes:
        images: float32 [N, C, H, W].
        labels: int64 [N]; [0] where there are targets instead.
        targets: float32 [N, D] of a self-supervised set, else None.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True)
class DistilledSet:
    """A small synthetic set that replaces a large real one for training.

    Attributes:
        images: float32 [N, C, H, W] in `meta.pixel_space`.
        labels: int64 [N]; [0] where there are targets instead.
        meta: the metadata.
        zca: `zca_mean` [D] and `zca_matrix` [D, D] of a whitened set (D = C*H*W), else empty.
        targets: float32 [N, D] of a self-supervised set, else None.
        compact: stored in place of images: what decoder `boost_ssdd` expands to images and targets, or the
            statistics that `d3hr` samples images from (no images before `generated`).
    """

    images: Tensor
    labels: Tensor
    meta: Meta
    zca: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None
    compact: Mapping[str, Tensor] = field(default_factory=dict)

    def space(self) -> PixelSpace:
        """Return the pixel space of the images."""
        meta = self.meta
        return PixelSpace(
            meta.pixel_space, meta.mean, meta.std, self.zca.get("zca_mean"), self.zca.get("zca_matrix")
        )

    def generated(self, ipc: int | None = None, device: torch.device | str = "cpu") -> DistilledSet:
        """Return this set with images: sampled if it stores statistics, otherwise the set itself.

        Args:
            ipc: images per class to sample; default as distilled.
            device: where to sample them.

        Raises:
            InputError: `ipc` for a set that stores its images, or the generator is gone.
        """
        if self.meta.decoder != "d3hr":
            if ipc is not None:
                raise InputError("--ipc is for sets that store statistics; this one stores its images")
            return self
        # By name: only sets of D3HR need its generator, and this package knows no method.
        sampling = importlib.import_module("ddray.methods.families.diffusion.sampling")
        num = self.meta.ipc if ipc is None else ipc
        distilled: DistilledSet = sampling.generate(self, num, torch.device(device))
        return distilled

    def decode(self) -> TrainSet:
        """Return the set as networks train on it.

        Labelled: images [N * P, C, H, W], P per stored image. Bases: images with their views, and targets.
        """
        if self.meta.decoder == "d3hr":
            return self.generated().decode()
        partition = self.meta.partition
        if self.meta.bases is not None:
            images, targets = expand_bases(self.compact, self.meta.bases)
            return TrainSet(images, self.labels, targets)
        if partition is None:
            return TrainSet(self.images, self.labels, self.targets)
        return TrainSet(expand(self.images, partition), self.labels.repeat_interleave(partition.num_parts))

    def to_torch_dataset(self) -> TensorDataset:
        """Return (image [C, H, W], label) pairs, as decoded, in the set's pixel space.

        The tensors are copies. For a self-supervised set, the target representation [D] takes the place of
        the label.
        """
        from torch.utils.data import TensorDataset

        train = self.decode()
        second = train.labels if train.targets is None else train.targets
        return TensorDataset(train.images.clone(), second.clone())

    def validate(self) -> None:
        """Check that tensors and meta agree.

        Raises:
            InputError: names the first rule that is broken.
        """
        images, labels, meta = self.images, self.labels, self.meta
        if meta.decoder == "d3hr":
            generative.check(self.compact, len(meta.class_names), meta.storage_floats)
            return
        if images.dtype != torch.float32 or images.ndim != 4 or images.shape[0] == 0:
            raise InputError(f"images must be float32 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if tuple(images.shape[1:]) != meta.image_shape:
            raise InputError(
                f"images must be of image_shape {meta.image_shape}, got {tuple(images.shape[1:])}"
            )
        if not self.is_finite():
            raise InputError("images must be finite, got NaN or infinity")
        if self.targets is not None:
            self._validate_targets(self.targets)
        elif labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(
                f"labels must be int64 [{images.shape[0]}], got {labels.dtype} {list(labels.shape)}"
            )
        elif labels.min() < 0 or labels.max() >= len(meta.class_names):
            raise InputError(
                f"labels must be in 0..{len(meta.class_names) - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
        channels = images.shape[1]
        if len(meta.mean) != channels or len(meta.std) != channels or min(meta.std) <= 0:
            raise InputError(
                f"mean and std must hold {channels} values, std > 0, got {meta.mean}, {meta.std}"
            )
        width = images[0].numel()
        shapes = {name: list(tensor.shape) for name, tensor in self.zca.items()}
        expected = {"zca_mean": [width], "zca_matrix": [width, width]} if meta.pixel_space == "zca" else {}
        if shapes != expected:
            raise InputError(
                f"a set in pixel space {meta.pixel_space} must hold {expected or 'no ZCA'}, got {shapes}"
            )
        for name, tensor in self.zca.items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{name} must be finite float32, got {tensor.dtype}, NaN or infinity")
        self._validate_decoder()

    def _validate_decoder(self) -> None:
        """Raise InputError unless decoder, its parameters and the counts agree."""
        meta, partition = self.meta, self.meta.partition
        if (meta.decoder == "partition") != (partition is not None):
            raise InputError(f"decoder {meta.decoder} and partition {partition} must both be given, or none")
        parts = (meta.decoder == "boost_ssdd", meta.bases is not None, bool(self.compact))
        if any(parts) != (all(parts) and self.targets is not None):
            raise InputError("decoder boost_ssdd, its bases, tensors and targets must all be given, or none")
        if partition is None:
            return
        if meta.ipc_decoded != meta.ipc * partition.num_parts:
            raise InputError(
                f"ipc_decoded must be {meta.ipc} x {partition.num_parts} parts, got {meta.ipc_decoded}"
            )
        if meta.storage_floats != self.images.numel():
            raise InputError(f"storage_floats must be {self.images.numel()}, got {meta.storage_floats}")
        partition.spans(*self.images.shape[2:])

    def _validate_targets(self, targets: Tensor) -> None:
        """Raise InputError unless the targets fit the images and storage_floats is correct."""
        meta, num = self.meta, len(self.images)
        if targets.dtype != torch.float32 or targets.ndim != 2 or len(targets) != num or len(self.labels):
            raise InputError(
                f"targets must be float32 [{num}, D] without labels, got {targets.dtype} "
                f"{list(targets.shape)} and {len(self.labels)} labels"
            )
        if meta.bases is not None:
            check(self.compact, meta.bases, meta.image_shape)
        stored = self.compact.values() if self.compact else (self.images, targets)
        floats = sum(tensor.numel() for tensor in stored)
        if meta.storage_floats != floats:
            raise InputError(f"storage_floats must be {floats}, got {meta.storage_floats}")

    def is_finite(self) -> bool:
        """Return whether no image and no target is NaN or infinite."""
        tensors = (self.images, *self.compact.values())
        return all(bool(torch.isfinite(t).all()) for t in (*tensors, self.targets) if t is not None)

    def save(self, path: Path | str) -> None:
        """Validate, then write the file atomically.

        Raises:
            InputError: the set is not valid.
            StorageError: the file can't be written.
        """
        self.validate()
        stored: dict[str, Tensor] = {"images": self.images, "labels": self.labels}
        if self.targets is not None:
            stored = {"images": self.images, "targets": self.targets}
        stored = dict(self.compact) or stored
        contents: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **{name: _plain(tensor) for name, tensor in (stored | dict(self.zca)).items()},
            "meta": json.dumps(self.meta.dump(), sort_keys=True),
        }
        write_atomically(Path(path), lambda file: torch.save(contents, file))


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous CPU copy: torch.save writes the whole storage behind a view."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
