"""Reading distilled sets: ours, and those of other projects."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddray.artifact.decoders import get_decoder
from ddray.artifact.distilled_set import FORMAT_VERSION, ZCA, DistilledSet, Meta
from ddray.artifact.foreign import read_foreign
from ddray.data import Dataset, PixelSpace
from ddray.errors import InputError
from ddray.system.tensors import is_plain, read_tensors


def load(
    path: Path, *, dataset: Dataset | None = None, pixel_space: PixelSpace | None = None
) -> DistilledSet:
    """Read a distilled set: ours, the DC family's `res_*.pt`, or MTT's `images_best.pt` + `labels_best.pt`.

    Args:
        path: the file.
        dataset: what a foreign file was distilled from (the file does not say).
        pixel_space: of a foreign file; default: normalised by the dataset's mean and std.

    Raises:
        InputError: the file is missing, torn, not a distilled set, or has more than tensors and plain values.
    """
    contents = read_tensors(path)
    if isinstance(contents, dict) and "format_version" in contents:
        return _own(path, contents)
    if dataset is None:
        raise InputError(f"{path} does not say which dataset it is of: add --dataset NAME")
    images, labels = read_foreign(path, contents)
    if int(labels.max()) >= dataset.num_classes:
        raise InputError(
            f"{path}: labels must be < {dataset.num_classes} for {dataset.name}, got {int(labels.max())}"
        )
    space = pixel_space or PixelSpace("normalized", dataset.mean, dataset.std)
    zca = {"zca_mean": space.zca_mean, "zca_matrix": space.zca_matrix} if space.kind == "zca" else {}
    tensors = {name: tensor for name, tensor in zca.items() if tensor is not None}
    meta = _describe_foreign(path, images, labels, dataset, space.kind)
    return _validated(path, lambda: DistilledSet(images.float(), labels.long(), meta, tensors))


def _describe_foreign(
    path: Path, images: Tensor, labels: Tensor, dataset: Dataset, kind: Literal["raw", "normalized", "zca"]
) -> Meta:
    """Return the metadata that can be inferred from another project's file."""
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


def _own(path: Path, contents: Mapping[str, Any]) -> DistilledSet:
    version = contents["format_version"]
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version must be {FORMAT_VERSION}, got {version}; update ddray")
    tensors = {key: value for key, value in contents.items() if key not in ("format_version", "meta")}
    wrong = [key for key, value in tensors.items() if not is_plain(value)]
    if wrong:
        raise InputError(f"{path}: {', '.join(wrong)} must be dense tensors")
    meta = _meta(path, contents)
    zca: dict[str, Tensor] = {key: tensors.pop(key) for key in ZCA if key in tensors}
    return _validated(path, lambda: get_decoder(meta.decoder).read(meta, tensors, zca))


def _meta(path: Path, contents: Mapping[str, Any]) -> Meta:
    try:
        values = dict(json.loads(contents["meta"]))
    except KeyError as error:
        raise InputError(f"{path} must hold meta, got {sorted(contents)}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: meta must be a JSON object, got {str(contents['meta'])[:60]!r}") from error
    return Meta.parse(values, prefix="meta.", source=str(path))


def _validated(path: Path, build: Callable[[], DistilledSet]) -> DistilledSet:
    try:
        distilled = build()
        distilled.validate()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return distilled
