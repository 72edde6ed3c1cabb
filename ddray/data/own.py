"""Tensors, arrays and torch Datasets as datasets: stored once, by content, and reopened by that path."""

import hashlib
import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from ddray.data import arrays
from ddray.data.pictures import Geometry, Item, decode, header
from ddray.errors import InputError
from ddray.system.files import home, write_atomically

log = logging.getLogger(__name__)

Own: TypeAlias = torch.utils.data.Dataset[Any] | tuple[Any, Any]


def store(train: Own, test: Own | None = None) -> Path:
    """Store images with labels, and return the file, which can be given wherever a dataset can.

    It lies under `$DDRAY_HOME/own` and is named by its content: the same images are stored once.

    Args:
        train: a torch Dataset of (image, label) pairs, or (images [N, C, H, W], labels [N]). Images
            are floats in [0, 1], which are stored with 8 bits, or bytes; tensors have their channels first,
            arrays last. Labels are whole numbers or names; `classes` of a torch Dataset names numbers.
        test: likewise; None: a fixed, stratified 20% of `train` is test.

    Raises:
        InputError: images or labels can't be meant.
        StorageError: the file can't be written.
    """
    images, values = _read(train, "the dataset")
    content: dict[str, Any] = {"train_images": images, "train_labels": values}
    if test is not None:
        test_images, test_values = _read(test, "test")
        if test_images.shape[1:] != images.shape[1:]:
            raise InputError(
                f"test images must have train's height, width and channels, {list(images.shape[1:])}, got "
                f"{list(test_images.shape[1:])}"
            )
        content |= {"test_images": test_images, "test_labels": test_values}
    if (names := _names(train)) and values.dtype.kind == "i":
        content["class_names"] = np.array(names, dtype=str)
    if test is None:
        content = {key.removeprefix("train_"): array for key, array in content.items()}
    digest = hashlib.sha256()
    for key, array in content.items():
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    file = home() / "own" / f"{digest.hexdigest()[:16]}.npz"
    if not file.is_file():
        write_atomically(file, lambda opened: np.savez(opened, **content), only_if_absent=True)
    return file


def _names(dataset: Any) -> list[str]:
    """Return the class names of a torch Dataset, also of one that a Subset is of; empty if it has none."""
    while isinstance(dataset, Subset) and not hasattr(dataset, "classes"):
        dataset = dataset.dataset
    return [str(name) for name in getattr(dataset, "classes", ())]


class _Images(NamedTuple):
    """Images with labels as they were given."""

    pixels: arrays.Array  # uint8 [N, H, W, C]
    labels: Any  # [N]
    num_rounded: int  # images that bytes only stand for nearly
    is_integer: bool


def _read(data: Any, where: str) -> tuple[arrays.Array, arrays.Array]:
    """Return uint8 images [N, H, W, C] and labels, int64 or str [N]."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, tuple | list) and len(data) == 2:
        array, is_tensor = _array(data[0])
        pixels, rounded = arrays.to_bytes(arrays.channels_last(array, where, first=is_tensor), where)
        images = _Images(pixels, data[1], int(rounded.sum()), array.dtype.kind in "iu")
    elif isinstance(data, torch.utils.data.Dataset):
        images = _items(data, where)
    else:
        raise InputError(
            f"{where} must be a name, a path, a torch Dataset or (images, labels), got {type(data).__name__}"
        )
    num = len(images.pixels)
    if images.is_integer:
        arrays.check_range(images.pixels, where)
    if images.num_rounded:
        log.warning("%d of %d images of %s are %s", images.num_rounded, num, where, arrays.ROUNDED)
    labels = images.labels.numpy(force=True) if isinstance(images.labels, torch.Tensor) else images.labels
    return images.pixels, arrays.to_values(labels, num, where)


def _array(values: Any) -> tuple[arrays.Array, bool]:
    """Return an array, and whether it was a tensor, whose channels come first."""
    is_tensor = isinstance(values, torch.Tensor)
    return (values.numpy(force=True) if is_tensor else np.asarray(values)), is_tensor


def _items(dataset: Any, where: str) -> _Images:
    """Return the items of a torch Dataset; says what was done to pictures."""
    streamed = isinstance(dataset, IterableDataset)
    if not streamed and not hasattr(dataset, "__len__"):
        raise InputError(f"{where} must have a length (__len__) or be an IterableDataset, got {dataset!r}")
    items = dataset if streamed else (dataset[index] for index in range(len(dataset)))
    pixels: list[arrays.Array] = []
    labels, changes, num_rounded, is_integer = [], Counter[str](), 0, True
    for index, item in enumerate(items):
        place = f"item {index} of {where}"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(
                f"items of a torch Dataset must be (image, label), got {type(item).__name__}, {place}"
            )
        array, is_tensor, of_picture = _image(item[0], place)
        image, rounded = arrays.to_bytes(arrays.channels_last(array[None], place, first=is_tensor), place)
        if pixels and image.shape != pixels[0].shape:
            raise InputError(
                f"images must have one height, width and number of channels, got {list(image.shape[1:])} "
                f"after {list(pixels[0].shape[1:])}, {place}; give the Dataset a transform that resizes"
            )
        pixels.append(image)
        labels.append(_array(item[1])[0].tolist())
        is_integer &= array.dtype.kind in "iu"
        changes.update(of_picture)
        num_rounded += int(rounded.sum())
    if not pixels:
        raise InputError(f"{where} must have images, got none")
    for change, num in changes.items():
        log.warning("%d of %d images of %s are %s", num, len(pixels), where, change)
    return _Images(np.concatenate(pixels), labels, num_rounded, is_integer)


def _image(image: Any, place: str) -> tuple[arrays.Array, bool, list[str]]:
    """Return an item's image as an array, whether its channels are first, and what was done to a picture."""
    from PIL import Image

    if not isinstance(image, Image.Image) or image.mode in ("L", "RGB"):
        return *_array(image), []
    encoded = io.BytesIO()
    try:
        image.save(encoded, "PNG")
    except OSError as error:
        raise InputError(
            f"pictures must be grey or RGB, got mode {image.mode}, {place}; convert them"
        ) from error
    picture = Item(place, 0, encoded.getvalue())
    (width, height), is_grey = header(picture)
    pixels, changes = decode(picture, Geometry((1 if is_grey else 3, height, width), resize=False))
    return pixels, True, [change for change, _ in changes]
