"""NumPy's .npz files: MedMNIST's (`train_images`, `train_labels`, ...), Keras' (`x_train`, `y_train`, ...).

Without a test half the validation half is test; `images` and `labels` without halves give 20% to test. Labels
are numbers, names or one-hot; `class_names` may name the numbers. Images keep their size.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ddray.data import arrays
from ddray.data.listing import Skipped, halves_of, loose_files, part_of
from ddray.data.pictures import Geometry, Item
from ddray.data.sources import Layout, Source, from_one_source, from_sources
from ddray.errors import InputError, one_line
from ddray.system.memory import available_bytes

_BATCH: Final = 1024
_WORDS: Final = {
    **dict.fromkeys(("images", "image", "imgs", "img", "x", "data"), "images"),
    **dict.fromkeys(("labels", "label", "targets", "target", "y"), "labels"),
}
_BROKEN: Final = (OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, MemoryError)
_NAMES: Final = ("class_names", "label_names", "classes")


@dataclass(frozen=True)
class _Half:
    """The arrays of one half of a file."""

    file: Path
    images: str
    labels: str

    def where(self) -> str:
        return f"{self.images} of {self.file}"

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the images without reading them."""
        with _opened(self.file) as archive:
            return _shape(archive, self.images)

    def count(self) -> int:
        """Return the number of images."""
        return (self.shape() or (0,))[0]

    def values(self) -> arrays.Array:
        """Return the labels as int64 or str [N]."""
        where = f"{self.labels} of {self.file}"
        return arrays.to_values(_array(self.file, self.labels), self.count(), where)

    def is_labelled(self) -> bool:
        """Return whether an image has a label; labels that can't be read are named when test is."""
        try:
            return arrays.is_labelled(_array(self.file, self.labels))
        except InputError:
            return True

    def geometry(self) -> Geometry:
        """Return what the images look like."""
        empty = np.broadcast_to(np.uint8(0), self.shape())  # as large as the images, in one byte
        _, height, width, channels = arrays.channels_last(empty, self.where(), first=False).shape
        return Geometry((channels, height, width), resize=False, rule="the arrays' own")

    def batches(self, indices: arrays.Array) -> Iterator[list[Item]]:
        """Yield the images, encoded as PPM or PGM."""
        images = arrays.channels_last(_array(self.file, self.images), self.where(), first=False)
        if images.dtype.kind in "iu":
            arrays.check_range(images, self.where())
        for start in range(0, len(images), _BATCH):
            pixels, rounded = arrays.to_bytes(images[start : start + _BATCH], self.where())
            changes = [(arrays.ROUNDED,) if is_rounded else () for is_rounded in rounded]
            yield [
                Item(f"{self.where()}, row {row}", int(indices[row]), as_ppm(image), changes[row - start])
                for row, image in enumerate(pixels, start)
            ]


def as_ppm(image: arrays.Array) -> bytes:
    """Return uint8 [H, W, C] as a PPM (3 channels) or PGM file (1)."""
    height, width, channels = image.shape
    return b"P%d %d %d 255\n" % (5 if channels == 1 else 6, width, height) + image.tobytes()


def layout_of_npz(path: Path) -> Layout | None:
    """Return the layout of a .npz file, or of the only one in a folder; None if there is none.

    Raises:
        InputError: it can't be read, has no train half, or labels that can't be meant.
    """
    files = loose_files(path, (".npz",)) if path.is_dir() else [path] * (path.suffix.lower() == ".npz")
    if not files:
        return None
    if len(files) > 1:
        raise InputError(
            f"a folder must hold one .npz file, got {len(files)} in {path}; give {files[0]}, or another"
        )
    file = files[0]
    with _opened(file) as archive:
        keys = list(archive)
    halves = _halves(file, keys)
    if not halves:
        raise InputError(
            "an .npz file must have train_images and train_labels, x_train and y_train, or images and "
            f"labels, got {', '.join(keys)} in {file}"
        )
    arrays_of = {kind: [file / half.images, file / half.labels] for kind, half in halves.items()}
    skipped = Skipped(path, (".npz",), covered=[file])
    kinds = halves_of(arrays_of, skipped, "arrays", lambda kind: halves[kind].is_labelled())
    train, test = halves[kinds[0]], None if kinds[1] is None else halves[kinds[1]]
    names_key = next((key for key in _NAMES if key in keys), None)
    used = {names_key, *(array.name for of_half in arrays_of.values() for array in of_half)}
    skipped.add("arrays that are neither images nor labels", *(file / key for key in keys if key not in used))
    values = train.values()
    names = (
        arrays.class_names(values) if names_key is None else tuple(map(str, _array(file, names_key).tolist()))
    )

    def source(half: _Half, values: arrays.Array) -> Source:
        indices = arrays.to_indices(values, names, half.where(), numbered=names_key is not None)
        return Source([file], half.count, lambda: half.batches(indices), f"{half} {names}")

    whole = source(train, values)
    if test is None:
        layout = from_one_source(names, whole)
    else:
        layout = from_sources(names, whole, lambda: source(test, test.values()))
    return replace(
        layout, train=lambda size: layout.train(train.geometry() if size is None else size), skipped=skipped
    )


def _halves(file: Path, keys: Sequence[str]) -> dict[str, _Half]:
    """Return the halves of a file by name: train, test, val, or "" for one without halves."""
    roles: dict[tuple[str, str], str] = {}
    for key in keys:
        half, rest = part_of(key) or ("", key)
        kinds = {_WORDS[word] for word in re.findall(r"[a-z]+", key.lower()) if word in _WORDS}
        if len(kinds) != 1 or any(word not in _WORDS for word in re.findall(r"[a-z]+", rest.lower())):
            continue
        (kind,) = kinds
        if (half, kind) in roles:
            raise InputError(
                f"an .npz file must have one array of {half} {kind}, "
                f"got {roles[half, kind]} and {key} in {file}"
            )
        roles[half, kind] = key
    return {
        half: _Half(file, images, roles[half, "labels"])
        for (half, kind), images in roles.items()
        if kind == "images" and (half, "labels") in roles
    }


def _shape(archive: Any, key: str) -> tuple[int, ...]:
    """Return the shape of an array without reading it.

    Raises:
        ValueError: it is larger than its file says, or than the memory: a few bytes can unpack to anything.
    """
    formats, size = np.lib.format, archive.zip.getinfo(f"{key}.npy").file_size
    with archive.zip.open(f"{key}.npy") as npy:
        is_first = formats.read_magic(npy) == (1, 0)
        read = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
        shape, _, dtype = read(npy)
    free = available_bytes(torch.device("cpu"))
    if math.prod(shape) * dtype.itemsize > size or size > free:
        raise ValueError(f"{key} {list(shape)} must fit the {size} bytes it has and the {free} of memory")
    return tuple(shape)


def _array(file: Path, key: str) -> arrays.Array:
    with _opened(file) as archive:
        _shape(archive, key)  # it may be too large
        array: arrays.Array = archive[key]
        return array


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Yield the arrays by name; what NumPy raises for a broken file becomes an InputError."""
    try:
        with file.open("rb") as binary, np.load(binary, allow_pickle=False) as archive:
            yield archive
    except (*_BROKEN, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f".npz file must be readable, got {file}: {one_line(error)}") from error
