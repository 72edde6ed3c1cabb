"""DistilledSet: the self-describing file that every method writes and every protocol reads.

`distilled.pt` is `torch.save` of a dict of tensors plus one JSON string `meta`, always read with
`weights_only=True`. Files of the DC family (`res_*.pt`) and of MTT (`images_best.pt`) are read too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from ddray.config import Config
from ddray.data import Dataset, PixelSpace
from ddray.errors import InputError
from ddray.files import write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
_TARGETS: Final = ("labels", "soft_labels", "targets")
_ZCA: Final = ("zca_mean", "zca_matrix")


class Meta(Config):
    """What a distilled set says of itself."""

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
    arch: str
    norm: str
    generator: str | None = None
    """Hash of the generative model behind the images, if any."""
    versions: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None


@dataclass(frozen=True)
class TrainSet:
    """What an evaluator trains on: images already in their pixel space.

    Attributes:
        images: float32 [N, C, H, W].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DistilledSet:
    """A small set that stands for a big one.

    Attributes:
        images: float32 [N, C, H, W] in `meta.pixel_space`.
        labels: int64 [N].
        meta: what the set says of itself.
        zca: `zca_mean` [D] and `zca_matrix` [D, D] of a whitened set (D = C*H*W), else empty.
    """

    images: Tensor
    labels: Tensor
    meta: Meta
    zca: Mapping[str, Tensor] = field(default_factory=dict)

    def space(self) -> PixelSpace:
        """Return the pixel space that the images live in."""
        meta = self.meta
        return PixelSpace(
            meta.pixel_space, meta.mean, meta.std, self.zca.get("zca_mean"), self.zca.get("zca_matrix")
        )

    def decode(self) -> TrainSet:
        """Return the set as training images and labels."""
        return TrainSet(self.images, self.labels)

    def validate(self) -> None:
        """Check that tensors and meta agree.

        Raises:
            InputError: naming the first rule that is broken.
        """
        images, labels, meta = self.images, self.labels, self.meta
        if images.dtype != torch.float32 or images.ndim != 4 or images.shape[0] == 0:
            raise InputError(f"images must be float32 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if tuple(images.shape[1:]) != meta.image_shape:
            raise InputError(
                f"images must be of image_shape {meta.image_shape}, got {tuple(images.shape[1:])}"
            )
        if not self.is_finite():
            raise InputError("images must be finite, got NaN or infinity")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(
                f"labels must be int64 [{images.shape[0]}], got {labels.dtype} {list(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= len(meta.class_names):
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
        wanted = {"zca_mean": [width], "zca_matrix": [width, width]} if meta.pixel_space == "zca" else {}
        if shapes != wanted:
            raise InputError(
                f"a set in pixel space {meta.pixel_space} must hold {wanted or 'no ZCA'}, got {shapes}"
            )
        for name, tensor in self.zca.items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{name} must be finite float32, got {tensor.dtype}, NaN or infinity")

    def is_finite(self) -> bool:
        """Return whether no image is NaN or infinite."""
        return bool(torch.isfinite(self.images).all())

    def save(self, path: Path) -> None:
        """Validate, then write the file atomically.

        Raises:
            InputError: the set is not valid.
            StorageError: the file can't be written.
        """
        self.validate()
        held: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "images": _plain(self.images),
            "labels": _plain(self.labels),
            **{name: _plain(tensor) for name, tensor in self.zca.items()},
            "meta": json.dumps(self.meta.dump(), sort_keys=True),
        }
        write_atomically(path, lambda file: torch.save(held, file))


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous CPU copy: of a view, torch.save would write the whole tensor behind it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load(
    path: Path, *, dataset: Dataset | None = None, pixel_space: PixelSpace | None = None
) -> DistilledSet:
    """Read a distilled set: ours, the DC family's `res_*.pt`, or MTT's `images_best.pt` + `labels_best.pt`.

    Args:
        path: the file.
        dataset: what a foreign file, which does not say it, was distilled from.
        pixel_space: the space of a foreign file's pixels; default: normalised by the dataset's mean and std.

    Raises:
        InputError: missing, torn, not a distilled set, or holding anything but tensors and plain values.
    """
    held = _read(path)
    if isinstance(held, dict) and "format_version" in held:
        return _own(path, held)
    if dataset is None:
        raise InputError(f"{path} does not say which dataset it is of: add --dataset NAME")
    images, labels = _foreign(path, held)
    if int(labels.max()) >= dataset.num_classes:
        raise InputError(
            f"{path}: labels must be < {dataset.num_classes} for {dataset.name}, got {int(labels.max())}"
        )
    space = pixel_space or PixelSpace("normalized", dataset.mean, dataset.std)
    zca = {"zca_mean": space.zca_mean, "zca_matrix": space.zca_matrix} if space.kind == "zca" else {}
    made = DistilledSet(
        images=images.float(),
        labels=labels.long(),
        meta=describe_foreign(path, images, labels, dataset, space.kind),
        zca={name: tensor for name, tensor in zca.items() if tensor is not None},
    )
    return _validated(path, made)


def describe_foreign(
    path: Path, images: Tensor, labels: Tensor, dataset: Dataset, kind: Literal["raw", "normalized", "zca"]
) -> Meta:
    """Return the meta of another project's file, as far as it can be known."""
    from ddray.nets import default_arch

    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    per_class = max(1, int(torch.bincount(labels.long(), minlength=1).max()))
    return Meta(
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        class_names=dataset.class_names,
        ipc=per_class,
        ipc_decoded=per_class,
        storage_floats=images.numel(),
        pixel_space=kind,
        mean=dataset.mean,
        std=dataset.std,
        image_shape=shape,
        method=f"file:{path.name}",
        arch=default_arch(shape),
        norm="instance",
    )


def _numpy_scalars() -> list[Any]:
    """Return the safe globals for the DC family's files: their accuracies are NumPy float scalars."""
    import numpy as np

    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    return [
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        (multiarray.scalar, "numpy._core.multiarray.scalar"),
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
    ]


def _read(path: Path) -> Any:
    """Load a file of tensors and plain values, and nothing else.

    Raises:
        InputError: the file is missing, torn, or asks for code to be run.
    """
    if not path.is_file():
        raise InputError(f"a distilled set must be an existing file, got {path}")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, each of them means: not a file of tensors
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if "weights_only" in str(error):  # torch goes on to advise switching the protection off
            reason = "it holds objects that could run code, which are never loaded"
        raise InputError(
            f"{path} must be an undamaged distilled set of tensors and plain values: {reason}; copy it again"
        ) from error


def _own(path: Path, held: Mapping[str, Any]) -> DistilledSet:
    """Build a set from our own format."""
    version = held["format_version"]
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version must be {FORMAT_VERSION}, got {version}; update ddray")
    known = {"format_version", "images", "labels", "meta", *_ZCA}
    missing, more = {"images", "labels", "meta"} - held.keys(), held.keys() - known
    if missing or more:
        raise InputError(
            f"{path} must hold {sorted(known)}; missing {sorted(missing)}, unknown {sorted(more)}"
        )
    wrong = [key for key in held if key not in ("format_version", "meta") and not _is_plain(held[key])]
    if wrong:
        raise InputError(f"{path}: {', '.join(wrong)} must be dense tensors")
    try:
        values = dict(json.loads(held["meta"]))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: meta must be a JSON object, got {str(held['meta'])[:60]!r}") from error
    meta = Meta.parse(values, prefix="meta.", source=str(path))
    made = DistilledSet(held["images"], held["labels"], meta, {key: held[key] for key in _ZCA if key in held})
    return _validated(path, made)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a tensor whose numbers are there (not sparse, not on the meta device)."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _validated(path: Path, made: DistilledSet) -> DistilledSet:
    try:
        made.validate()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return made


def _foreign(path: Path, held: Any) -> tuple[Tensor, Tensor]:
    """Read images and labels out of another project's file."""
    if isinstance(held, dict) and isinstance(held.get("data"), list) and held["data"]:
        if len(held["data"]) > 1:
            log.info("%s holds %d sets: the first is read", path, len(held["data"]))
        pair = held["data"][0]
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(_is_plain(part) for part in pair):
            return _shaped(path, *pair)
    if _is_plain(held) and path.name.startswith("images_"):
        labels_path = path.with_name(path.name.replace("images_", "labels_", 1))
        labels = _read(labels_path)
        if _is_plain(labels):
            return _shaped(path, held, labels)
    raise InputError(
        f'{path} must be ddray\'s own file, {{"data": [[images, labels], ...]}} (DC family), or images_*.pt '
        "beside labels_*.pt (MTT)"
    )


def _shaped(path: Path, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(labels) == 0 or labels.min() < 0:
        raise InputError(
            f"{path} must hold images [N, C, H, W] and labels [N] >= 0, "
            f"got {list(images.shape)}, {list(labels.shape)}"
        )
    return images, labels
