"""Files of tensors and plain values (torch's, .npz, pickles), read without running any code in them."""

import collections
import hashlib
import io
import math
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ddray.errors import InputError, one_line
from ddray.system.files import home, storage_errors
from ddray.system.memory import available_bytes

_CPU: Final = torch.device("cpu")
_MOST_IN_MEMORY: Final = 2**29  # bytes of a matrix of features


def numpy_scalars() -> list[Any]:
    """Return the safe globals for other projects' files, whose numbers may be NumPy scalars."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    return [
        *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    ]


class _TensorUnpickler(pickle.Unpickler):
    """Reads a pickle of tensors and plain values; it finds the three names that these take, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            load = partial(torch.load, map_location="cpu", weights_only=True)
            return lambda data: load(io.BytesIO(data))
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError("weights_only: it holds other objects")


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size, available = sum(file.file_size for file in archive.infolist()), available_bytes(_CPU)
        if size > available:
            raise ValueError(f"it would unpack to {size / 2**30:.1f} GiB, {available / 2**30:.1f} are free")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix in (".pkl", ".pickle"):
        with path.open("rb") as file:
            return _TensorUnpickler(file).load()
    with torch.serialization.safe_globals(numpy_scalars()):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_plain(path: Path) -> Any:
    """Load tensors, plain values and NumPy scalars from a file, on the CPU, and run no code in it.

    A `.npz` gives a dict of tensors. A ValueError says whether the file is torn, holds something else, or
    would unpack to more than the memory that is free.
    """
    try:
        return _load(path)
    except Exception as error:  # torch raises many types here, all of which mean: not such a file
        reason = one_line(error, 160)
        if any(word in str(error) for word in ("weights_only", "allow_pickle")):  # advice to turn it off
            reason = "it holds objects that could run code, which are never loaded"
        raise ValueError(reason) from error


def read_tensors(path: Path) -> Any:
    """Load a distilled set's file; InputError if it is missing, torn, or asks for code to be run."""
    if path.is_dir():
        raise InputError(f"a distilled set must be a file, {path} is a folder; name the file in it")
    if not path.is_file():
        raise InputError(f"a distilled set must be an existing file, got {path}")
    try:
        return load_plain(path)
    except ValueError as error:
        rule = "must be an undamaged distilled set of tensors and plain values"
        raise InputError(f"{path} {rule}: {error}; copy it again") from error


def check_channels_first(shape: Sequence[int], what: str) -> None:
    """Refuse the (C, H, W) of images if it is (H, W, C): InputError if they seem 1 or 3 pixels wide."""
    if len(shape) == 3 and shape[2] in (1, 3) and shape[0] > 4:
        rule = f"{what} must be (channels, height, width), got {tuple(shape)} with the channels last"
        raise InputError(f"{rule}; use images.permute(0, 3, 1, 2)")


def empty_matrix(num: int, like: Tensor, device: torch.device | str) -> Tensor:
    """Return a matrix [num, D] for rows such as those of `like` [n, D]; a large one on the CPU on the disk.

    It is a file without a name below `$DDRAY_HOME`, whose pages the system writes out when it needs memory.

    Raises:
        StorageError: there is no space for it.
    """
    shape, size = (num, like.shape[1]), num * like.shape[1] * like.element_size()
    if torch.device(device).type != "cpu" or size <= _MOST_IN_MEMORY:
        return like.new_empty(shape, device=device)
    folder = home()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".features-", suffix=".tmp") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            flat = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=like.dtype)
    return flat.view(shape)


def is_plain(value: Any) -> bool:
    """Return whether a value is a dense CPU tensor (not sparse, not on the meta device)."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """Return the sha256 (hex) of tensors' bytes, one after another; of a generator's one is in memory."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
