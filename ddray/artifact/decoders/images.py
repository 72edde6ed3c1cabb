"""Decoder `images`, the default: images as they are trained on, with labels or self-supervised targets."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ddray.artifact.decoders import Decoder
from ddray.artifact.distilled_set import ZCA, DistilledSet, Meta, TrainSet
from ddray.errors import InputError


def read_images(meta: Meta, tensors: Mapping[str, Tensor], zca: Mapping[str, Tensor]) -> DistilledSet:
    """Return the set of a file's images, and labels, soft labels or targets; InputError for other tensors."""
    second = next((name for name in ("targets", "soft_labels") if name in tensors), "labels")
    needed = {"images", second}
    missing, unexpected = needed - tensors.keys(), tensors.keys() - needed
    if missing or unexpected:
        raise InputError(
            f"the file must hold {sorted({'format_version', 'meta', *needed, *ZCA})}; "
            f"missing {sorted(missing)}, unknown {sorted(unexpected)}"
        )
    soft = tensors.get("soft_labels")
    labels = tensors.get("labels", torch.zeros(0, dtype=torch.int64)) if soft is None else soft.argmax(-1)
    return DistilledSet(tensors["images"], labels, meta, zca, tensors.get("targets"), soft_labels=soft)


def _validate(distilled: DistilledSet) -> None:
    check_images(distilled)
    if distilled.targets is not None:
        distilled.check_storage()


def check_images(distilled: DistilledSet) -> None:
    """Check images, their labels or targets, and pixel space; InputError names the first broken rule."""
    images, meta = distilled.images, distilled.meta
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[0] == 0:
        raise InputError(f"images must be float32 [N, C, H, W], got {images.dtype} {list(images.shape)}")
    if tuple(images.shape[1:]) != meta.image_shape:
        raise InputError(f"images must be of image_shape {meta.image_shape}, got {tuple(images.shape[1:])}")
    if not distilled.is_finite():
        raise InputError("images must be finite, got NaN or infinity")
    _check_labels(distilled.labels, distilled.targets, len(images), len(meta.class_names))
    if distilled.soft_labels is not None:
        _check_soft(distilled, len(images), len(meta.class_names))
    channels = images.shape[1]
    if len(meta.mean) != channels or len(meta.std) != channels or min(meta.std) <= 0:
        raise InputError(f"mean and std must hold {channels} values, std > 0, got {meta.mean}, {meta.std}")
    width = images[0].numel()
    shapes = {name: list(tensor.shape) for name, tensor in distilled.zca.items()}
    expected = {"zca_mean": [width], "zca_matrix": [width, width]} if meta.pixel_space == "zca" else {}
    if shapes != expected:
        raise InputError(
            f"a set in pixel space {meta.pixel_space} must hold {expected or 'no ZCA'}, got {shapes}"
        )
    for name, tensor in distilled.zca.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} must be finite float32, got {tensor.dtype}, NaN or infinity")


def _check_labels(labels: Tensor, targets: Tensor | None, num_images: int, num_classes: int) -> None:
    if targets is not None:
        if targets.dtype != torch.float32 or targets.ndim != 2 or len(targets) != num_images or len(labels):
            raise InputError(
                f"targets must be float32 [{num_images}, D] without labels, got {targets.dtype} "
                f"{list(targets.shape)} and {len(labels)} labels"
            )
    elif labels.dtype != torch.int64 or labels.shape != (num_images,):
        raise InputError(f"labels must be int64 [{num_images}], got {labels.dtype} {list(labels.shape)}")
    elif labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )


def _check_soft(distilled: DistilledSet, num_images: int, num_classes: int) -> None:
    soft, kind = distilled.soft_labels, distilled.meta.label_kind or "probabilities"
    if soft is None:
        return
    if soft.dtype != torch.float32 or soft.shape != (num_images, num_classes):
        raise InputError(
            f"soft_labels must be float32 [{num_images}, {num_classes}], got {soft.dtype} {list(soft.shape)}"
        )
    if kind == "probabilities" and not are_probabilities(soft):
        raise InputError("soft_labels must be probabilities that sum to 1 in every row")
    if not torch.equal(soft.argmax(1), distilled.labels):
        raise InputError("labels must be the largest of every row of soft_labels")


def are_probabilities(values: Tensor) -> bool:
    """Return whether the rows of values [N, K] are probabilities: none below 0, and a sum of 1."""
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() < 1e-3).all())


def _decode(distilled: DistilledSet) -> TrainSet:
    soft, regress = distilled.learned_labels(), distilled.meta.label_kind == "values"
    return TrainSet(distilled.images, distilled.labels, distilled.targets, soft, regress)


DECODER: Final = Decoder(read_images, _validate, _decode)
