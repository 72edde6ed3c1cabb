"""Arrays as images and labels: what .npz files, tensors and torch Datasets hold.

Images become bytes, and nothing may be cut off: floats must lie in [0, 1], integers in 0..255. Each value of
a label is a class, in sorted order, unless there are names for the numbers 0, 1, ...; -1 is no label.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ddray.data.lists import in_order
from ddray.errors import InputError

Array = np.ndarray[Any, Any]
_CHANNELS: Final = (1, 3)
ROUNDED: Final = "stored with 8 bits (256 levels)"
_EXACT: Final = 0.1  # floats this close to a 255th (float16 is) came from bytes


def to_bytes(images: Array, where: str) -> tuple[Array, Array]:
    """Return images [N, ...] as uint8, and which of them had to be rounded (`ROUNDED`), bool [N].

    Raises:
        InputError: their values are none that bytes can stand for.
    """
    if images.size == 0:
        raise InputError(f"a dataset must have images, got {list(images.shape)} in {where}")
    exact = np.zeros(len(images), dtype=bool)
    if images.dtype == np.uint8:
        return images, exact
    if images.dtype.kind not in "biuf":
        raise InputError(f"images must be numbers, got {images.dtype} {list(images.shape)} in {where}")
    low, high = images.min(), images.max()
    if images.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise InputError(f"integer images must lie in 0..255, got {low}..{high} in {where}")
        return images.astype(np.uint8), exact
    if not (low >= 0 and high <= 1):  # also NaN
        raise InputError(
            f"float images must lie in [0, 1], got {low:.4g}..{high:.4g} in {where}; divide by the largest "
            "value they can have, leave out a Normalize, or give uint8"
        )
    scaled = images.astype(np.float32) * 255
    rounded = scaled.round()
    return rounded.astype(np.uint8), np.abs(scaled - rounded).reshape(len(images), -1).max(axis=1) > _EXACT


def channels_last(images: Array, where: str, *, first: bool) -> Array:
    """Return images [N, H, W], [N, H, W, C] or [N, C, H, W] as [N, H, W, C].

    Where axis 1 and axis 3 could both be the channels, `first` decides.

    Raises:
        InputError: they have another shape, or neither 1 nor 3 channels.
    """
    if images.ndim == 3:
        return images[..., None]
    axes = [
        axis for axis in ((1, 3) if first else (3, 1)) if images.ndim == 4 and images.shape[axis] in _CHANNELS
    ]
    if not axes:
        raise InputError(
            f"images must be [N, H, W], [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, got "
            f"{list(images.shape)} in {where}"
        )
    return images if axes[0] == 3 else images.transpose(0, 2, 3, 1)


def check_range(images: Array, where: str) -> None:
    """Refuse bytes [N, ...] of which none is above 1: they are no pixels of 0..255, but numbers of 0 or 1."""
    if images.max() <= 1:
        raise InputError(
            f"integer images must span 0..255, got {images.min()}..{images.max()} in {where}; give floats or "
            "bool if 1 is white"
        )


def to_values(labels: Any, num: int, where: str) -> Array:
    """Return labels [N], [N, 1] or one-hot [N, K] as int64 or str [N].

    Raises:
        InputError: there is not one label per image, or they are no classes.
    """
    try:
        values = np.asarray(labels)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"there must be one label for each image, got lists of them in {where}") from error
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2 and values.dtype.kind in "biuf" and (np.sort(values)[:, -2:] == (0, 1)).all():
        values = values.argmax(axis=1)
    if values.shape != (num,):
        raise InputError(
            f"there must be one label for each of {num} images, got {list(values.shape)} in {where}"
        )
    if values.dtype.kind in "SUO" and all(isinstance(value, str | bytes) for value in values.tolist()):
        values = np.char.decode(values) if values.dtype.kind == "S" else values.astype(str)
        bad = values[values == ""]
    elif values.dtype.kind in "biuf":
        values = values.astype(np.uint8) if values.dtype.kind == "b" else values
        bad = values[~((values >= 0) & (values < 2**31) & (values == np.round(values)))]
    else:
        bad = values[[not isinstance(value, int) for value in values.tolist()]]
    if len(bad) or values.dtype.kind == "O":
        value = (bad if len(bad) else values)[:1].tolist()
        raise InputError(
            f"labels must be whole numbers from 0 on, or names, got {value} ({values.dtype}) in {where}"
        )
    return values if values.dtype.kind == "U" else values.astype(np.int64)


def is_labelled(labels: Any) -> bool:
    """Return whether there is a label among labels of a test half, where -1 means none."""
    values = np.asarray(labels)
    return values.dtype.kind not in "if" or bool((values >= 0).any())


def class_names(values: Array) -> tuple[str, ...]:
    """Return a name for each label that occurs, in their order."""
    unique = np.unique(values).tolist()
    return tuple(map(str, unique if values.dtype.kind == "i" else sorted(unique, key=in_order)))


def to_indices(values: Array, names: Sequence[str], where: str, *, numbered: bool) -> Array:
    """Return labels as indices into `names`, int64 [N].

    Args:
        values: from `to_values`.
        names: of the classes.
        where: their file, for messages.
        numbered: whether an integer is an index already, because the names came from elsewhere.

    Raises:
        InputError: a label is none of the names.
    """
    if numbered and values.dtype.kind == "i":
        bad = values[(values < 0) | (values >= len(names))]
        if len(bad):
            raise InputError(
                f"labels must lie in 0..{len(names) - 1}, as there are {len(names)} class names, "
                f"got {bad[0]} in {where}"
            )
        return values
    index = {name: position for position, name in enumerate(names)}
    unique, inverse = np.unique(values, return_inverse=True)
    strange = [str(value) for value in unique.tolist() if str(value) not in index]
    if strange:
        raise InputError(
            f"labels must be among train's ({', '.join(names[:10])}), got {strange[0]!r} in {where}"
        )
    positions = np.array([index[str(value)] for value in unique.tolist()], dtype=np.int64)
    return positions[inverse]
