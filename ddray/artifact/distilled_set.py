"""DistilledSet: the self-describing file that every method writes and every protocol reads.

`distilled.pt` is `torch.save` of a dict of tensors plus one JSON string `meta`, always read with
`weights_only=True`. Other projects' files are read too (`ddray.artifact.foreign`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import TensorDataset

from ddray.artifact.bases import Bases
from ddray.artifact.decoders import decoder_names, get_decoder
from ddray.artifact.partition import Partition
from ddray.artifact.schedule import Schedule
from ddray.config import Config, added
from ddray.data import PixelSpace
from ddray.data.packed import PackedImages
from ddray.data.reference import DatasetRef
from ddray.errors import InputError
from ddray.system.files import write_atomically
from ddray.system.tensors import load_plain, sha256_of

FORMAT_VERSIONS: Final = (1, 2, 3)
"""Versions that are read. Files are of version 2 only if their meta has what version 1 lacks, and of
version 3 only in the folder of a run, whose sets share their whitening."""
WHITENING: Final = "whitening"
"""Entry of a version 3 file: the name of the file, in a folder above, that has its ZCA."""
RESULT: Final = "distilled.pt"
"""Name of a run's result, whose whitening is that of the sets beside it."""
ADDED: Final = ("label_kind", "learned_lr", "schedule")
"""Fields of meta that version 2 brought."""
LabelKind = Literal["logits", "probabilities", "values"]
ZCA: Final = ("zca_mean", "zca_matrix")
"""The tensors that whiten a set; they do not count as storage."""


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
    """What it was distilled from: `train`, or without val `train-val<seed>` or `train-val<seed>-<images>`."""
    arch: str
    norm: str
    generator: str | None = None
    """Hash of the generative model behind the images, if any."""
    budget: int | None = Field(default=None, ge=1)
    """Storage budget of a self-supervised set, in images; its ipc is the budget per class."""
    decoder: str | None = None
    """What turns stored tensors into training images; None: they are stored as they are."""
    partition: Partition | None = None
    """The parameters of decoder `partition`."""
    bases: Bases | None = None
    """The parameters of decoder `boost_ssdd`."""
    label_kind: LabelKind | None = added(None)
    """What stored soft labels are: logits, whose softmax networks learn by cross entropy; probabilities; or
    values, a regression target per class (KIP, FRePo). None: probabilities, where there are any."""
    learned_lr: float | None = added(None, gt=0)
    """The learning rate distilled with the images (MTT, DATM), which networks are trained at."""
    schedule: Schedule | None = added(None)
    """The ordered steps, with a rate each, that networks are trained by (DD)."""
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None

    @field_validator("decoder")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in (names := decoder_names()):
            raise ValueError(f"must be one of {', '.join(names)}")
        return name

    @property
    def format_version(self) -> int:
        """The version of a file with this meta."""
        return FORMAT_VERSIONS[any(getattr(self, name) is not None for name in ADDED)]

    @property
    def name(self) -> str:
        """What people call the set, such as `datadam-cifar10-ipc1-seed0`."""
        return set_name(self.method, self.dataset, ipc=self.ipc, budget=self.budget, seed=self.seed)


def set_name(method: str, dataset: str, *, ipc: int, budget: int | None, seed: int | None) -> str:
    """Return a set's name: method, dataset (of a folder the last part), size, and seed if there is one."""
    size = f"ipc{ipc}" if budget is None else f"budget{budget}"
    base = Path(DatasetRef.parse(dataset).base).name
    parts = (method, base, size, *(() if seed is None else (f"seed{seed}",)))
    return "-".join(re.sub(r"[^\w.]+", "-", part) for part in parts)


def name_of_file(path: Path, meta: Meta) -> str:
    """Return what people call a set's file: its name, or where ddray gave it that, what is in it."""
    is_ours = path.stem == "distilled" or re.fullmatch("[0-9a-f]{64}", path.stem) is not None
    return meta.name if is_ours else path.stem


@dataclass(frozen=True)
class TrainSet:
    """What an evaluator trains on: decoded images in the set's pixel space.

    Attributes:
        images: float32 [N, C, H, W].
        labels: int64 [N]; [0] where there are targets instead.
        targets: float32 [N, D] of a self-supervised set, else None.
        soft_labels: float32 [N, K], probabilities, or values if `regress`, that `labels` are the largest of;
            None for hard labels.
        regress: whether soft labels are values that networks learn by the mean squared error.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None = None
    soft_labels: Tensor | None = None
    regress: bool = False

    @property
    def supervision(self) -> Tensor:
        """What networks are trained towards: targets, soft labels, or labels."""
        if self.targets is not None:
            return self.targets
        return self.labels if self.soft_labels is None else self.soft_labels

    @property
    def classes(self) -> Tensor:
        """What cross entropy takes: labels, or probabilities; in place of values their classes."""
        return self.labels if self.regress else self.supervision

    def select(self, index: Tensor) -> TrainSet:
        """Return a labelled set's images at `index` [M], or where a bool `index` [N] is true.

        Packed images stay on the disk.
        """
        soft = None if self.soft_labels is None else self.soft_labels[index]
        images = self.images
        chosen_images = images.rows(index) if isinstance(images, PackedImages) else images[index]
        return TrainSet(chosen_images, self.labels[index], soft_labels=soft, regress=self.regress)


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
        soft_labels: float32 [N, K] of `meta.label_kind`, that `labels` are the largest of; None for
            hard labels.
    """

    images: Tensor
    labels: Tensor
    meta: Meta
    zca: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None
    compact: Mapping[str, Tensor] = field(default_factory=dict)
    soft_labels: Tensor | None = None

    def space(self) -> PixelSpace:
        """Return the pixel space of the images."""
        meta, (mean, matrix) = self.meta, map(self.zca.get, ZCA)
        return PixelSpace(meta.pixel_space, meta.mean, meta.std, zca_mean=mean, zca_matrix=matrix)

    def generated(self, ipc: int | None = None, device: torch.device | str = "cpu") -> DistilledSet:
        """Return this set with images: sampled if it stores statistics, otherwise the set itself.

        Args:
            ipc: images per class to sample; default as distilled.
            device: where to sample them.

        Raises:
            InputError: `ipc` for a set that stores its images, or the generator is gone.
        """
        generate = get_decoder(self.meta.decoder).generate
        if generate is not None:
            return generate(self, ipc, torch.device(device))
        if ipc is not None:
            raise InputError("--ipc is for sets that store statistics; this one stores its images")
        return self

    def decode(self) -> TrainSet:
        """Return the set as networks train on it: partitions cut apart, bases expanded, images generated."""
        return get_decoder(self.meta.decoder).decode(self)

    def learned_labels(self) -> Tensor | None:
        """Return soft labels [N, K] as networks learn them: logits through softmax, values as they are."""
        soft = self.soft_labels
        return soft if soft is None or self.meta.label_kind != "logits" else soft.softmax(1)

    def to_torch_dataset(self) -> TensorDataset:
        """Return (image [C, H, W], label) pairs, as decoded, in the set's pixel space.

        The tensors are copies. A self-supervised set's target representation [D], or a soft label [K], takes
        the place of the label.
        """
        train = self.decode()
        return TensorDataset(train.images.clone(), train.supervision.clone())

    def validate(self) -> None:
        """Check that tensors and meta agree.

        Raises:
            InputError: names the first rule that is broken.
        """
        meta = self.meta
        for owner, name in (("partition", "partition"), ("boost_ssdd", "bases")):
            value = getattr(meta, name)
            if (meta.decoder == owner) != (value is not None):
                raise InputError(f"decoder {meta.decoder} and {name} {value} must both be given, or none")
        if meta.label_kind is not None and self.soft_labels is None:
            raise InputError(f"label_kind {meta.label_kind} must go with soft_labels, this set has none")
        if meta.schedule is not None and meta.decoder is not None:
            raise InputError(f"decoder must be null with a schedule of stored images, got {meta.decoder}")
        if meta.schedule is not None and meta.schedule.num_rows > len(self.images):
            raise InputError(
                f"schedule.order must name rows 0..{len(self.images) - 1} of the images, "
                f"got {meta.schedule.num_rows - 1}"
            )
        get_decoder(meta.decoder).validate(self)

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors that the file holds, without ZCA."""
        tensors = {"targets": self.targets, "soft_labels": self.soft_labels, "labels": self.labels}
        name, second = next((name, one) for name, one in tensors.items() if one is not None)
        return dict(self.compact) or {"images": self.images, name: second}

    def made_of(self) -> dict[str, int]:
        """Return the bytes of what the file holds, by name."""
        parts = {name: tensor.nbytes for name, tensor in self._stored().items()}
        return parts | ({"whitening": sum(one.nbytes for one in self.zca.values())} if self.zca else {})

    def check_storage(self) -> None:
        """Check that `storage_floats` counts every stored value except labels and ZCA; else InputError."""
        floats = sum(tensor.numel() for name, tensor in self._stored().items() if name != "labels")
        if self.meta.storage_floats != floats:
            raise InputError(f"storage_floats must be {floats}, got {self.meta.storage_floats}")

    def is_finite(self) -> bool:
        """Return whether no image and no target is NaN or infinite."""
        tensors = (self.images, self.targets, self.soft_labels, *self.compact.values())
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)

    def save(self, path: Path | str, *, shared: Path | None = None) -> None:
        """Validate, then write the file atomically.

        A run writes the whitening of its sets (38 MB for images of 32 px) once, to its folder `shared`, up to
        two folders above them; by default a file is whole. `save_result` writes a run's result.

        Raises:
            InputError: the set is not valid.
            StorageError: the file can't be written.
        """
        self.validate()
        contents: dict[str, Any] = {"format_version": self.meta.format_version}
        apart = self.zca if shared is not None else {}
        if shared is not None and apart:
            contents = {"format_version": FORMAT_VERSIONS[-1], WHITENING: _write_whitening(shared, apart)}
        for name, tensor in {**self._stored(), **(self.zca if not apart else {})}.items():
            # A copy: torch.save writes the whole storage behind a view.
            contents[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        contents["meta"] = json.dumps(self.meta.dump(), sort_keys=True)
        write_atomically(Path(path), lambda file: torch.save(contents, file))


def save_result(distilled: DistilledSet, path: Path) -> None:
    """Write a run's result, whole; other sets in its folder that share its whitening read it from there.

    Those of a result that it replaces find theirs in a file of its own. Raises as `DistilledSet.save`.
    """
    if path.name != RESULT:
        distilled.save(path)
        return
    name = whitening_name(distilled.zca) if distilled.zca else None
    if whitening_in(path) not in (None, name):
        contents = load_plain(path)
        _write_whitening(path.parent, {key: contents[key] for key in ZCA})
    distilled.save(path)
    if name is not None:
        (path.parent / name).unlink(missing_ok=True)


def whitening_in(file: Path) -> str | None:
    """Return the name of the whitening that a file holds; None if it holds none, or is missing or damaged."""
    if not file.is_file():
        return None
    stat = file.stat()
    try:
        return _whitening_in(file, stat.st_mtime_ns, stat.st_size)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return None


@lru_cache(maxsize=64)
def _whitening_in(file: Path, mtime_ns: int, size: int) -> str:
    """Return as `whitening_in`, of a file as it was at a time: it is read and hashed once."""
    contents = load_plain(file)
    return whitening_name({key: contents[key] for key in ZCA})


def _write_whitening(folder: Path, zca: Mapping[str, Tensor]) -> str:
    """Write a whitening to a run's folder unless it is there, undamaged; return the name of its file."""
    file = folder / whitening_name(zca)
    if whitening_in(file) != file.name:
        write_atomically(file, lambda target: torch.save(dict(zca), target))
    return file.name


def whitening_name(zca: Mapping[str, Tensor]) -> str:
    """Return the name of the file that has a whitening, which is a hash of it."""
    return f"{WHITENING}-{sha256_of(zca[name] for name in ZCA)[:16]}.pt"
