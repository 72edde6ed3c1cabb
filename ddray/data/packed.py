"""Images that stay on the disk: a tensor of rows of a memory-mapped file, of which only what is used is read.

Every process of a node maps the same file, so its pages are in memory once, and only while there is room. To
pickle such images is to name the file and the rows: no pixel passes through an object store.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddray.errors import InputError, one_line
from ddray.system.files import home, write_text
from ddray.system.memory import available_bytes, total_bytes
from ddray.system.transfer import to_device

PACKED: Final = "packed"
"""Folder below `$DDRAY_HOME`."""
IMAGES: Final = "images.npy"
REMEMBERED: Final = "remembered-{}.json"
"""What was computed from an entry's images."""
_PART_BYTES: Final = 32 * 2**20  # of what is read at a time on a way through all images
_CHECKED_BYTES: Final = 64 * 2**20  # smaller parts are read without a look at the memory
_GPU_SHARE: Final = 2  # of a GPU's free memory, that packed images may take whole
_Rows = np.ndarray[Any, np.dtype[np.int64]]
_aten = torch.ops.aten


class PackedImages(Tensor):
    """uint8 images [N, C, H, W] on the disk, on the CPU for torch; they can't be written to.

    Parts of them (`images[a:b]`, `torch.split`, `rows`) are such images again and take no memory. An index
    (`images[index]`, `index_select`) reads its rows, in the order of the file. Every other operation reads
    all rows, as `whole` does.

    Args:
        file: an `.npy` file of uint8 [M, C, H, W] in C order, in `$DDRAY_HOME/packed/<key>/`.
        rows: int64 [N], which of its images, in this order; None: all.
        shape: (C, H, W) of its images, if it comes with rows: the file is then opened when it is used.

    Raises:
        InputError: the file can't be read, or is none of images.
    """

    _file: Path
    _rows: _Rows

    def __new__(cls, file: Path, rows: _Rows | None = None, shape: tuple[int, ...] | None = None) -> Self:
        """Name rows of a file."""
        rows = np.arange(len(_mapped(file))) if rows is None else rows
        shape = _mapped(file).shape[1:] if shape is None else shape
        self: Self = Tensor._make_wrapper_subclass(cls, (len(rows), *shape), dtype=torch.uint8)
        self._file, self._rows = file, rows
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function._schema.is_mutable:
            raise TypeError(f"packed images can't be written to, got {function}; clone them")
        handler = _HANDLERS.get(function)
        if handler is not None and (result := handler(*args, **(kwargs or {}))) is not NotImplemented:
            return result
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return function(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _reopened, (self._file, self._rows, tuple(self.shape[1:]))

    def __deepcopy__(self, memo: object) -> Self:
        return self  # it can't change

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedImages({str(self._file)!r}, {list(self.shape)})"

    def rows(self, index: Tensor) -> PackedImages:
        """Return the images of `index` [M], or where a bool `index` [N] is true, without reading them."""
        return self._part(self._rows[index.cpu().numpy()])

    def _part(self, rows: _Rows) -> PackedImages:
        return PackedImages(self._file, rows, tuple(self.shape[1:]))

    def whole(self) -> Tensor:
        """Return all images in memory.

        Raises:
            InputError: they take more than is free.
        """
        self.check_memory()
        return _gather(self._file, self._rows)

    def check_memory(self, dtype: torch.dtype = torch.uint8) -> None:
        """Refuse to have all images in memory as numbers of some type if they take more than is free.

        Raises:
            InputError: they do; it has the figures.
        """
        size = self.numel() * dtype.itemsize
        if size <= _CHECKED_BYTES:
            return
        free = min(available_bytes(self.device), total_bytes(self.device))
        if size > free:
            raise InputError(
                f"this needs all of {len(self)} images in memory, {size / 2**30:.1f} GiB, got "
                f"{free / 2**30:.1f} GiB free; use a smaller --image-size, or a method that draws batches"
            )

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """Return all images as an array of its own memory; InputError as for `whole`."""
        return self.whole().numpy()

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Return itself: what is read of it is contiguous, in any format that its user then gives it."""
        return self

    def remembered(self, what: str, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, of JSON types, which depends on these images and on what the text says.

        It is stored beside the file and computed once.
        """
        key = hashlib.sha256(self._rows.data)
        key.update(what.encode())
        file = self._file.parent / REMEMBERED.format(key.hexdigest()[:24])
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = compute()
        try:
            write_text(file, json.dumps(value))
        except Exception:  # a home that can't be written only costs the time
            return value
        return value


Images: TypeAlias = np.ndarray[Any, Any] | PackedImages
"""Images as processes share them."""


@lru_cache(maxsize=64)
def _mapped(file: Path) -> np.memmap[Any, np.dtype[np.uint8]]:
    """Return a file's images [M, C, H, W], mapped into memory once per process, read-only."""
    try:
        pixels: np.memmap[Any, np.dtype[np.uint8]] = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"packed images must be readable on every node, got {file}: {one_line(error)}; share $DDRAY_HOME"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not pixels.flags.c_contiguous:
        raise InputError(f"packed images must be uint8 [N, C, H, W], got {pixels.dtype} in {file}")
    if pixels.nbytes:  # what is read is said beforehand (`_advise`): reading more ahead would be in vain
        pixels._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return pixels


def _reopened(file: Path, rows: _Rows, shape: tuple[int, ...]) -> PackedImages:
    """Return pickled images: of the file in this process's `$DDRAY_HOME`, else where they were."""
    local = home() / PACKED / file.parent.name / file.name
    return PackedImages(local if local.is_file() else file, rows, shape)


def _advise(pixels: np.memmap[Any, Any], ordered: _Rows) -> None:
    """Let the system read rows, in ascending order, all at once and no more than them."""
    if len(ordered) == 0:
        return
    ends = np.flatnonzero(np.diff(ordered) > 1)
    firsts = ordered[np.concatenate(([0], ends + 1))]
    lasts = ordered[np.concatenate((ends, [len(ordered) - 1]))]
    size, before = pixels[0].nbytes, pixels.offset % mmap.ALLOCATIONGRANULARITY
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        start = before + first * size
        aligned = start - start % mmap.PAGESIZE
        length = before + (last + 1) * size - aligned
        pixels._mmap.madvise(mmap.MADV_WILLNEED, aligned, length)  # type: ignore[attr-defined]


def _gather(file: Path, rows: _Rows) -> Tensor:
    """Return images [N, C, H, W] in memory, read in the order of the file; in one thread, without torch's."""
    pixels = _mapped(file)
    gathered = np.empty((len(rows), *pixels.shape[1:]), dtype=np.uint8)
    if len(rows) == 0:
        return torch.from_numpy(gathered)
    flat, is_sorted = pixels.reshape(len(pixels), -1), bool((np.diff(rows) >= 0).all())
    order = np.arange(len(rows)) if is_sorted else rows.argsort(kind="stable")
    target, step = gathered.reshape(len(rows), -1), max(1, _PART_BYTES // max(1, flat.shape[1]))
    for start in range(0, len(rows), step):
        part = order[start : start + step]
        _advise(pixels, rows[part])
        # `take` lets other threads go on while it waits for the disk; "clip" spares it a copy.
        if is_sorted:
            np.take(flat, rows[part], axis=0, out=target[start : start + step], mode="clip")
        else:
            target[part] = np.take(flat, rows[part], axis=0, mode="clip")
    return torch.from_numpy(gathered)


def _index(images: PackedImages, indices: Sequence[Tensor | None]) -> Any:
    if not isinstance(images, PackedImages) or len(indices) != 1 or indices[0] is None:
        return NotImplemented
    return _gather(images._file, images._rows[indices[0].cpu().numpy()])


def _index_select(images: Any, dim: int, index: Tensor) -> Any:
    return _index(images, [index]) if dim == 0 else NotImplemented


def _select(images: PackedImages, dim: int, index: int) -> Any:
    return _gather(images._file, images._rows[[index]])[0] if dim == 0 else NotImplemented


def _slice(
    images: PackedImages, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    return images._part(images._rows[start:end:step]) if dim == 0 else NotImplemented


def _split(images: PackedImages, size: int, dim: int = 0) -> Any:
    return (
        [_slice(images, 0, start, start + size) for start in range(0, len(images), size)]
        if dim == 0 and len(images)
        else NotImplemented
    )


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Any:
    packed = [part for part in parts if isinstance(part, PackedImages)]
    if dim != 0 or len(packed) < len(parts) or len({part._file for part in packed}) > 1:
        return NotImplemented
    return packed[0]._part(np.concatenate([part._rows for part in packed]))


def _to_copy(images: PackedImages, *, dtype: Any = None, device: Any = None, **options: Any) -> Any:
    """Copy images to another device part by part, so that they are never in the CPU's memory whole."""
    if device is None or torch.device(device).type == "cpu" or dtype not in (None, torch.uint8):
        return NotImplemented
    copied = torch.empty(images.shape, dtype=torch.uint8, device=device)
    done = 0
    for part in parts_of(images):
        copied[done : done + len(part)] = to_device(part, copied.device)
        done += len(part)
    return copied


_HANDLERS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.cat.default: _cat,
    _aten._to_copy.default: _to_copy,
    _aten.detach.default: lambda images: images,
    _aten.alias.default: lambda images: images,
}


def read(images: Tensor, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the images of each part, an index [n]; of packed ones the next is read while one is used."""
    if not isinstance(images, PackedImages):
        yield from (images.index_select(0, part) for part in parts)
        return
    with ThreadPoolExecutor(1, "packed") as thread:
        pending = None
        for part in parts:
            following = thread.submit(images.__getitem__, part)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def parts_of(images: Tensor, size: int | None = None) -> Iterator[Tensor]:
    """Yield images [N, C, H, W] in parts of `size`; not set: of 32 MiB. Of packed ones, one is read ahead."""
    size = size or max(1, _PART_BYTES // max(1, images[:1].nbytes))
    if isinstance(images, PackedImages):
        yield from read(images, torch.split(torch.arange(len(images)), size))
    else:
        yield from torch.split(images, size)


def shared(images: Tensor) -> Images:
    """Return images as they go to other processes: an array, or packed ones, of which the name is sent."""
    return images if isinstance(images, PackedImages) else images.numpy()


def copied(images: Images) -> Tensor:
    """Return what `shared` gave as a tensor of this process's own; packed images stay on the disk."""
    return images if isinstance(images, PackedImages) else torch.tensor(images)


def resident(images: Tensor, device: torch.device) -> Tensor:
    """Return images on `device`; packed ones stay on the disk unless half of its free memory takes them."""
    if not isinstance(images, PackedImages):
        return images.to(device)
    fits = device.type != "cpu" and _GPU_SHARE * images.nbytes <= available_bytes(device)
    return images.to(device) if fits else images
