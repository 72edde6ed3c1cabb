"""Another project's set as a `DistilledSet`: labels, pixel space, and images that hold several, cut apart."""

import logging
import math
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.decoders.images import are_probabilities
from ddray.artifact.distilled_set import ZCA, DistilledSet, LabelKind, Meta
from ddray.artifact.foreign import ForeignFile, ForeignRequest, ForeignSet
from ddray.artifact.partition import padded_parts
from ddray.config import merge
from ddray.data import Dataset, PixelSpace
from ddray.errors import InputError
from ddray.system.tensors import check_channels_first

log = logging.getLogger(__name__)

FOREIGN: Final = "file:"
"""What the method of a set that another project wrote begins with."""
_SAMPLE: Final = 1000  # real images by which a set's spread is judged
_SLACK: Final = 0.5  # of pixels in 0..1: IDC clamps them before a step, not after it


def selected(path: Path, file: ForeignFile, index: int | None) -> dict[str, ForeignSet]:
    """Return the sets that count, by names that tell them apart; a line says which of several they are.

    InputError if there is no set `index`, or the file does not say which of its sets count.
    """
    num = len(file.sets)
    if index is not None and index >= num:
        raise InputError(f"--index must be in 0..{num - 1} ({path} holds {num} sets), got {index}")
    if num == 1:
        return {path.name: file.sets[0]}
    if index is None and file.scored is None:
        raise InputError(
            f"{path} must say which of its {num} sets count, which it does not: add --index N (0..{num - 1})"
        )
    if index is None and file.scored == "all":
        log.info("%s holds %d sets, one per run: all of them count", path, num)
        return {f"{path.name}#{number}": one for number, one in enumerate(file.sets)}
    number = num - 1 if index is None else index
    reason = "the last, from the end of a run" if index is None else f"--index {index}"
    log.warning("%s holds %d sets: number %d (from 0) is read, %s", path, num, number, reason)
    return {path.name: file.sets[number]}


def adopt(path: Path, name: str, foreign: ForeignSet, request: ForeignRequest) -> DistilledSet:
    """Return a set of a file, called `name`; InputError if its tensors don't fit together, or the dataset."""
    dataset, images, labels = request.dataset, foreign.images.detach(), foreign.labels.detach()
    if images.ndim != 4 or labels.ndim not in (1, 2) or len(labels) != len(images) or not len(labels):
        raise InputError(
            f"{path} must hold images [N, C, H, W] and labels [N] >= 0, "
            f"got {list(images.shape)}, {list(labels.shape)}"
        )
    check_channels_first(images.shape[1:], f"{path}: the shape of an image")
    soft, kind, targets = None, None, labels.float() if foreign.are_targets else None
    if targets is not None:
        labels = torch.zeros(0, dtype=torch.int64)
    elif labels.ndim == 2:
        soft, kind = _soft_labels(path, labels.float(), dataset)
        labels = soft.argmax(1)
    else:
        labels = _classes(path, labels, dataset)
    space = request.pixel_space() if request.pixel_space else foreign.space
    space = space or PixelSpace("normalized", dataset.mean, dataset.std)
    meta = _describe(name, images, labels, request, foreign, space).model_copy(update={"label_kind": kind})
    is_unit = foreign.is_unit or images.dtype == torch.uint8
    images = images / 255 if images.dtype == torch.uint8 else images.float()
    rows, columns = _grid(foreign, request)
    if columns > 1:
        grey = 0.5 if is_unit or space.kind == "raw" else 0.0  # normalised, 0 is the mean
        images = padded_parts(images, rows, columns, grey)
        labels = labels.repeat_interleave(rows * columns)
        soft = None if soft is None else soft.repeat_interleave(rows * columns, 0)
    elif (request.factor or 1) > 1:
        log.warning("%s holds whole images: --factor %d is not for it", path, request.factor)
    if is_unit:
        images = _pixels_encoded(path, images, space, dataset)
    elif request.pixel_space is None and foreign.space is None:
        _warn_of_spread(path, images, space, dataset)
    zca = {key: one for key in ZCA if space.kind == "zca" and (one := getattr(space, key)) is not None}
    return DistilledSet(images, labels, meta, zca, targets, soft_labels=soft)


def _grid(foreign: ForeignSet, request: ForeignRequest) -> tuple[int, int]:
    """Return the rows and columns of images in a stored one; spectrograms are divided along time."""
    columns = (request.factor or 1) if foreign.is_divided else 1
    return 1 if request.dataset.train().is_audio else columns, columns


def _soft_labels(path: Path, values: Tensor, dataset: Dataset) -> tuple[Tensor, LabelKind | None]:
    """Return soft labels and what they are: probabilities, or logits (DATM, DD-Ranking)."""
    if values.shape[1] != dataset.num_classes:
        raise InputError(
            f"{path}: soft labels must be [N, {dataset.num_classes}] for {dataset.name}, "
            f"got {list(values.shape)}"
        )
    return values, None if are_probabilities(values) else "logits"


def _classes(path: Path, labels: Tensor, dataset: Dataset) -> Tensor:
    """Return labels of any type as int64 [N]; a warning counts the classes without images."""
    classes = labels.long()
    if not torch.equal(classes.to(labels.dtype), labels) or int(classes.min()) < 0:
        raise InputError(
            f"{path} must hold images [N, C, H, W] and labels [N] >= 0, in whole numbers, got "
            f"{float(labels.min()):g}..{float(labels.max()):g}"
        )
    if int(classes.max()) >= dataset.num_classes:
        raise InputError(
            f"{path}: labels must be < {dataset.num_classes} for {dataset.name}, got {int(classes.max())}"
        )
    counts = torch.bincount(classes, minlength=dataset.num_classes).tolist()
    if missing := [name for name, count in zip(dataset.class_names, counts, strict=True) if not count]:
        log.warning("%s has no image of %d classes: %s", path, len(missing), ", ".join(missing[:5]))
    return classes


def _pixels_encoded(path: Path, pixels: Tensor, space: PixelSpace, dataset: Dataset) -> Tensor:
    """Return pixels (in 0..1, or spectrograms) in `space`."""
    if tuple(pixels.shape[1:]) != dataset.image_shape:
        raise InputError(
            f"{path} must hold images of {dataset.name}'s shape {dataset.image_shape}, "
            f"got {tuple(pixels.shape[1:])}"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if (low < -_SLACK or high > 1 + _SLACK) and not dataset.train().is_audio:
        raise InputError(
            f"{path} must hold pixels in 0..1, got {low:.3g}..{high:.3g}; "
            "add --pixel-space normalized if they are normalised"
        )
    return space.encode(pixels)


def _warn_of_spread(path: Path, images: Tensor, space: PixelSpace, dataset: Dataset) -> None:
    """Say so if images vary much less than normalised real ones: in 0..1 or whitened, as MTT's often are."""
    spread, real = float(images.std()), float(space.encode(dataset.train().images[:_SAMPLE]).std())
    if spread < real / 2:
        log.warning(
            "%s is taken as normalised, but its values spread by %.2f, the real ones by %.2f: "
            "add --pixel-space zca if it is whitened, raw if it holds pixels in 0..1",
            *(path, spread, real),
        )


def _describe(
    name: str, images: Tensor, labels: Tensor, request: ForeignRequest, foreign: ForeignSet, space: PixelSpace
) -> Meta:
    """Return the metadata of a set from what its file and the dataset say; the images are as stored."""
    from ddray.nets import default_arch

    dataset, num = request.dataset, len(images)
    per_class = int(torch.bincount(labels).max()) if len(labels) else max(1, num // dataset.num_classes)
    rows, columns = _grid(foreign, request)
    config: dict[str, Any] = {"method": {"factor": columns}} if foreign.is_divided else {}
    lr = foreign.lr
    if lr is not None and not 0 < lr < math.inf:
        log.warning("its learning rate, %g, is left out: networks can't be trained at it", lr)
        lr = None
    if lr is not None:
        config = merge(config, {"evaluate": {"lr": "learned"}})
    is_normalized = space.kind == "normalized"
    facts = {
        "ipc": per_class,
        "ipc_decoded": per_class * rows * columns,
        "storage_floats": images.numel() + (foreign.labels.numel() if foreign.labels.ndim == 2 else 0),
        "arch": default_arch((images.shape[1], images.shape[2], images.shape[3])),
        "norm": "instance",
        "learned_lr": lr,
        "method": f"{FOREIGN}{name}",
        **foreign.facts,
    }
    return Meta.parse(
        {
            **facts,
            "dataset": dataset.name,
            "fingerprint": dataset.fingerprint,
            "class_names": dataset.class_names,
            "pixel_space": space.kind,
            "mean": space.mean if is_normalized else dataset.mean,
            "std": space.std if is_normalized else dataset.std,
            "image_shape": tuple(images.shape[1:]),
            "config": merge(facts.get("config", {}), config),
        }
    )
